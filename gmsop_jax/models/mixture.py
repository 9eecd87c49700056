"""Mixtures of pooling candidates: gated, averaged, concatenated."""

from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.gating import Gate, GateOptions, noise_shape, pool
from gmsop_jax.models.layers import BatchNorm, ModuleFactory
from gmsop_jax.ops import (
    apply_all_candidates,
    apply_candidates,
    balance_loss,
    draw_rows,
    select_top_k,
    selection_weights,
)
from gmsop_jax.ops.dispatch import Dispatch

_HIGHEST = jax.lax.Precision.HIGHEST


class _Bank(nn.Module):
    """The candidates that the images share.

    Candidate Mᵢ (the paper's component module, an expert of the mixture-of-experts literature) is a
    stack of 1×1 convolutions without bias, each with ReLU, then average (order 1) or square-root-normalised
    covariance pooling (order 2).
    """

    num_candidates: int = 16
    candidate_widths: Sequence[int] = (256, 128)
    order: int = 2
    num_iters: int = 3
    dtype: jnp.dtype | None = None

    def _kernels(self, x: Array) -> list[Array]:
        """The candidates' weights, layer by layer [n, in, out], in the dtype of the computation."""
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", batch_axis=(0,))
        c, kernels = x.shape[-1], []
        for i, width in enumerate(self.candidate_widths, 1):
            kernels.append(self.param(f"candidates{i}", init, (self.num_candidates, c, width)))
            c = width
        dtype = self.dtype or jnp.result_type(x, *kernels)
        return [kernel.astype(dtype) for kernel in kernels]

    def _pool(self, x: Array) -> Array:
        return pool(x, self.order, self.num_iters)


class Mixture(_Bank):
    """Pools a map of features by all candidates, without a gate.

    z = (1/n) Σᵢ Mᵢ(x)  (Ave-GAP, Ave-SOP), or all Mᵢ(x) one after the other.

    Attributes:
      num_candidates: n, size of the bank; each image runs through all of them.
      candidate_widths: of each candidate's convolutions; the last is the width d that is pooled.
      order: 1 or 2, of the candidates' pooling.
      num_iters: Newton–Schulz steps.
      dtype: as in `ResNet`; pooling and result are never below float32.
      combine: `average`, or `concatenate` for n times as many features.
    """

    combine: Literal["average", "concatenate"] = "average"

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b f"]:
        """Pooled features.

        Raises:
          ValueError: if `combine` is unknown.
        """
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        pooled = apply_all_candidates(x, self._kernels(x), self._pool)
        if self.combine == "average":
            return jnp.mean(pooled, axis=1)
        if self.combine == "concatenate":
            return pooled.reshape(b, -1)
        raise ValueError(f"combine must be 'average' or 'concatenate', got {self.combine!r}")


class GatedMixture(_Bank):
    """Pools a map of features by the weighted sum of the candidates that its gate selects.

    z = Σ_{i ∈ TopK} wᵢ(x) · Mᵢ(x)   (GM-SOP, eq. 2; order 1 is GM-GAP)

    Only the selected candidates are computed.

    Attributes:
      num_candidates: n, size of the bank.
      candidate_widths: of each candidate's convolutions; the last is the width d that is pooled.
      order: 1 or 2, of the candidates' and the gate's pooling.
      num_iters: Newton–Schulz steps.
      dtype: as in `ResNet`; pooling, gate weights and result are never below float32.
      num_selected: k, candidates per image.
      gate_widths: of the gate's trunk.
      gate_options: its noise, weights, gradient, start and balance loss.
      dispatch: as in `ops.apply_candidates`.
      axis_name: pmap or shard_map axis over which the batch is split; balance loss and draws are those of
        the whole batch.
      norm: makes the gate's batch norms.
    """

    num_selected: int = 8
    gate_widths: Sequence[int] = (256, 128)
    gate_options: GateOptions = GateOptions()
    dispatch: Dispatch = "auto"
    axis_name: str | None = None
    norm: ModuleFactory = BatchNorm

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b h w c"],
        *,
        train: bool,
        gate_noise: Float[Array, "b ..."] | None = None,
    ) -> tuple[Float[Array, "b f"], Mapping[str, Array]]:
        """Pools the map.

        Args:
          x: features.
          train: whether noise is drawn (RNG stream `gating`) and batch norm uses the batch's moments.
          gate_noise: γ of each image [b] (or of each of its candidates [b, n], see `GateOptions`), instead
            of the draw.

        Returns: (pooled features, {`balance_loss`, `gate_weights` [b, n], `importance` [b, n]}); the last
          is what the balance loss is of.

        Raises:
          ValueError: if num_selected exceeds num_candidates, or gate_noise is of another shape.
        """
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        noise_rng = tie_rng = None
        if train and self.has_rng("gating"):
            noise_rng, tie_rng = jax.random.split(self.make_rng("gating"))
        noise = self._noise(b, x.dtype, train, gate_noise, noise_rng)

        logits = Gate(
            self.num_candidates,
            self.gate_widths,
            self.gate_options.order or self.order,
            self.num_iters,
            self.gate_options.noise,
            self.gate_options.init,
            self.norm,
            self.dtype,
            name="gate",
        )(x, train=train, noise=noise)
        indices = select_top_k(logits, self.num_selected, tie_rng, self.axis_name)
        weights = selection_weights(logits, indices, self.gate_options.gradient, self.gate_options.softmax)
        importance = weights if self.gate_options.balance_on == "weights" else jax.nn.softmax(logits, axis=-1)

        pooled = self._run(x, indices)
        selected = jnp.take_along_axis(weights, indices, axis=-1)
        fused = jnp.einsum("bk,bkf->bf", selected, pooled, precision=_HIGHEST)
        balance = balance_loss(importance, self.axis_name, self.gate_options.balance_ddof)
        return fused, {"balance_loss": balance, "gate_weights": weights, "importance": importance}

    def _run(self, x: Array, indices: Array) -> Array:
        """The pooled vectors [b, k, f] of the selected candidates."""
        return apply_candidates(x, self._kernels(x), indices, self._pool, self.dispatch)

    def _noise(self, b, dtype, train, given, rng) -> Array | None:
        shape = noise_shape(self.gate_options.noise, b, self.num_candidates)
        if given is not None:
            if given.shape != shape:
                raise ValueError(f"gate_noise must have shape {shape}, got {given.shape}")
            return given
        if not train or self.is_initializing() or self.gate_options.noise == "none":
            return None
        if rng is None:
            raise ValueError(
                "training draws the gate's noise: pass rngs={'gating': key} (and 'dropout') to apply, or gate_noise"
            )

        def draw(rng, shape):
            return jax.random.normal(rng, shape, jnp.promote_types(dtype, jnp.float32))

        return draw_rows(draw, rng, shape, self.axis_name)
