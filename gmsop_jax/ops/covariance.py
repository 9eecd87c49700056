"""Pooling of a map of features into one vector: first and second order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.ops.matrix_sqrt import newton_schulz_sqrt
from gmsop_jax.ops.triangle import triangle_vector

_product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def _at_least_float32(x: Array) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def average_pool(x: Float[Array, "*b p c"]) -> Float[Array, "*b c"]:
    """Global average pooling: μ = (1/p) Σ xₚ.

    Args:
      x: features; half precision is summed, and returned, in float32.

    Returns: means over positions.
    """
    return jnp.mean(_at_least_float32(x), axis=-2)


def covariance_pool(x: Float[Array, "*b p c"]) -> Float[Array, "*b c c"]:
    """Covariance of the features over positions.

    Σ = (1/p) Σ (xₚ − μ)(xₚ − μ)ᵀ   (iSQRT-COV, eq. 1: divided by p, not p − 1)

    Args:
      x: features of p positions; half precision is widened to float32 before it is centred.

    Returns: symmetric PSD matrices, float32 or float64.

    Raises:
      ValueError: if x has no position or fewer than two axes.
      TypeError: if x is not floating.

    Example:
      >>> covariance_pool(jnp.array([[1.0, 0.0], [3.0, 4.0]]))
      Array([[1., 2.],
             [2., 4.]], dtype=float32)
    """
    x = jnp.asarray(x)
    if x.ndim < 2 or x.shape[-2] == 0:
        raise ValueError(f"covariance_pool needs [..., p, c] with p ≥ 1 positions, got {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"covariance_pool needs floating features, got {x.dtype}")
    return _covariance(x)


@jax.custom_vjp
def _covariance(x: Array) -> Any:
    centred = _centre(x)
    return _product("...pc,...pd->...cd", centred, centred) / x.shape[-2]


def _centre(x: Array) -> Array:
    x = _at_least_float32(x)
    return x - jnp.mean(x, axis=-2, keepdims=True)


def _covariance_forward(x):
    return _covariance(x), x


def _covariance_backward(x, g):
    # one product where automatic differentiation makes two, and centred features need no centring again
    dx = _product("...pc,...cd->...pd", _centre(x), g + jnp.swapaxes(g, -1, -2)) / x.shape[-2]
    return (dx.astype(x.dtype),)


_covariance.defvjp(_covariance_forward, _covariance_backward)


def second_order_pool(x: Float[Array, "*b p c"], num_iters: int = 3) -> Float[Array, "*b t"]:
    """Square-root-normalised covariance pooling (SR-SOP, iSQRT-COV): t = c(c + 1)/2 entries.

    triangle_vector(newton_schulz_sqrt(covariance_pool(x), n))   (GM-SOP, section 2.2)

    Args:
      x: features of p positions.
      num_iters: Newton–Schulz steps n.

    Returns: vectors in the order of `numpy.triu_indices`, float32 or float64.

    Raises: as `covariance_pool` and `newton_schulz_sqrt`.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (2, 64, 8))
      >>> second_order_pool(x).shape
      (2, 36)
    """
    return triangle_vector(newton_schulz_sqrt(covariance_pool(x), num_iters))
