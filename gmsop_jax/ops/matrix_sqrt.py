"""Matrix square roots and their inverses by Newton–Schulz iteration, whose backward pass stores no iterate."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.coefficients import Coefficients, Factors, Steps, iteration_steps, two_step_factors
from gmsop_jax.ops.precision import matrix_precision
from gmsop_jax.ops.triangle import triangle_matrix, triangle_vector

SYMMETRIC_STEPS = 6  # the largest number of steps for which the gradient of `root_vector` takes fewer products


def newton_schulz_sqrt(
    sigma: Float[AnyArray, "*b d d"],
    num_iters: int = 3,
    *,
    coefficients: Coefficients = "newton_schulz",
    forward_mode: bool = False,
    precision: PrecisionLike = None,
) -> Float[Array, "*b d d"]:
    """Square roots of symmetric positive semi-definite matrices by coupled Newton–Schulz iteration.

    A = Σ/tr Σ;  Y₀ = A, Z₀ = I;  T = ½(3I − Z Y), Y ← Y T, Z ← T Z;  result √(tr Σ)·Yₙ

    (iSQRT-COV, eq. 4–7.) All iterates are polynomials of A, so they commute, and Yₙ is computed with fewer matrix
    products than the formulas show, two steps at a time: 5 instead of 6 for n = 3, and 10 instead of 12 for n = 5.
    The derivative at a symmetric A is self-adjoint. The backward pass is therefore a `jax.jvp` with the cotangent as
    the tangent, and stores only `sigma`.

    With few steps, the result is far from the square root, by design: small eigenvalues converge slowly, and
    the method benefits from not amplifying them. The table shows ‖Y − √Σ‖/‖√Σ‖ in the Frobenius norm for
    covariances of 256 normally distributed positions:

    | channels | n = 1 | n = 3 | n = 5 | n = 7 | n = 9 |
    |---|---|---|---|---|---|
    | 8 | 49 % | 13 % | 0.1 % | 0 | 0 |
    | 64 | 80 % | 57 % | 24 % | 3 % | 0 |
    | 128 | 84 % | 67 % | 36 % | 11 % | 1 % |

    With `coefficients='minimax'`, the steps are T = aₖI − bₖZY. The coefficients aₖ and bₖ minimise the largest error
    of the root over all A, with the same number of products (`ops.coefficients`). The next table shows that largest
    error of an eigenvalue of the root, divided by √(tr Σ) and rounded up:

    | | n = 1 | n = 2 | n = 3 | n = 4 | n = 5 | n = 6 | n = 8 | n = 10 | n = 12 |
    |---|---|---|---|---|---|---|---|---|---|
    | newton_schulz | 0.175 | 0.119 | 0.080 | 0.054 | 0.036 | 0.024 | 0.011 | 0.0048 | 0.0021 |
    | minimax | 0.115 | 0.059 | 0.029 | 0.013 | 0.0058 | 0.0025 | 0.00045 | 7.8e-5 | 1.4e-5 |

    Args:
      sigma: symmetric PSD matrices, float32 or float64.
      num_iters: number of steps n ≥ 1; GM-SOP uses 3, iSQRT-COV 5.
      coefficients: `newton_schulz`, or `minimax` for n ≤ 12. A more accurate root does not always make a more
        accurate classifier (Song et al., ICCV 2021). In float32, more than 5 minimax steps lose accuracy for singular
        matrices (docs/accuracy.md).
      forward_mode: by default, `jax.jvp`, `jax.jacfwd` and `jax.hessian` raise JAX's error "can't apply forward-mode
        autodiff (jvp) to a custom_vjp function", because the function defines its own backward pass. If True, JAX
        differentiates the iteration automatically, which supports them. Reverse mode then stores the iterates. Values
        are the same.
      precision: precision of the matrix products; the default depends on the device, see `ops.matrix_precision`.

    Returns: Y with Y @ Y ≈ sigma, same shape and dtype. A zero matrix gives zero, with zero gradient.

    Raises:
      ValueError: if num_iters < 1, if the last two axes differ, if `coefficients` is unknown or not available for that
        many steps, or if the precision does not accumulate in the dtype of the matrices.
      TypeError: if num_iters is not an int, or if sigma is neither float32 nor float64; half precision is not accurate
        enough for the iteration.

    Example:
      >>> newton_schulz_sqrt(4 * jnp.eye(2), 12).round(3)
      Array([[2., 0.],
             [0., 2.]], dtype=float32)
    """
    sigma = _checked(sigma, "newton_schulz_sqrt")
    steps = iteration_steps(num_iters, coefficients)
    evaluate = _evaluate if forward_mode else _with_lean_backward
    return evaluate(sigma, steps, False, matrix_precision(precision, sigma.dtype))


def newton_schulz_inverse_sqrt(
    sigma: Float[AnyArray, "*b d d"],
    num_iters: int = 3,
    *,
    coefficients: Coefficients = "newton_schulz",
    forward_mode: bool = False,
    precision: PrecisionLike = None,
) -> Float[Array, "*b d d"]:
    """Inverse square roots of symmetric positive definite matrices, the second result of the same iteration.

    A = Σ/tr Σ;  Y₀ = A, Z₀ = I;  T = ½(3I − Z Y), Y ← Y T, Z ← T Z;  result Zₙ/√(tr Σ)

    Yₙ = A Zₙ, so `newton_schulz_sqrt(sigma, n)` equals `sigma @ newton_schulz_inverse_sqrt(sigma, n)`. For an
    eigenvalue λ of A, the iteration computes a value of at most 1.5ⁿ in place of 1/√λ, which regularises singular
    matrices. For n = 1, 3 and 5, its relative error is below 10 % if λ is above 0.54, 0.15 and 0.030.

    Args:
      sigma: symmetric PSD matrices, float32 or float64.
      num_iters, coefficients, forward_mode, precision: see `newton_schulz_sqrt`. With `minimax` and n = 1, 3 and 5, the
        relative error is at most 11.5 %, 2.9 % and 0.58 % if λ is above 0.2, 0.021 and 0.0013, and the values in
        place of 1/√λ are at most 2.3, 9.5 and 47.

    Returns: Z with Z @ sigma @ Z ≈ I, same shape and dtype. A zero matrix gives zero, with zero gradient.

    Raises: as `newton_schulz_sqrt`.

    Example:
      >>> newton_schulz_inverse_sqrt(4 * jnp.eye(2), 12).round(3)
      Array([[0.5, 0. ],
             [0. , 0.5]], dtype=float32)
    """
    sigma = _checked(sigma, "newton_schulz_inverse_sqrt")
    steps = iteration_steps(num_iters, coefficients)
    evaluate = _evaluate if forward_mode else _with_lean_backward
    return evaluate(sigma, steps, True, matrix_precision(precision, sigma.dtype))


def _checked(sigma: Any, caller: str) -> Array:
    sigma = jnp.asarray(sigma)
    if sigma.ndim < 2 or sigma.shape[-1] != sigma.shape[-2]:
        raise ValueError(f"{caller} needs square matrices [..., d, d], got shape {sigma.shape}")
    if sigma.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"{caller} needs float32 or float64, got {sigma.dtype}: the iteration is not accurate in lower precision;"
            " convert with sigma.astype(jnp.float32)"
        )
    return sigma


def _evaluate(sigma: Array, steps: Steps, inverse: bool, precision: PrecisionLike) -> Array:
    """√t·Yₙ(Σ/t), or Zₙ(Σ/t)/√t for the inverse, where t = tr Σ."""
    a, trace, safe_trace = _normalize(sigma)
    root = jnp.sqrt(safe_trace)
    return jnp.where(trace == 0, 0, 1 / root if inverse else root) * _polynomial(a, steps, inverse, precision)


def _normalize(sigma: Array) -> tuple[Array, Array, Array]:
    """(Σ/tr Σ, tr Σ, tr Σ or 1 where it is 0), the traces as [*b, 1, 1]."""
    trace = jnp.trace(sigma, axis1=-2, axis2=-1)[..., None, None]
    safe_trace = jnp.where(trace == 0, 1, trace)
    return sigma / safe_trace, trace, safe_trace


def _polynomial(a: Array, steps: Steps, inverse: bool, precision: PrecisionLike, symmetric: bool = False) -> Array:
    """Yₙ, or Zₙ for the inverse, as a polynomial of the trace-normalised matrix.

    If `symmetric`, the tangents of `jax.jvp` must be symmetric too, and take fewer products.
    """
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    product = functools.partial(jnp.matmul, precision=precision)
    square, quartic = (_symmetric_square, _symmetric_quartic) if symmetric else (_square, _quartic)

    def times(x: Array, y: Array) -> Array:
        return y if x is eye else product(x, y)

    w = a  # Z Y
    result = eye if inverse else w
    for i in range(1, len(steps), 2):
        q = quartic(w, square(w, precision), two_step_factors(steps[i - 1], steps[i]), precision)
        wq = product(w, q)
        result = wq if result is w else times(result, q)
        if i < len(steps) - 1:
            w = product(wq, q)
    if len(steps) % 2:
        scale, b = steps[-1]
        result = scale * result - b * times(result, w)
    return result


def _square(w: Array, precision: PrecisionLike) -> Array:
    return jnp.matmul(w, w, precision=precision)


def _quartic(w: Array, square: Array, factors: Factors, precision: PrecisionLike) -> Array:
    """g·(w² + p₁w + q₁)·(w² + p₂w + q₂)."""
    eye = jnp.eye(w.shape[-1], dtype=w.dtype)
    (p1, q1), (p2, q2), gain = factors
    return jnp.matmul(square + p1 * w + q1 * eye, gain * (square + p2 * w + q2 * eye), precision=precision)


# The tangent of w² is w·dw + dw·w. If both are symmetric, the second product is the transpose of the first. The quartic
# is g·(s² + γw + δ) with s = w² + αw + β, so its tangent is that of a square as well.
_symmetric_square = jax.custom_jvp(_square, nondiff_argnums=(1,))
_symmetric_quartic = jax.custom_jvp(_quartic, nondiff_argnums=(2, 3))


@_symmetric_square.defjvp
def _symmetric_square_jvp(precision, primals, tangents):
    (w,), (dw,) = primals, tangents
    return _symmetric_square(w, precision), _twice_symmetric_part(jnp.matmul(w, dw, precision=precision))


@_symmetric_quartic.defjvp
def _symmetric_quartic_jvp(factors, precision, primals, tangents):
    (w, square), (dw, dsquare) = primals, tangents
    (p1, q1), (p2, q2), gain = factors
    alpha = (p1 + p2) / 2
    beta = (q1 + q2 + p1 * p2 - alpha**2) / 2
    gamma = p1 * q2 + p2 * q1 - 2 * alpha * beta
    s = square + alpha * w + beta * jnp.eye(w.shape[-1], dtype=w.dtype)
    ds2 = _twice_symmetric_part(jnp.matmul(s, dsquare + alpha * dw, precision=precision))
    return _symmetric_quartic(w, square, factors, precision), gain * (ds2 + gamma * dw)


def _twice_symmetric_part(x: Array) -> Array:
    return x + jnp.swapaxes(x, -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _with_lean_backward(sigma: Array, steps: Steps, inverse: bool, precision: PrecisionLike) -> Any:
    return _evaluate(sigma, steps, inverse, precision)


def _forward(sigma, steps, inverse, precision):
    return _with_lean_backward(sigma, steps, inverse, precision), sigma


def _backward(steps, inverse, precision, sigma, g):
    """The vector–Jacobian product at a symmetric Σ."""
    a, trace, safe_trace = _normalize(sigma)
    y, da = jax.jvp(lambda a: _polynomial(a, steps, inverse, precision), (a,), (g,))

    def scale(x: Array) -> Array:  # x·t^(s − 1)
        return x / (safe_trace * jnp.sqrt(safe_trace)) if inverse else x / jnp.sqrt(safe_trace)

    # tˢ·p(Σ/t), s = ±½, depends on Σ directly in A = Σ/t, and through the trace in A and in tˢ
    through_trace = (-_inner(g, y) if inverse else _inner(g, y)) / 2 - _inner(da, a)
    dsigma = scale(da) + scale(through_trace) * jnp.eye(a.shape[-1], dtype=a.dtype)
    return (jnp.where(trace == 0, 0, dsigma),)


def _inner(x: Array, y: Array) -> Array:
    return jnp.sum(x * y, axis=(-2, -1), keepdims=True)


_with_lean_backward.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def root_vector(sigma: Array, steps: Steps, precision: PrecisionLike) -> Any:
    """The upper triangle of the root.

    The gradient is symmetric. For n = 3, it repeats the products of the forward pass, and takes 8 for their tangents
    instead of 10. With more than 6 steps, no product is saved, because the minimax steps would amplify the asymmetry of
    rounding errors.
    """
    return triangle_vector(_evaluate(sigma, steps, False, precision))


def _root_vector_forward(sigma, steps, precision):
    vector = root_vector(sigma, steps, precision)
    return vector, (sigma, vector)


def _root_vector_backward(steps, precision, residuals, g):
    sigma, vector = residuals
    a, trace, safe_trace = _normalize(sigma)
    eye = jnp.eye(a.shape[-1], dtype=a.dtype)
    direction = triangle_matrix(g) * ((1 + eye) / 2)  # each entry off the diagonal occurs twice
    symmetric = len(steps) <= SYMMETRIC_STEPS
    _, da = jax.jvp(lambda a: _polynomial(a, steps, False, precision, symmetric), (a,), (direction,))
    root = jnp.sqrt(safe_trace)
    through_trace = jnp.sum(g * vector, axis=-1)[..., None, None] / (2 * root) - _inner(da, a)
    return (jnp.where(trace == 0, 0, (da + through_trace * eye) / root),)


root_vector.defvjp(_root_vector_forward, _root_vector_backward)
