"""The gate: from an image's features to the logits of the candidates."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.layers import BatchNorm, ModuleFactory, he_normal
from gmsop_jax.ops import average_pool, second_order_pool
from gmsop_jax.ops.top_k import Gradient, Softmax

Noise = Literal["image", "candidate", "fixed", "none"]
Init = Literal["constant", "random"]
_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class GateOptions:
    """How a gate chooses; the defaults are GM-SOP's, but for the straight-through gradient.

    f are the pooled features, h the logits, γ draws from N(0, 1) in training and 0 at test time.

    Attributes:
      noise: what is added to W_gᵀf.
        `image`: γ · softplus(W_nᵀf), one γ an image (GM-SOP, eq. 3);
        `candidate`: γᵢ · softplus(W_nᵀf)ᵢ, one γ a candidate (Shazeer et al. 2017, eq. 4);
        `fixed`: γᵢ/n (V-MoE, section 2.1);
        `none`.
      softmax: `selected` normalises over the selected logits, `all` over all n (V-MoE).
      gradient: `straight_through`, or the authors' `masked`; both as in `ops.selection_weights`.
      order: 1 pools the gate's features by their average, 2 by their covariance; 0 as the candidates.
      init: of W_g and W_n. `constant`: 1/F, all logits tie and the candidates are first drawn at random;
        `random`: N(0, 1/F).
      balance_on: what the balance loss is of: the `weights` (GM-SOP, eq. 6) or the `softmax` over all n
        (V-MoE's importance loss).
      balance_ddof: its variance is over n − ddof, 1 or 0.
    """

    noise: Noise = "image"
    softmax: Softmax = "selected"
    gradient: Gradient = "straight_through"
    order: int = 0
    init: Init = "constant"
    balance_on: Literal["weights", "softmax"] = "weights"
    balance_ddof: int = 1


def pool(x: Float[Array, "*b p c"], order: int, num_iters: int) -> Float[Array, "*b f"]:
    """Average pooling (order 1) or square-root-normalised covariance pooling (order 2).

    Raises:
      ValueError: for another order.
    """
    if order == 1:
        return average_pool(x)
    if order == 2:
        return second_order_pool(x, num_iters)
    raise ValueError(f"order must be 1 (average) or 2 (covariance), got {order}")


class Gate(nn.Module):
    """Noisy gate on pooled features: h = W_gᵀf + noise, as `GateOptions.noise` says.

    f comes from a trunk of 1×1 convolutions, each with batch norm and ReLU, and pooling. W_g and W_n have
    no bias. At the constant start all logits tie (`ops.select_top_k` then draws the candidates), and while
    W_n's columns are equal, the noise of an image moves all its logits alike and changes no weight.

    Attributes:
      num_candidates: n, candidates to choose from.
      widths: of the trunk's convolutions.
      order: of the pooling, 1 or 2.
      num_iters: Newton–Schulz steps of second-order pooling.
      noise: as in `GateOptions`.
      kernel_init: of W_g and W_n, `GateOptions.init`.
      norm: makes the trunk's batch norms.
      dtype: as in `ResNet`; pooling and logits are never below float32.
    """

    num_candidates: int
    widths: Sequence[int] = (256, 128)
    order: int = 2
    num_iters: int = 3
    noise: Noise = "image"
    kernel_init: Init = "constant"
    norm: ModuleFactory = BatchNorm
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p c"], *, train: bool, noise: Float[Array, "b ..."] | None = None
    ) -> Float[Array, "b n"]:
        """Logits of each image; `noise` is γ, of the shape `noise_shape` gives, or None for γ = 0."""
        for i, width in enumerate(self.widths, 1):
            name = f"conv{i}"
            x = nn.Dense(width, False, dtype=self.dtype, kernel_init=he_normal, name=name)(x)
            x = jax.nn.relu(self.norm(dtype=self.dtype, name=f"{name}_bn")(x, train=train))
        features = pool(x, self.order, self.num_iters)
        logits = jnp.matmul(features, self._kernel("kernel", features.shape[-1]), precision=_HIGHEST)
        scale = self._noise_scale(features)
        if noise is None or scale is None:
            return logits
        return logits + noise.reshape(noise.shape[0], -1) * scale

    def _noise_scale(self, features: Array) -> Array | None:
        if self.noise == "none":
            return None
        if self.noise == "fixed":
            return jnp.full((1, self.num_candidates), 1 / self.num_candidates, features.dtype)
        kernel = self._kernel("noise_kernel", features.shape[-1])
        return jax.nn.softplus(jnp.matmul(features, kernel, precision=_HIGHEST))

    def _kernel(self, name: str, width: int) -> Array:
        inits = {
            "constant": nn.initializers.constant(1 / width),
            "random": nn.initializers.normal(width**-0.5),
        }
        return self.param(name, inits[self.kernel_init], (width, self.num_candidates))


def noise_shape(noise: Noise, batch: int, num_candidates: int) -> tuple[int, ...]:
    """Shape of γ: [b], or [b, n] where each candidate has its own.

    Raises:
      ValueError: if `noise` is unknown.
    """
    if noise not in ("image", "candidate", "fixed", "none"):
        raise ValueError(f"noise must be 'image', 'candidate', 'fixed' or 'none', got {noise!r}")
    return (batch, num_candidates) if noise in ("candidate", "fixed") else (batch,)
