"""The layers of the heads as functions of their parameters, which all module systems share."""

import functools
import numbers

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.covariance import clear_masked, position_weights
from gmsop_jax.ops.random import draw_rows


def flatten_positions(
    x: Shaped[AnyArray, "b *p c"], where: Shaped[AnyArray, "b *p"] | None = None
) -> tuple[Shaped[Array, "b p c"], Float[Array, "b p"] | None]:
    """Flattens a feature map [b, h, w, c] or tokens [b, l, c] to p positions, with their weights.

    Args:
      x: features. With a mask, they are set to 0 at positions of weight 0.
      where: a mask or weights of the positions, [b, h, w] or [b, l]; see `covariance_pool`.

    Returns: (features [b, p, c], weights [b, p], or None without a mask).

    Raises:
      ValueError: if x has neither three nor four axes, or `where` does not have one entry for each position.
    """
    x = jnp.asarray(x)
    if x.ndim not in (3, 4):
        raise ValueError(f"a head needs a feature map [b, h, w, c] or tokens [b, l, c], got shape {x.shape}")
    b, c = x.shape[0], x.shape[-1]
    if where is None:
        return x.reshape(b, -1, c), None
    weights = position_weights(x, where)
    return clear_masked(x, weights).reshape(b, -1, c), weights.reshape(b, -1)


def nonempty_images(where: Shaped[AnyArray, "b *p"] | None) -> Shaped[Array, " b"] | None:
    """Whether each image has a position of non-zero weight; None without a mask."""
    if where is None:
        return None
    where = jnp.asarray(where)
    return jnp.any(where != 0, axis=tuple(range(1, where.ndim)))


def batch_norm(
    x: Float[AnyArray, "*b c"],
    scale: Float[AnyArray, " c"],
    bias: Float[AnyArray, " c"],
    running_mean: Float[AnyArray, " c"],
    running_sigma: Float[AnyArray, " c"],
    *,
    train: bool,
    running_rate: float = 0.3,
    epsilon: float = 1e-5,
    where: Shaped[AnyArray, "*b"] | None = None,
    axis_name: str | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "*b c"], Float[Array, " c"], Float[Array, " c"]]:
    """Batch normalisation over all axes but the last.

    y = scale · (x − μ)/σ + bias,  σ = √(var + ε) with the biased variance

    In training, μ and σ are those of the batch. Otherwise they are the running averages, and ε is not added again.

    Args:
      x: features.
      scale, bias: learned parameters.
      running_mean, running_sigma: running averages of μ and of σ itself, not of the variance.
      train: whether to use the statistics of the batch and to update the running averages.
      running_rate: weight of the batch in the running averages: r ← (1 − rate) · r + rate · batch.
      epsilon: ε.
      where: a mask, or weights of the rows in the batch statistics; see `covariance_pool`. If all are 0, the running
        averages do not change.
      axis_name: pmap or shard_map axis over which the batch is split, to use the statistics of the whole batch.
      dtype: dtype of y; None means that of x and the parameters. Statistics are computed in at least float32.

    Returns: (y, running_mean, running_sigma); the running averages are updated in training.
    """
    x, scale, bias = jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias)
    running_mean, running_sigma = jnp.asarray(running_mean), jnp.asarray(running_sigma)
    dtype = dtype or jnp.result_type(x, scale)
    x = x.astype(jnp.promote_types(jnp.result_type(x, scale), jnp.float32))
    mean, sigma = running_mean, running_sigma
    if train:
        weights = None if where is None else position_weights(x, where)
        x = x if weights is None else clear_masked(x, weights)
        # Moments of x − shift, because E[x²] − E[x]² of x itself cancels where |μ| is much larger than σ.
        shift = _shift(x, weights, axis_name)
        x = x - shift
        mean, square = _moments(x, weights, axis_name)
        sigma = jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0) + epsilon)
        rate = running_rate if weights is None else jnp.where(_nonempty(weights, axis_name), running_rate, 0.0)
        running_mean = _update(running_mean, shift + mean, rate)
        running_sigma = _update(running_sigma, sigma, rate)
    y = ((x - mean) * (scale / sigma) + bias).astype(dtype)
    return y, running_mean, running_sigma


def _shift(x: Array, weights: Array | None, axis_name: str | None) -> Array:
    """For vectors or with weights, μ itself; for maps, the mean of the first of b images, within √b · σ of μ."""
    if weights is not None or x.ndim == 2:
        return jax.lax.stop_gradient(_moments(x, weights, axis_name)[0])
    shift = jax.lax.stop_gradient(jnp.mean(x[:1], tuple(range(x.ndim - 1))))
    return shift if axis_name is None else jax.lax.pmean(shift, axis_name)


def _moments(x: Array, weights: Array | None, axis_name: str | None) -> tuple[Array, Array]:
    """E[x] and E[x²] over all axes but the last, and over devices."""
    axes = tuple(range(x.ndim - 1))
    if weights is None:
        moments = jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)
        return moments if axis_name is None else jax.lax.pmean(moments, axis_name)
    sums = jnp.sum(weights), jnp.sum(weights[..., None] * x, axes), jnp.sum(weights[..., None] * jnp.square(x), axes)
    total, first, second = sums if axis_name is None else jax.lax.psum(sums, axis_name)
    total = jnp.where(total == 0, 1, total)
    return first / total, second / total


def _nonempty(weights: Array, axis_name: str | None) -> Array:
    total = jnp.sum(weights)
    return (total if axis_name is None else jax.lax.psum(total, axis_name)) != 0


def _update(running: Array, batch: Array, rate: float | Array) -> Array:
    return (running + rate * (batch - running)).astype(running.dtype)


def dropout(x: Float[AnyArray, "b *f"], rate: float, key: Array, axis_name: str | None = None) -> Float[Array, "b *f"]:
    """Sets each element to 0 with probability `rate` and divides the others by 1 − rate.

    Args:
      x: the first axis is the batch.
      rate: at least 0 and below 1. A traced rate is not checked.
      key: PRNG key, the same on every device.
      axis_name: pmap or shard_map axis over which the batch is split. The mask is then the same as on a single device
        with the whole batch.

    Raises:
      ValueError: if the rate is a number outside [0, 1).
    """
    if isinstance(rate, numbers.Real) and not 0 <= rate < 1:
        raise ValueError(f"the rate of dropout must be a number in [0, 1), got {rate!r}")
    bernoulli = functools.partial(jax.random.bernoulli, p=1.0 - rate)
    kept = draw_rows(lambda key, shape: bernoulli(key, shape=shape), key, x.shape, axis_name)
    return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))


def linear_logits(
    x: Float[AnyArray, "b f"],
    kernel: Float[AnyArray, "f n"],
    bias: Float[AnyArray, " n"],
    dtype: DTypeLike | None = None,
) -> Float[Array, "b n"]:
    """Logits xᵀW + b of a linear classifier, float32 or float64.

    In half precision, the products are accumulated in float32 and the logits stay in float32, because in bfloat16 the
    largest logits of many images would be equal.

    Args:
      x: features.
      kernel: W.
      bias: b.
      dtype: dtype of the product's operands; None means that of x and the parameters.
    """
    dtype = dtype or jnp.result_type(x, kernel)
    logits_dtype = jnp.promote_types(dtype, jnp.float32)
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    return jnp.matmul(x, kernel, preferred_element_type=logits_dtype) + jnp.asarray(bias, logits_dtype)
