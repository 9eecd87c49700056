"""Mixtures of pooling candidates: gated, averaged or concatenated."""

from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from gmsop_jax.models.gate import Gate, GateFields, PoolingFields, shared_fields
from gmsop_jax.models.layers import BatchNorm, ModuleFactory
from gmsop_jax.ops import apply_all_candidates, apply_candidates, flatten_positions, mix_candidates
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.dispatch import Dispatch

# N(0, 2/fan_in) for each candidate
candidate_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal", batch_axis=(0,))


class _Candidates(PoolingFields):
    """The candidates and their weights, which all images share.

    Candidate Mᵢ (called a component module in the paper, and an expert in the mixture-of-experts literature) is
    a stack of 1×1 convolutions without bias, each followed by ReLU, and then average pooling (order 1) or
    square-root-normalised covariance pooling (order 2).
    """

    num_candidates: int = 16
    candidate_widths: Sequence[int] = (256, 128)
    order: int = 2
    dtype: DTypeLike | None = None

    def _kernels(self, x: Array) -> list[Array]:
        """The candidates' weights, layer by layer [n, in, out], in the dtype of the computation."""
        c, kernels = x.shape[-1], []
        for i, width in enumerate(self.candidate_widths, 1):
            kernels.append(jnp.asarray(self.param(f"candidates{i}", candidate_init, (self.num_candidates, c, width))))
            c = width
        dtype = self.dtype or jnp.result_type(x, *kernels)
        return [kernel.astype(dtype) for kernel in kernels]

    def _pool(self, x: Array, where: Array | None = None) -> Array:
        return self.pool_features(x, self.order, where)


class Mixture(_Candidates):
    """Pools features by all candidates, without a gate.

    z = (1/n) Σᵢ Mᵢ(x)  (Ave-GAP, Ave-SOP), or the concatenation of all Mᵢ(x).

    Attributes:
      num_candidates: n, the number of candidates; each image runs through all of them.
      candidate_widths: widths of each candidate's convolutions; the last is d, the number of pooled channels.
      order: order of the candidates' pooling, 1 or 2.
      num_iters, coefficients, pool_precision: see `PoolingFields`.
      dtype: dtype of the convolutions; pooling and result are at least float32.
      combine: `average`, or `concatenate` for n times as many features.
    """

    combine: Literal["average", "concatenate"] = "average"

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "b *p c"], where: Shaped[AnyArray, "b *p"] | None = None
    ) -> Float[Array, "b f"]:
        """Pools a feature map [b, h, w, c] or tokens [b, l, c]; `where` is a mask or weights of the positions."""
        x, where = flatten_positions(x, where)
        pooled = apply_all_candidates(x, self._kernels(x), self._pool, where=where)
        return jnp.mean(pooled, axis=1) if self.combine == "average" else pooled.reshape(x.shape[0], -1)


class GatedMixture(_Candidates, GateFields):
    """Pools features by the weighted sum of the candidates that the gate selects.

    z = Σ_{i ∈ TopK} wᵢ(x) · Mᵢ(x)   (GM-SOP, eq. 2; order 1 is GM-GAP)

    Only the selected candidates are computed.

    Attributes:
      num_candidates, candidate_widths, num_iters, coefficients, pool_precision, dtype: see `Mixture`.
      order: order of the candidates' pooling, 1 or 2; also that of the gate, unless `gate_order` is set.
      num_selected, gate_widths, gate_order, gate_noise, gate_softmax, gate_gradient, gate_init,
        balance_on, balance_ddof, axis_name, norm: see `Gate`.
      dispatch: see `ops.apply_candidates`.
    """

    dispatch: Dispatch = "auto"
    axis_name: str | None = None
    norm: ModuleFactory = BatchNorm

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "b *p c"],
        train: bool = False,
        gate_noise: Float[AnyArray, "b ..."] | None = None,
        where: Shaped[AnyArray, "b *p"] | None = None,
    ) -> tuple[Float[Array, "b f"], Mapping[str, Array]]:
        """Pools a feature map or tokens.

        Args:
          x: features [b, h, w, c] or [b, l, c].
          train, gate_noise: see `Gate`.
          where: a mask or weights of the positions, [b, h, w] or [b, l]; see `ops.covariance_pool`.

        Returns: (pooled features, {`balance_loss`, `gate_weights` [b, n], `importance` [b, n]}).

        Raises:
          ValueError: see `Gate`; also if the shape of x or of `where` is wrong.
        """
        x, where = flatten_positions(x, where)
        gate_fields = {**shared_fields(self, Gate), "gate_order": self.gate_order or self.order}
        gate = Gate(**gate_fields, name="gate")(x, train, gate_noise, where)
        pooled = apply_candidates(x, self._kernels(x), gate.indices, self._pool, self.dispatch, where=where)
        aux = {"balance_loss": gate.balance_loss, "gate_weights": gate.weights, "importance": gate.importance}
        return mix_candidates(pooled, gate.weights, gate.indices), aux
