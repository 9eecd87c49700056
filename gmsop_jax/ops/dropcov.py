"""Channel attention and adaptive channel dropout of DropCov (Wang et al., NeurIPS 2022), on covariances."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.random import draw_rows


def channel_attention(mean: Float[AnyArray, "b c"], kernel: Float[AnyArray, " 3"]) -> Float[Array, "b c"]:
    """Attention over channels from the mean features: softmax(conv1d(μ)), with zero padding and without bias.

    Raises:
      ValueError: if the kernel does not have 3 entries.
    """
    mean, kernel = jnp.asarray(mean), jnp.asarray(kernel)
    if kernel.shape != (3,):
        raise ValueError(f"channel_attention needs a kernel of shape (3,), got {kernel.shape}")
    c = mean.shape[-1]
    padded = jnp.pad(mean, ((0, 0), (1, 1)))
    return jax.nn.softmax(sum(kernel[i] * padded[:, i : i + c] for i in range(3)), axis=-1)


def adaptive_channel_dropout(
    sigma: Float[AnyArray, "b c c"],
    attention: Float[AnyArray, "b c"],
    key: Array,
    *,
    where: Bool[AnyArray, " b"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b c c"]:
    """Applies channel attention and drops channels, at a rate that depends on their correlations.

    Σ' = (1 + a)(1 + a)ᵀ ∘ Σ,  ρ = cos(a, Σ'1),  rate = clip(1 − 10/log₂c · mean ρ, 0, 1),  result mmᵀ ∘ Σ'

    m is 0 for a dropped channel and 1/(1 − rate) otherwise. The authors scale the features, x ← x·a + x and x ← x·m,
    and then compute their covariance. The result is the same, because scaling a channel scales its row and column of Σ.
    All images of the batch share one rate, and no gradient flows through it.

    Args:
      sigma: covariances of the features.
      attention: a, from `channel_attention`.
      key: PRNG key, the same on every device.
      where: the images to include in the mean of ρ; None includes all.
      axis_name: pmap or shard_map axis over which the batch is split.

    Returns: the scaled covariances, with zeros in the rows and columns of dropped channels.
    """
    attention = jnp.asarray(attention)
    sigma = _scale_channels(jnp.asarray(sigma), 1 + attention)
    rate = channel_dropout_rate(sigma, attention, where=where, axis_name=axis_name)
    uniform = functools.partial(jax.random.uniform, dtype=rate.dtype)
    draw = draw_rows(lambda key, shape: uniform(key, shape), key, attention.shape, axis_name)
    return _scale_channels(sigma, jnp.where(draw >= rate, 1 / jnp.where(rate < 1, 1 - rate, 1), 0))


def channel_dropout_rate(
    sigma: Float[AnyArray, "b c c"],
    attention: Float[AnyArray, "b c"],
    *,
    where: Bool[AnyArray, " b"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """The rate of adaptive channel dropout: clip(1 − 10/log₂c · mean cos(a, Σ1), 0, 1), without gradient."""
    sigma, attention = jax.lax.stop_gradient((jnp.asarray(sigma), jnp.asarray(attention)))
    rows = jnp.sum(sigma, axis=-1)
    norms = jnp.sqrt(jnp.sum(attention**2, axis=-1) * jnp.sum(rows**2, axis=-1))
    similarity = jnp.sum(attention * rows, axis=-1) / jnp.where(norms == 0, 1, norms)
    weights = jnp.ones_like(similarity) if where is None else jnp.asarray(where).astype(similarity.dtype)
    sums = jnp.sum(weights * similarity), jnp.sum(weights)
    total, count = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    mean = total / jnp.where(count == 0, 1, count)
    factor = 10 / math.log2(max(sigma.shape[-1], 2))
    return jnp.clip(1 - factor * mean, 0, 1)


def _scale_channels(sigma: Array, factors: Array) -> Array:
    return factors[:, :, None] * factors[:, None, :] * sigma
