"""Global gated mixture of pooling candidates."""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.gating import Gate, pool
from gmsop_jax.ops import apply_candidates, balance_loss, draw_rows, select_top_k, selection_weights
from gmsop_jax.ops.dispatch import Dispatch
from gmsop_jax.ops.top_k import Gradient


class GatedMixture(nn.Module):
    """Pools a map of features by the weighted sum of the candidates that its gate selects.

    z = Σ_{i ∈ TopK} wᵢ(x) · Mᵢ(x)   (GM-SOP, eq. 2)

    Candidate Mᵢ (the paper's component module, an expert of the mixture-of-experts literature) is a
    stack of 1×1 convolutions without bias, each with ReLU, then average (order 1, GM-GAP) or
    square-root-normalised covariance pooling (order 2, GM-SOP). Only the selected ones are computed.

    Attributes:
      num_candidates: n, size of the bank.
      num_selected: k, candidates per image.
      candidate_widths: of each candidate's convolutions; the last is the width d that is pooled.
      gate_widths: of the gate's trunk.
      order: 1 or 2, of the candidates' and the gate's pooling.
      num_iters: Newton–Schulz steps.
      gradient: `straight_through`, or the authors' `masked` (see `ops.top_k_gate`).
      dtype: as in `ResNet`; pooling, gate weights and result are never below float32.
      axis_name: pmap or shard_map axis over which the batch is split; batch norm, balance loss and draws
        are those of the whole batch.
      per_device_bn: batch norm uses the moments of each device's part instead.
    """

    num_candidates: int = 16
    num_selected: int = 8
    candidate_widths: Sequence[int] = (256, 128)
    gate_widths: Sequence[int] = (256, 128)
    order: int = 2
    num_iters: int = 3
    gradient: Gradient = "straight_through"
    dispatch: Dispatch = "auto"
    dtype: jnp.dtype | None = None
    axis_name: str | None = None
    per_device_bn: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        train: bool,
        gate_noise: Float[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b f"], Mapping[str, Array]]:
        """Pools the map.

        Args:
          x: features.
          train: whether noise is drawn (RNG stream `gating`) and batch norm uses the batch's moments.
          gate_noise: γ of each image, instead of the draw.

        Returns: (pooled features, {`balance_loss`, `gate_weights` [b, n]}).

        Raises:
          ValueError: if num_selected exceeds num_candidates, or gate_noise is not [b].
        """
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        noise_rng = tie_rng = None
        if train and self.has_rng("gating"):
            noise_rng, tie_rng = jax.random.split(self.make_rng("gating"))
        noise = self._noise(b, x.dtype, train, gate_noise, noise_rng)

        gate = Gate(
            self.num_candidates,
            self.gate_widths,
            self.order,
            self.num_iters,
            dtype=self.dtype,
            axis_name=None if self.per_device_bn else self.axis_name,
            name="gate",
        )
        logits = gate(x, train=train, noise=noise)
        indices = select_top_k(logits, self.num_selected, tie_rng, self.axis_name)
        weights = selection_weights(logits, indices, self.gradient)

        pooled = apply_candidates(x, self._bank(c, x), indices, self._pool, self.dispatch)
        selected = jnp.take_along_axis(weights, indices, axis=-1)
        fused = jnp.einsum("bk,bkf->bf", selected, pooled, precision=jax.lax.Precision.HIGHEST)
        aux = {"balance_loss": balance_loss(weights, self.axis_name), "gate_weights": weights}
        return fused, aux

    def _pool(self, x: Array) -> Array:
        return pool(x, self.order, self.num_iters)

    def _noise(self, b, dtype, train, given, rng) -> Array | None:
        if given is not None:
            if given.shape != (b,):
                raise ValueError(f"gate_noise must have shape ({b},), got {given.shape}")
            return given
        if not train or self.is_initializing():
            return None
        if rng is None:
            raise ValueError(
                "training draws the gate's noise: pass rngs={'gating': key} (and 'dropout') to apply, or gate_noise"
            )

        def draw(rng, shape):
            return jax.random.normal(rng, shape, jnp.promote_types(dtype, jnp.float32))

        return draw_rows(draw, rng, (b,), self.axis_name)

    def _bank(self, c: int, x: Array) -> list[Array]:
        """The candidates' weights, layer by layer [n, in, out], in the dtype of the computation."""
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", batch_axis=(0,))
        kernels = []
        for i, width in enumerate(self.candidate_widths, 1):
            kernels.append(self.param(f"candidates{i}", init, (self.num_candidates, c, width)))
            c = width
        dtype = self.dtype or jnp.result_type(x, *kernels)
        return [kernel.astype(dtype) for kernel in kernels]
