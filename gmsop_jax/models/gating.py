"""The gate: from an image's features to the logits of the candidates."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.layers import BatchNorm, he_normal
from gmsop_jax.ops import average_pool, second_order_pool


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
    """Noisy gate on pooled features.

    h = W_gᵀf + γ · softplus(W_nᵀf)   (GM-SOP, eq. 3; after V-MoE's and Shazeer's noisy top-K)

    f comes from a trunk of 1×1 convolutions, each with batch norm and ReLU, and pooling. γ ~ N(0, 1)
    is one number per image. W_g and W_n have no bias and start at the constant 1/F, so that all
    logits tie at first (`ops.select_top_k` then draws the candidates at random). While W_n's columns are
    equal, γ moves all logits of an image alike and changes no weight.

    Attributes:
      num_candidates: n, candidates to choose from.
      widths: of the trunk's convolutions.
      order: of the pooling, 1 or 2.
      num_iters: Newton–Schulz steps of second-order pooling.
      dtype, axis_name: as in `ResNet`; pooling and logits are never below float32.
    """

    num_candidates: int
    widths: Sequence[int] = (256, 128)
    order: int = 2
    num_iters: int = 3
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b p c"], *, train: bool, noise: Float[Array, "b"] | None = None
    ) -> Float[Array, "b n"]:
        """Logits of each image; without `noise`, γ = 0."""
        for i, width in enumerate(self.widths, 1):
            name = f"conv{i}"
            x = nn.Dense(width, False, dtype=self.dtype, kernel_init=he_normal, name=name)(x)
            normalize = BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"{name}_bn")
            x = jax.nn.relu(normalize(x, train=train))
        features = pool(x, self.order, self.num_iters)
        shape = (features.shape[-1], self.num_candidates)
        constant = nn.initializers.constant(1 / shape[0])
        kernel = self.param("kernel", constant, shape)
        noise_kernel = self.param("noise_kernel", constant, shape)
        highest = jax.lax.Precision.HIGHEST
        logits = jnp.matmul(features, kernel, precision=highest)
        if noise is None:
            return logits
        scale = jax.nn.softplus(jnp.matmul(features, noise_kernel, precision=highest))
        return logits + noise[:, None] * scale
