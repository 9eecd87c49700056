"""Gate and mixtures of pooling candidates as NNX modules."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from gmsop_jax import models
from gmsop_jax.models.gate import shared_fields
from gmsop_jax.models.mixture import candidate_init
from gmsop_jax.nnx.layers import ModuleWithMode, ReluConvolutions
from gmsop_jax.ops import (
    GateOutput,
    apply_all_candidates,
    apply_candidates,
    draw_gate_noise,
    flatten_positions,
    mix_candidates,
)
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.covariance import Where


class Gate(ReluConvolutions):
    """Noisy top-K gate on pooled features (GM-SOP, eq. 3–6), with the fields of `gmsop_jax.models.Gate`.

    `rngs` provides the streams `params` for the initial values, and `gating` for the draws in training.
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **fields: Any):
        config = self.config = models.Gate(**fields)
        width = self._add_convolutions("conv", in_features, config.gate_widths, batch_norm=True, rngs=rngs)
        order = config.gate_order or 2
        pooled = width if order == 1 else width * (width + 1) // 2
        init, shape = config.kernel_init(pooled), (pooled, config.num_candidates)
        self.kernel = nnx.Param(init(rngs.params(), shape))
        if config.gate_noise in ("image", "candidate"):
            self.noise_kernel = nnx.Param(init(rngs.params(), shape))
        self.rngs = rngs["gating"].fork()
        self.deterministic = True

    def __call__(
        self,
        x: Float[AnyArray, "b p c"],
        train: bool | None = None,
        gate_noise: Float[AnyArray, "b ..."] | None = None,
        where: Where | None = None,
    ) -> GateOutput:
        """Selects candidates for each image; the arguments are those of `gmsop_jax.models.Gate`.

        `train=None` means the module's mode.
        """
        config, train = self.config, self._is_training(train)
        noise_key, tie_key = jax.random.split(self.rngs()) if train else (None, None)
        x = self._apply_convolutions("conv", x, config.gate_widths, train, where)
        features = config.pool_features(x, config.gate_order or 2, where)
        noise = draw_gate_noise(
            config.gate_noise,
            (features.shape[0], config.num_candidates),
            features.dtype,
            given=gate_noise,
            key=noise_key,
            axis_name=config.axis_name,
        )
        noise_kernel = self.noise_kernel[...] if hasattr(self, "noise_kernel") else None
        return config.decide(features, self.kernel[...], noise_kernel, noise, where, tie_key)


class _Candidates(nnx.Module):
    """The candidates and their weights, which all images share."""

    config: Any

    def _add_kernels(self, in_features: int, rngs: nnx.Rngs) -> None:
        for i, width in enumerate(self.config.candidate_widths, 1):
            shape = (self.config.num_candidates, in_features, width)
            setattr(self, f"candidates{i}", nnx.Param(candidate_init(rngs.params(), shape)))
            in_features = width

    def _kernels(self, x: Array) -> list[Array]:
        kernels = [getattr(self, f"candidates{i}")[...] for i in range(1, len(self.config.candidate_widths) + 1)]
        dtype = self.config.dtype or jnp.result_type(x, *kernels)
        return [kernel.astype(dtype) for kernel in kernels]

    def _pool(self, x: Array, where: Array | None = None) -> Array:
        return self.config.pool_features(x, self.config.order, where)


class Mixture(_Candidates):
    """Pools features by all candidates, without a gate, with the fields of `gmsop_jax.models.Mixture`."""

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **fields: Any):
        self.config = models.Mixture(**fields)
        self._add_kernels(in_features, rngs)

    def __call__(
        self, x: Float[AnyArray, "b *p c"], where: Shaped[AnyArray, "b *p"] | None = None
    ) -> Float[Array, "b f"]:
        """Pools a feature map [b, h, w, c] or tokens [b, l, c]; `where` is a mask or weights of the positions."""
        x, where = flatten_positions(x, where)
        pooled = apply_all_candidates(x, self._kernels(x), self._pool, where=where)
        return jnp.mean(pooled, axis=1) if self.config.combine == "average" else pooled.reshape(x.shape[0], -1)


class GatedMixture(_Candidates, ModuleWithMode):
    """Pools features by the weighted sum of the candidates that the gate selects.

    The fields are those of `gmsop_jax.models.GatedMixture`, and `rngs` provides the same streams as for `Gate`.
    """

    def __init__(self, in_features: int, *, rngs: nnx.Rngs, **fields: Any):
        config = self.config = models.GatedMixture(**fields)
        gate_fields = {**shared_fields(config, models.Gate), "gate_order": config.gate_order or config.order}
        self.gate = Gate(in_features, rngs=rngs, **gate_fields)
        self._add_kernels(in_features, rngs)
        self.deterministic = True

    def __call__(
        self,
        x: Float[AnyArray, "b *p c"],
        train: bool | None = None,
        gate_noise: Float[AnyArray, "b ..."] | None = None,
        where: Shaped[AnyArray, "b *p"] | None = None,
    ) -> tuple[Float[Array, "b f"], Mapping[str, Array]]:
        """Pools a feature map or tokens; the arguments and results are those of `gmsop_jax.models.GatedMixture`.

        `train=None` means the module's mode.
        """
        x, where = flatten_positions(x, where)
        gate = self.gate(x, self._is_training(train), gate_noise, where)
        pooled = apply_candidates(x, self._kernels(x), gate.indices, self._pool, self.config.dispatch, where=where)
        aux = {"balance_loss": gate.balance_loss, "gate_weights": gate.weights, "importance": gate.importance}
        return mix_candidates(pooled, gate.weights, gate.indices), aux
