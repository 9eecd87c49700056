"""The gate as a Flax module."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gmsop_jax.models.checks import CheckedModule
from gmsop_jax.models.layers import BatchNorm, ModuleFactory, relu_convolution
from gmsop_jax.ops import GateOutput, apply_gate, draw_gate_noise
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.coefficients import Coefficients
from gmsop_jax.ops.covariance import Where, pool_features
from gmsop_jax.ops.gate import BalanceOn, Gradient, Noise, Softmax
from gmsop_jax.ops.layers import nonempty_images

Init = Literal["constant", "random"]


class PoolingFields(CheckedModule, kw_only=True):
    """The settings of second-order pooling, which the gate and the mixtures share; see `ops.second_order_pool`.

    Attributes:
      num_iters: number of Newton–Schulz steps.
      coefficients: coefficients of these steps, `newton_schulz` or `minimax`.
      pool_precision: precision of the matrix products in the covariance and its square root; the default, None,
        depends on the device.
    """

    num_iters: int = 3
    coefficients: Coefficients = "newton_schulz"
    pool_precision: PrecisionLike = None

    @nn.nowrap
    def pool_features(self, x: Float[AnyArray, "*b p c"], order: int, where: Where | None) -> Float[Array, "*b f"]:
        """Average pooling (order 1) or square-root-normalised covariance pooling (order 2) with these settings."""
        return pool_features(
            x, order, self.num_iters, where=where, coefficients=self.coefficients, precision=self.pool_precision
        )


class GateFields(CheckedModule, kw_only=True):
    """The settings of a gate, which `Gate`, `GatedMixture` and `GatedMixtureHead` share.

    Their names and defaults are those of the configuration's section `model`.
    """

    num_selected: int = 8
    gate_widths: Sequence[int] = (256, 128)
    gate_order: int = 0
    gate_noise: Noise = "image"
    gate_softmax: Softmax = "selected"
    gate_gradient: Gradient = "straight_through"
    gate_init: Init = "constant"
    balance_on: BalanceOn = "weights"
    balance_ddof: int = 1


def shared_fields(module: nn.Module, cls: type[nn.Module]) -> dict[str, Any]:
    """The fields of `module` that a submodule of class `cls` has too."""
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    return {name: getattr(module, name) for name in names if hasattr(module, name)}


class Gate(GateFields, PoolingFields):
    """Noisy top-K gate on pooled features (GM-SOP, eq. 3–6).

    h = W_gᵀf + noise,  w = softmax(h restricted to TopK(h)),  L = balance loss of w

    f is the pooled output of a trunk of 1×1 convolutions, each with batch norm and ReLU. W_g and W_n have no
    bias. With the constant initialisation, all logits are equal at first, so `ops.select_top_k` draws the
    candidates at random. As long as the columns of W_n are equal, `image` noise shifts all logits of an image
    by the same amount and changes no weight.

    The defaults are those of GM-SOP, except that the gradient is straight-through.

    Attributes:
      num_candidates: n, the number of candidates to choose from.
      num_selected: k, the number of candidates that each image selects.
      gate_widths: widths of the trunk's convolutions.
      gate_order: 1 pools the trunk's features by their average, 2 by their covariance. 0 means the order
        of the candidates if the gate is part of a mixture, and 2 otherwise.
      gate_noise: the noise that is added in training; γ ~ N(0, 1).
        `image`: γ · softplus(W_nᵀf), with one γ per image (GM-SOP, eq. 3);
        `candidate`: γᵢ · softplus(W_nᵀf)ᵢ, with one γ per image and candidate (Shazeer et al. 2017, eq. 4);
        `fixed`: γᵢ/n (V-MoE, section 2.1);
        `none`: no noise.
      gate_softmax: `selected` normalises the weights over the selected logits, `all` over all n (V-MoE).
      gate_gradient: `straight_through`, or the authors' `masked`; see `ops.selection_weights`.
      gate_init: initial value of W_g and W_n. `constant`: 1/F for F features; `random`: N(0, 1/F).
      balance_on: the importance that the balance loss is computed from. `weights`: the gate's weights
        (GM-SOP, eq. 6); `softmax`: softmax(W_gᵀf) over all n, without the noise (V-MoE's importance loss,
        which divides the variance by n: set balance_ddof=0).
      balance_ddof: the variance in the balance loss is divided by n − ddof; 0 or 1.
      num_iters, coefficients, pool_precision: see `PoolingFields`.
      axis_name: pmap or shard_map axis over which the batch is split. The balance loss and the random
        numbers are then those of the whole batch.
      norm: creates the trunk's batch norms.
      dtype: dtype of the trunk; pooling, logits and weights are at least float32.
    """

    num_candidates: int
    axis_name: str | None = None
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[AnyArray, "b p c"],
        train: bool = False,
        gate_noise: Float[AnyArray, "b ..."] | None = None,
        where: Where | None = None,
    ) -> GateOutput:
        """Selects candidates for each image.

        Args:
          x: features.
          train: whether to draw noise and to normalise by the statistics of the batch. The RNG stream is `gating`,
            or `params` if there is no such stream.
          gate_noise: γ, used instead of the draw: [b], or [b, n] if each candidate has its own.
          where: a mask or weights of the positions; see `ops.covariance_pool`. The balance loss ignores images whose
            positions all have weight 0.

        Returns: the selection, its weights and the balance loss.

        Raises:
          ValueError: if `num_selected` exceeds `num_candidates`, if `gate_noise` has the wrong shape, or if training
            has to draw noise without an RNG stream.
        """
        noise_key = tie_key = None
        if train and (self.has_rng("gating") or self.has_rng("params")):
            noise_key, tie_key = jax.random.split(self.make_rng("gating"))
        for i, width in enumerate(self.gate_widths, 1):
            x = relu_convolution(self, x, width, f"conv{i}", train=train, where=where, batch_norm=True)
        features = self.pool_features(x, self.gate_order or 2, where)
        learned = self.gate_noise in ("image", "candidate")
        kernel = self._kernel("kernel", features.shape[-1])
        noise_kernel = self._kernel("noise_kernel", features.shape[-1]) if learned else None
        noise = self._noise(features, train, gate_noise, noise_key)
        return self.decide(features, kernel, noise_kernel, noise, where, tie_key)

    @nn.nowrap
    def decide(
        self, features: Array, kernel: Array, noise_kernel: Array | None, noise: Any, where: Any, tie_key: Any
    ) -> GateOutput:
        """Calls `ops.apply_gate` with the settings of this gate."""
        return apply_gate(
            features,
            kernel,
            noise_kernel,
            noise,
            num_selected=self.num_selected,
            gradient=self.gate_gradient,
            softmax=self.gate_softmax,
            balance_on=self.balance_on,
            balance_ddof=self.balance_ddof,
            where=nonempty_images(where),
            tie_key=tie_key,
            axis_name=self.axis_name,
        )

    def _noise(self, features: Array, train: bool, given: AnyArray | None, key: Array | None) -> Array | None:
        shape = (features.shape[0], self.num_candidates)
        noise = draw_gate_noise(self.gate_noise, shape, features.dtype, given=given, key=key, axis_name=self.axis_name)
        if noise is None and train and self.gate_noise != "none":
            raise ValueError(
                "training draws noise for the gate: pass rngs={'gating': key} (and 'dropout') to apply, or gate_noise"
            )
        return noise

    @nn.nowrap
    def kernel_init(self, width: int) -> nn.initializers.Initializer:
        """The initializer of W_g and W_n for `width` pooled features."""
        if self.gate_init == "constant":
            return nn.initializers.constant(1 / width)
        return nn.initializers.normal(width**-0.5)

    def _kernel(self, name: str, width: int) -> Array:
        return jnp.asarray(self.param(name, self.kernel_init(width), (width, self.num_candidates)))
