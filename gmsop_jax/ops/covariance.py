"""First-order and second-order pooling of features over positions.

Every pooling function takes `where`, which selects or weights the positions, for example to mask padding tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import Array, Bool, Float, Int

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.coefficients import Coefficients, iteration_steps
from gmsop_jax.ops.matrix_sqrt import newton_schulz_sqrt, root_vector
from gmsop_jax.ops.precision import matrix_precision

Where = Bool[AnyArray, "*b p"] | Int[AnyArray, "*b p"] | Float[AnyArray, "*b p"]


def average_pool(x: Float[AnyArray, "*b p c"], *, where: Where | None = None) -> Float[Array, "*b c"]:
    """Global average pooling.

    μ = (1/p) Σ xₚ,  or  μ = Σ wₚ xₚ / Σ wₚ  with weights w

    Args:
      x: features of p positions; for a feature map [b, h, w, c], see `flatten_positions`. Half precision is converted
        to float32.
      where: the positions to include, or their weights; see `covariance_pool`.

    Returns: the means over positions, float32 or float64. If all weights are 0, the mean is zero, with zero gradient.

    Raises:
      ValueError: if x has no position or fewer than two axes, or if `where` does not have one entry for each position.
      TypeError: if `where` is complex.

    Example:
      >>> average_pool(jnp.array([[1.0], [3.0], [jnp.nan]]), where=jnp.array([True, True, False]))
      Array([2.], dtype=float32)
    """
    x = _at_least_float32(x)
    _check_positions(x, "average_pool")
    if where is None:
        return jnp.mean(x, axis=-2)
    weights = position_weights(x, where)
    return _mean(clear_masked(x, weights), weights)[..., 0, :]


def covariance_pool(
    x: Float[AnyArray, "*b p c"],
    *,
    where: Where | None = None,
    centered: bool = True,
    forward_mode: bool = False,
    precision: PrecisionLike = None,
) -> Float[Array, "*b c c"]:
    """Covariance of the features over positions.

    Σ = (1/p) Σ (xₚ − μ)(xₚ − μ)ᵀ   (iSQRT-COV, eq. 1: divided by p, not p − 1)

    With weights w, Σ = Σ wₚ (xₚ − μ)(xₚ − μ)ᵀ / Σ wₚ with the weighted mean μ.

    Args:
      x: features of p positions; for a feature map [b, h, w, c], see `flatten_positions`. Half precision is converted
        to float32 before the mean is subtracted.
      where: the positions to include (bool), or non-negative weights, of which only the ratios matter. The result
        equals that of the input without the positions of weight 0, whose values may be NaN or infinite. Gradients
        flow into x and into weights, and are 0 at positions of weight 0. A weight that is negative, NaN or infinite
        makes the result NaN.
      centered: whether the mean is subtracted. If not, the result is the second moment (1/p) Σ xₚ xₚᵀ.
      forward_mode: if True, `jax.jvp`, `jax.jacfwd` and `jax.hessian` are supported too, and the backward pass takes
        two matrix products instead of one. Otherwise, they raise JAX's error "can't apply forward-mode autodiff
        (jvp) to a custom_vjp function".
      precision: precision of the products of features; the default depends on the device, see `ops.matrix_precision`.
        The mean always has the highest one.

    Returns: symmetric positive semi-definite matrices, float32 or float64. If all weights are 0, the matrix is zero,
      with zero gradient.

    Raises:
      ValueError: if x has no position or fewer than two axes, if `where` does not have one entry for each position,
        or if the precision does not accumulate in the dtype of the matrices.
      TypeError: if x is not floating-point, or `where` is complex.

    Example:
      >>> x = jnp.array([[1.0, 0.0], [3.0, 4.0], [9.0, 9.0]])
      >>> covariance_pool(x, where=jnp.array([True, True, False]))
      Array([[1., 2.],
             [2., 4.]], dtype=float32)
    """
    x = jnp.asarray(x)
    _check_positions(x, "covariance_pool")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"covariance_pool needs floating features, got {x.dtype}; convert with x.astype(jnp.float32)")
    precision = matrix_precision(precision, jnp.promote_types(x.dtype, jnp.float32))
    covariance = _weighted_covariance if forward_mode else _covariance
    return covariance(x, None if where is None else position_weights(x, where), centered, precision)


def second_order_pool(
    x: Float[AnyArray, "*b p c"],
    num_iters: int = 3,
    *,
    where: Where | None = None,
    centered: bool = True,
    coefficients: Coefficients = "newton_schulz",
    forward_mode: bool = False,
    precision: PrecisionLike = None,
) -> Float[Array, "*b t"]:
    """Square-root-normalised covariance pooling (SR-SOP, iSQRT-COV): t = c(c + 1)/2 entries.

    triangle_vector(newton_schulz_sqrt(covariance_pool(x), n))   (GM-SOP, section 2.2)

    Args:
      x: features of p positions; see `covariance_pool`.
      num_iters: number n of Newton–Schulz iterations.
      where, centered: see `covariance_pool`.
      coefficients: see `newton_schulz_sqrt`.
      forward_mode: if True, `jax.jvp`, `jax.jacfwd` and `jax.hessian` are supported too, but the backward pass stores
        every iterate. Otherwise, they raise JAX's error "can't apply forward-mode autodiff (jvp) to a custom_vjp
        function".
      precision: precision of the matrix products; the default depends on the device, see `ops.matrix_precision`.

    Returns: vectors in the order of `numpy.triu_indices`, float32 or float64.

    Raises:
      ValueError, TypeError: see `covariance_pool` and `newton_schulz_sqrt`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 64, 8))
      >>> second_order_pool(x).shape
      (2, 36)
    """
    sigma = covariance_pool(x, where=where, centered=centered, forward_mode=forward_mode, precision=precision)
    if forward_mode:
        root = newton_schulz_sqrt(sigma, num_iters, coefficients=coefficients, forward_mode=True, precision=precision)
        return root[(..., *np.triu_indices(root.shape[-1]))]
    return root_vector(sigma, iteration_steps(num_iters, coefficients), matrix_precision(precision, sigma.dtype))


def pool_features(
    x: Float[AnyArray, "*b p c"],
    order: int,
    num_iters: int = 3,
    *,
    where: Where | None = None,
    coefficients: Coefficients = "newton_schulz",
    precision: PrecisionLike = None,
) -> Float[Array, "*b f"]:
    """Average pooling (order 1) or square-root-normalised covariance pooling (order 2).

    The other arguments are those of `second_order_pool`.

    Raises:
      ValueError: if the order is neither 1 nor 2.
    """
    if order == 1:
        return average_pool(x, where=where)
    if order == 2:
        return second_order_pool(x, num_iters, where=where, coefficients=coefficients, precision=precision)
    raise ValueError(f"order must be 1 (average) or 2 (covariance), got {order}")


def position_weights(x: Float[AnyArray, "*b p c"], where: Where) -> Float[Array, "*b p"]:
    """Converts a mask or weights to weights in the dtype of x, or in float32 if x has half precision.

    No gradient flows into weights of 0, because the positions that they exclude may hold any values. Negative weights
    become NaN.

    Raises:
      ValueError: if `where` does not have one entry for each position.
      TypeError: if `where` is complex.
    """
    weights = jnp.asarray(where)
    if weights.shape != x.shape[:-1]:
        raise ValueError(
            f"where must have one entry for each position, shape {x.shape[:-1]} for features of shape {x.shape},"
            f" got shape {weights.shape}"
        )
    if jnp.issubdtype(weights.dtype, jnp.complexfloating):
        raise TypeError(f"where must be bool or non-negative weights, got {weights.dtype}")
    weights = weights.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.where(weights == 0, 0, jnp.where(weights < 0, jnp.nan, weights))


def clear_masked(x: Float[AnyArray, "*b p c"], weights: Float[Array, "*b p"]) -> Float[Array, "*b p c"]:
    """Sets the features at positions of weight 0 to 0, so that NaN and infinity there reach no result."""
    return jnp.where(weights[..., None] == 0, 0, x)


def _check_positions(x: Array, caller: str) -> None:
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"{caller} needs [..., p, c] with p ≥ 1 positions, got {x.shape}")


def _at_least_float32(x: AnyArray) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _mean(x: Array, weights: Array | None) -> Array:
    """Means of cleared features, [*b, 1, c].

    On CPUs, matrix products add up to 384 positions one after another, so those of weight 0 don't change the rounding.
    """
    factors = jnp.ones(x.shape[:-1], x.dtype) if weights is None else weights
    return jnp.matmul(factors[..., None, :] / _total(x, weights), x, precision=jax.lax.Precision.HIGHEST)


def _total(x: Array, weights: Array | None) -> Array | int:
    """The number of positions, or Σ wₚ as [*b, 1, 1], and 1 instead of 0."""
    if weights is None:
        return x.shape[-2]
    total = jnp.sum(weights, axis=-1)[..., None, None]
    return jnp.where(total == 0, 1, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _covariance(x: Array, weights: Array | None, centered: bool, precision: PrecisionLike) -> Any:
    return _weighted_covariance(x, weights, centered, precision)


def _weighted_covariance(x: Array, weights: Array | None, centered: bool, precision: PrecisionLike) -> Array:
    rows = _rows(x, weights, centered)
    if weights is not None:
        roots = jnp.where(weights == 0, 0, jnp.sqrt(jnp.where(weights == 0, 1, weights)))
        rows = roots[..., None] * rows  # on both sides, for a result that is exactly symmetric
    return jnp.einsum("...pc,...pd->...cd", rows, rows, precision=precision) / _total(rows, weights)


def _rows(x: Array, weights: Array | None, centered: bool) -> Array:
    """The features whose outer products are averaged: optionally centered, and 0 at positions of weight 0."""
    x = _at_least_float32(x)
    if weights is None:
        return x - _mean(x, None) if centered else x
    x = clear_masked(x, weights)
    return clear_masked(x - _mean(x, weights), weights) if centered else x


def _covariance_forward(x, weights, centered, precision):
    return _covariance(x, weights, centered, precision), (x, weights)


def _covariance_backward(centered, precision, residuals, g):
    # One product, where automatic differentiation takes two. The weighted rows sum to 0, so the mean needs no gradient.
    # The barrier makes XLA center the features again instead of storing the centered copy from the forward pass.
    (x, weights), g = jax.lax.optimization_barrier((residuals, g))
    rows = _rows(x, weights, centered)
    slopes = jnp.einsum("...pc,...cd->...pd", rows, g + jnp.swapaxes(g, -1, -2), precision=precision)
    if weights is None:
        return (slopes / x.shape[-2]).astype(x.dtype), None
    dx = weights[..., None] * slopes / _total(x, weights)
    # dΣ/dwₚ = (rowₚ rowₚᵀ − Σ)/Σw, of which <G, rowₚ rowₚᵀ> is half of <rowₚ, slopesₚ>
    along_rows = jnp.sum(rows * slopes, axis=-1, keepdims=True) / 2
    dweights = (along_rows - _mean(along_rows, weights)) / _total(x, weights)
    return dx.astype(x.dtype), dweights[..., 0]


_covariance.defvjp(_covariance_forward, _covariance_backward)
