"""Powers of covariance matrices by eigendecomposition (MPN-COV)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.precision import matrix_precision


def matrix_power(
    sigma: Float[AnyArray, "*b d d"], alpha: float = 0.5, *, precision: PrecisionLike = None
) -> Float[Array, "*b d d"]:
    """Powers Σ^α of symmetric positive semi-definite matrices.

    Σ = U diag(λ) Uᵀ,  Σ^α = U diag(λ^α) Uᵀ   (MPN-COV, eq. 5)

    Eigenvalues of at most one ulp of the largest eigenvalue are rounding errors and are set to 0, as in the authors'
    code. (That code computes √(λ + 10⁻¹²) for any α; this function computes λ^α.) The gradient uses the divided
    differences (λᵢ^α − λⱼ^α)/(λᵢ − λⱼ), in a form that stays accurate for close and equal eigenvalues. The gradient
    itself is not differentiable where eigenvalues are equal. Forward mode (`jax.jvp`) is not supported.

    Args:
      sigma: symmetric PSD matrices, float32 or float64; only their symmetric part is used.
      alpha: α > 0; MPN-COV uses ½.
      precision: precision of the matrix products; the default depends on the device, see `ops.matrix_precision`.

    Returns: Σ^α, same shape and dtype. A zero matrix gives zero, with zero gradient.

    Raises:
      ValueError: if alpha is not positive, if the last two axes differ, or if the precision does not accumulate in the
        dtype of the matrices.
      TypeError: if sigma is neither float32 nor float64.

    Example:
      >>> matrix_power(jnp.diag(jnp.array([4.0, 9.0])), 0.5)
      Array([[2., 0.],
             [0., 3.]], dtype=float32)
    """
    sigma = jnp.asarray(sigma)
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    if sigma.ndim < 2 or sigma.shape[-1] != sigma.shape[-2]:
        raise ValueError(f"sigma must be square matrices [..., d, d], got shape {sigma.shape}")
    if sigma.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"matrix_power needs float32 or float64, got {sigma.dtype}; convert with sigma.astype(jnp.float32)"
        )
    return _power(sigma, alpha, matrix_precision(precision, sigma.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _power(sigma: Array, alpha: float, precision: PrecisionLike) -> Any:
    return _forward(sigma, alpha, precision)[0]


def _forward(sigma, alpha, precision):
    values, vectors = jnp.linalg.eigh(sigma)
    largest = values[..., -1:]
    values = jnp.where(values > jnp.spacing(jax.lax.stop_gradient(largest)), values, 0)
    powers = jnp.power(values, alpha)[..., None, :]
    return jnp.matmul(vectors * powers, vectors.mT, precision=precision), (values, vectors)


def _backward(alpha, precision, residuals, g):
    values, vectors = residuals
    product = functools.partial(jnp.matmul, precision=precision)
    inside = product(product(vectors.mT, (g + g.mT) / 2), vectors)
    return (product(product(vectors, _divided_differences(values, alpha) * inside), vectors.mT),)


def _divided_differences(values: Array, alpha: float) -> Array:
    """(λᵢ^α − λⱼ^α)/(λᵢ − λⱼ) for all pairs; α λ^(α−1) where they are equal, 0 where both are 0."""
    large = jnp.maximum(values[..., :, None], values[..., None, :])
    small = jnp.minimum(values[..., :, None], values[..., None, :])
    safe = jnp.where(large > 0, large, 1)
    # with r = small/large = eᵗ: large^(α−1) (1 − r^α)/(1 − r) = large^(α−1) expm1(αt)/expm1(t)
    t = jnp.log1p((small - large) / safe)
    near = jnp.where(jnp.abs(t) > 0, t, 1)
    ratio = jnp.where(jnp.isinf(t), 1, jnp.where(jnp.abs(t) > 0, jnp.expm1(alpha * near) / jnp.expm1(near), alpha))
    return jnp.where(large > 0, jnp.power(safe, alpha - 1) * ratio, 0)


_power.defvjp(_forward, _backward)
