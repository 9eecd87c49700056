import math
import re
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import DTypeLike

from gmsop_jax.ops import covariance_pool, newton_schulz_inverse_sqrt, newton_schulz_sqrt, second_order_pool
from gmsop_jax.ops.coefficients import iteration_steps, two_step_factors

ITERATIONS = range(1, 9)


def plain_iteration(sigma: jax.Array, num_iters: int, coefficients: Any = "newton_schulz"):
    """Root and inverse root by the iteration as the paper writes it (iSQRT-COV, eq. 4–7)."""
    eye = jnp.eye(sigma.shape[-1], dtype=sigma.dtype)
    trace = jnp.trace(sigma, axis1=-2, axis2=-1)[..., None, None]
    y, z = sigma / trace, eye
    for a, b in iteration_steps(num_iters, coefficients):
        t = a * eye - b * z @ y
        y, z = y @ t, t @ z
    return jnp.sqrt(trace) * y, z / jnp.sqrt(trace)


def plain(sigma: jax.Array, num_iters: int, coefficients: Any = "newton_schulz") -> jax.Array:
    return plain_iteration(sigma, num_iters, coefficients)[0]


def plain_inverse(sigma: jax.Array, num_iters: int, coefficients: Any = "newton_schulz") -> jax.Array:
    return plain_iteration(sigma, num_iters, coefficients)[1]


def covariance(d: int, *batch: int, positions: int = 20, dtype: DTypeLike = np.float64) -> jax.Array:
    x = np.random.default_rng(d).normal(size=(*batch, positions, d))
    return covariance_pool(jnp.asarray(x.astype(dtype)))


def cotangent(sigma: jax.Array) -> np.ndarray:
    """Not symmetric."""
    return np.random.default_rng(7).normal(size=sigma.shape).astype(sigma.dtype)


def gradient(function, sigma, n, g):
    return jax.vjp(lambda s: function(s, n), sigma)[1](jnp.asarray(g))[0]


def test_one_and_two_iterations_by_hand(x64):
    # 1×1: A = 1, T = 1, so every iterate is 1 and the result is √σ, exactly
    for n in ITERATIONS:
        np.testing.assert_allclose(newton_schulz_sqrt(jnp.array([[4.0]]), n), [[2.0]], rtol=1e-14)
    # diag(a, 1 − a) is scalar by scalar: y₁ = ½a(3 − a), z₁ = ½(3 − a); y₂ = ½y₁(3 − z₁y₁).
    # a = ½: y₁ = 0.625, z₁ = 1.25, z₁y₁ = 0.78125, y₂ = 0.3125 · 2.21875 = 0.693359375; trace 2 → √2 y
    for n, y in ((1, 0.625), (2, 0.693359375)):
        np.testing.assert_allclose(newton_schulz_sqrt(jnp.eye(2), n), np.sqrt(2) * y * np.eye(2), rtol=1e-14)


@pytest.mark.parametrize("n", ITERATIONS)
def test_values_and_gradients_are_those_of_the_plain_iteration(x64, n):
    sigma = covariance(5, 3)
    np.testing.assert_allclose(newton_schulz_sqrt(sigma, n), plain(sigma, n), rtol=0, atol=1e-12)
    g = cotangent(sigma)
    got, expected = gradient(newton_schulz_sqrt, sigma, n, g), gradient(plain, sigma, n, g)
    assert not np.allclose(expected, np.swapaxes(expected, -1, -2), rtol=1e-3)  # the cotangent was not symmetric
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


VARIANTS = {
    "sqrt": (newton_schulz_sqrt, plain),
    "inverse": (newton_schulz_inverse_sqrt, plain_inverse),
    "minimax": (partial(newton_schulz_sqrt, coefficients="minimax"), partial(plain, coefficients="minimax")),
    "minimax inverse": (
        partial(newton_schulz_inverse_sqrt, coefficients="minimax"),
        partial(plain_inverse, coefficients="minimax"),
    ),
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


@every_variant
@pytest.mark.parametrize("n", [3, 4])
def test_values_and_gradients_of_every_variant_are_those_of_the_plain_loop(x64, variant, n):
    function, expected = VARIANTS[variant]
    sigma = covariance(5, 3)
    g = cotangent(sigma)
    np.testing.assert_allclose(function(sigma, n), expected(sigma, n), rtol=1e-11, atol=1e-12)
    slopes = gradient(expected, sigma, n, g)
    np.testing.assert_allclose(gradient(function, sigma, n, g), slopes, rtol=0, atol=1e-11 * abs(slopes).max())
    differentiated = gradient(partial(function, forward_mode=True), sigma, n, g)
    np.testing.assert_allclose(differentiated, slopes, rtol=0, atol=1e-11 * abs(slopes).max())


@every_variant
@pytest.mark.parametrize("n", [1, 3])
def test_gradient_through_covariance_by_finite_differences(x64, variant, n):
    x = np.random.default_rng(0).normal(size=(9, 4))
    g = np.random.default_rng(1).normal(size=(4, 4))

    def loss(x):
        return jnp.sum(g * VARIANTS[variant][0](covariance_pool(x), n))

    direction = np.random.default_rng(2).normal(size=x.shape)
    step = 1e-5
    numeric = (loss(jnp.asarray(x + step * direction)) - loss(jnp.asarray(x - step * direction))) / (2 * step)
    analytic = np.sum(np.asarray(jax.grad(loss)(jnp.asarray(x))) * direction)
    np.testing.assert_allclose(analytic, numeric, rtol=1e-7)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_second_derivatives_through_covariance(x64, n):
    x = np.random.default_rng(0).normal(size=(6, 3))
    g = np.random.default_rng(1).normal(size=(3, 3))
    v = np.random.default_rng(2).normal(size=x.shape)

    def directional(function):
        slope = jax.grad(lambda x: jnp.sum(g * function(covariance_pool(x), n)))
        return jax.grad(lambda x: jnp.sum(v * slope(x)))(jnp.asarray(x))

    np.testing.assert_allclose(directional(newton_schulz_sqrt), directional(plain), rtol=1e-9, atol=1e-11)


def test_converges_to_the_square_root_and_its_inverse(x64):
    sigma = covariance(4, positions=40)
    root, inverse = newton_schulz_sqrt(sigma, 15), newton_schulz_inverse_sqrt(sigma, 15)
    np.testing.assert_allclose(root @ root, sigma, atol=1e-12)
    np.testing.assert_allclose(inverse @ sigma @ inverse, np.eye(4), atol=1e-12)


def test_the_root_is_sigma_times_the_inverse_root(x64):
    sigma = covariance(5, 2)
    for n in ITERATIONS:
        product = sigma @ newton_schulz_inverse_sqrt(sigma, n)
        np.testing.assert_allclose(product, newton_schulz_sqrt(sigma, n), rtol=1e-10, atol=1e-12)


@every_variant
@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_zero_matrix_gives_zero_with_zero_gradient(x64, variant, forward_mode, n, dtype):
    function = partial(VARIANTS[variant][0], forward_mode=forward_mode)
    sigma = jnp.zeros((2, 3, 3), dtype).at[0].set(jnp.eye(3, dtype=dtype))  # beside one that is not zero
    root = function(sigma, n)
    np.testing.assert_array_equal(root[1], np.zeros((3, 3)))
    slope = gradient(function, sigma, n, cotangent(sigma))
    np.testing.assert_array_equal(slope[1], np.zeros((3, 3)))
    assert np.isfinite(slope).all()
    assert np.any(slope[0] != 0)


@pytest.mark.parametrize("n", [1, 3, 5])
def test_rank_deficient(x64, n):
    sigma = covariance(6, positions=3)  # rank 2
    assert np.linalg.matrix_rank(sigma) == 2
    g = cotangent(sigma)
    np.testing.assert_allclose(newton_schulz_sqrt(sigma, n), plain(sigma, n), atol=1e-12)
    np.testing.assert_allclose(gradient(newton_schulz_sqrt, sigma, n, g), gradient(plain, sigma, n, g), atol=1e-10)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_badly_scaled_float32(scale, n):
    # f(sΣ) = √s f(Σ), and so f'(sΣ) = f'(Σ)/√s
    sigma = covariance(4, dtype=np.float32)
    g = cotangent(sigma)
    root = newton_schulz_sqrt(sigma * np.float32(scale), n)
    slope = gradient(newton_schulz_sqrt, sigma * np.float32(scale), n, g)
    np.testing.assert_allclose(root, newton_schulz_sqrt(sigma, n) * np.sqrt(scale), rtol=2e-4, atol=1e-6 * scale**0.5)
    expected = gradient(newton_schulz_sqrt, sigma, n, g) / np.sqrt(scale)
    np.testing.assert_allclose(slope, expected, rtol=2e-4, atol=1e-5 / np.sqrt(scale))


def test_one_value_far_above_the_others(x64):
    sigma = jnp.diag(jnp.array([1e8, 1.0, 1e-8, 0.0]))
    g = cotangent(sigma)
    for n in (3, 5):
        np.testing.assert_allclose(newton_schulz_sqrt(sigma, n), plain(sigma, n), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            gradient(newton_schulz_sqrt, sigma, n, g), gradient(plain, sigma, n, g), rtol=1e-10, atol=1e-12
        )


def test_under_jit_and_vmap(x64):
    sigma = covariance(4, 2, 3)
    g = jnp.asarray(cotangent(sigma))
    root = newton_schulz_sqrt(sigma, 5)
    np.testing.assert_allclose(jax.jit(newton_schulz_sqrt, static_argnums=1)(sigma, 5), root, atol=1e-13)
    one_by_one = jax.vmap(jax.vmap(lambda s: newton_schulz_sqrt(s, 5)))
    np.testing.assert_allclose(one_by_one(sigma), root, atol=1e-13)
    slope = gradient(newton_schulz_sqrt, sigma, 5, g)
    np.testing.assert_allclose(jax.jit(lambda s, g: jax.vjp(one_by_one, s)[1](g)[0])(sigma, g), slope, atol=1e-12)


def test_num_iters_by_keyword_and_its_default():
    sigma = covariance(3, dtype=np.float32)
    np.testing.assert_array_equal(newton_schulz_sqrt(sigma, num_iters=5), newton_schulz_sqrt(sigma, 5))
    np.testing.assert_array_equal(newton_schulz_sqrt(sigma), newton_schulz_sqrt(sigma, 3))
    slope = jax.grad(lambda s: jnp.sum(newton_schulz_sqrt(s, num_iters=5)))(sigma)
    np.testing.assert_array_equal(slope, gradient(newton_schulz_sqrt, sigma, 5, np.ones((3, 3), np.float32)))


def test_dtype_is_kept(x64):
    for dtype in (np.float32, np.float64):
        sigma = covariance(3, dtype=dtype)
        assert newton_schulz_sqrt(sigma).dtype == dtype
        assert gradient(newton_schulz_sqrt, sigma, 3, cotangent(sigma)).dtype == dtype


@every_variant
def test_backward_keeps_no_iterate(variant):
    function, expected = VARIANTS[variant]
    sigma = covariance(8, 2, dtype=np.float32)

    def kept(function) -> int:
        _, pullback = jax.vjp(lambda s: function(s, 5), sigma)
        return sum(getattr(leaf, "shape", ()) == sigma.shape for leaf in jax.tree.leaves(pullback))

    assert kept(function) <= 2  # sigma and the result
    assert kept(expected) > 10


@every_variant
@pytest.mark.parametrize(("n", "products"), [(1, 1), (2, 3), (3, 5), (4, 8), (5, 10)])
def test_number_of_matrix_products(variant, n, products):
    # Two steps take W², q·q', W·q, and Y·q or Z·q, unless Y is W or Z is I; to continue, W·q·q. The last odd step takes
    # Y·W or Z·W.
    if "inverse" in variant and n == 1:
        products = 0
    jaxpr = jax.make_jaxpr(lambda s: VARIANTS[variant][0](s, n))(jnp.eye(3))
    assert str(jaxpr).count("dot_general") == products


def test_gradient_of_many_minimax_steps_in_float32(x64):
    """With the products of a symmetric cotangent, the error would be 2 %."""
    x, g = np.random.default_rng(0).normal(size=(2, 320, 32)), np.random.default_rng(1).normal(size=(2, 528))

    def gradient(dtype):
        pool = partial(second_order_pool, num_iters=12, coefficients="minimax")
        return jax.vjp(pool, jnp.asarray(x, dtype))[1](jnp.asarray(g, dtype))[0]

    expected = gradient(np.float64)
    assert np.linalg.norm(gradient(np.float32) - expected) < 5e-3 * np.linalg.norm(expected)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.int32])
def test_precision_that_loses_the_digits_is_refused(dtype):
    with pytest.raises(TypeError, match=f"float32 or float64, got {jnp.dtype(dtype)}"):
        newton_schulz_sqrt(jnp.eye(3, dtype=dtype))
    with pytest.raises(TypeError, match="float32 or float64"):
        jax.grad(lambda s: jnp.sum(newton_schulz_sqrt(s.astype(dtype)).astype(jnp.float32)))(jnp.eye(3))


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_iteration_is_refused(n):
    with pytest.raises(ValueError, match=f"num_iters must be at least 1, got {n}"):
        newton_schulz_sqrt(jnp.eye(3), n)
    with pytest.raises(ValueError, match="num_iters must be at least 1"):
        jax.grad(lambda s: jnp.sum(newton_schulz_sqrt(s, n)))(jnp.eye(3))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("function", [newton_schulz_sqrt, newton_schulz_inverse_sqrt, second_order_pool])
def test_num_iters_that_is_not_an_int_is_refused(function):
    for n in (2.5, 3.0, True, "5", None, jnp.asarray(3)):
        with pytest.raises(TypeError, match=rf"must be a Python int, got {re.escape(repr(n))}; under jax\.jit"):
            function(jnp.eye(3), n)
        with pytest.raises(TypeError, match="num_iters must be a Python int"):
            jax.jit(function, static_argnums=() if isinstance(n, jax.Array) else 1)(jnp.eye(3), n)
    np.testing.assert_array_equal(function(jnp.eye(3), np.int64(3)), function(jnp.eye(3), 3))
    with pytest.raises(TypeError, match=r"got an array of shape \(2, 7\); pass a mask as where="):
        function(jnp.eye(3), jnp.ones((2, 7), bool))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 4, 3)])
def test_other_than_square_is_refused(shape):
    with pytest.raises(ValueError, match=r"square matrices \[\.\.\., d, d\], got shape"):
        newton_schulz_sqrt(jnp.ones(shape))


@every_variant
def test_forward_mode_is_refused_unless_asked_for(variant):
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(VARIANTS[variant][0], (jnp.eye(3),), (jnp.eye(3),))


@pytest.mark.parametrize("function", [covariance_pool, newton_schulz_sqrt, second_order_pool])
def test_the_error_of_jax_is_quoted_beside_its_remedy(function):
    """JAX's own error does not name `forward_mode`, so that a search for it must find the documentation."""
    guide = (Path(__file__).parents[2] / "docs" / "own-model.md").read_text("utf-8")
    for transform in (jax.jacfwd(function), jax.jit(jax.jacfwd(function))):
        with pytest.raises(TypeError, match=r"\(jvp\) to a custom_vjp function") as error:
            transform(jnp.eye(3))
        quoted = str(error.value).rstrip(".")
        for text in (guide, function.__doc__):
            assert quoted in " ".join(text.split())
            assert "forward_mode" in text


@every_variant
@pytest.mark.parametrize("n", [1, 3])
def test_forward_mode_jacobians_and_hessian_vector_products(x64, variant, n):
    lean = VARIANTS[variant][0]
    function = partial(lean, num_iters=n, forward_mode=True)
    sigma, direction = covariance(3), covariance(3, positions=4)
    value, tangent = jax.jvp(function, (sigma,), (direction,))
    np.testing.assert_allclose(value, lean(sigma, n), rtol=1e-12)
    step = 1e-6
    numeric = (lean(sigma + step * direction, n) - lean(sigma - step * direction, n)) / (2 * step)
    np.testing.assert_allclose(tangent, numeric, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.jacfwd(function)(sigma), jax.jacrev(function)(sigma), rtol=1e-9, atol=1e-11)

    def slope(function):
        return jax.grad(lambda s: jnp.sum(direction * function(s, num_iters=n) ** 2))

    forward_over_reverse = jax.jvp(slope(function), (sigma,), (direction,))[1]
    reverse_over_reverse = jax.grad(lambda s: jnp.sum(direction * slope(lean)(s)))(sigma)
    np.testing.assert_allclose(forward_over_reverse, reverse_over_reverse, rtol=1e-8, atol=1e-9)


# ---- coefficients


def root_error(n: int, coefficients: Any) -> tuple[np.ndarray, np.ndarray]:
    """√λ on a fine grid, and the error of the root there."""
    x = np.concatenate([np.geomspace(1e-8, 1, 100_001), np.linspace(0, 1, 100_001)])
    s = x
    for a, b in iteration_steps(n, coefficients):
        s = s * (a - b * s**2)
    return x, np.abs(x * (s - 1))


BOUNDS = [(1, 0.175, 0.115), (2, 0.119, 0.059), (3, 0.080, 0.029), (4, 0.054, 0.013), (5, 0.036, 0.0058)]
BOUNDS += [(6, 0.024, 0.0025), (8, 0.011, 0.00045), (10, 0.0048, 7.8e-5), (12, 0.0021, 1.4e-5)]


@pytest.mark.parametrize(("n", "plain_bound", "minimax_bound"), BOUNDS)
def test_bounds_of_the_root_over_all_matrices(n, plain_bound, minimax_bound):
    # of the docstring's table; n = 3 takes 6 products as the formulas are written
    for coefficients, bound in (("newton_schulz", plain_bound), ("minimax", minimax_bound)):
        error = root_error(n, coefficients)[1].max()
        assert 0.93 * bound < error <= bound
    assert n != 3 or minimax_bound / plain_bound < 0.37


def test_minimax_bound_holds_for_matrices_in_float32():
    for eigenvalues in (np.geomspace(1e-6, 1, 8), np.linspace(0, 1, 8), [1, 0, 0], [0.5, 0.3, 0.2, 1e-9]):
        basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues),) * 2))
        sigma, root = ((basis * np.power(eigenvalues, power)) @ basis.T for power in (1, 0.5))
        for n, _, bound in BOUNDS[:6]:
            got = newton_schulz_sqrt(jnp.asarray(sigma, jnp.float32), n, coefficients="minimax")
            assert np.linalg.norm(got - root, 2) <= (bound + 2e-5) * np.sqrt(np.trace(sigma))


def test_relative_error_of_the_inverse_root():
    # of its docstring: the plain iteration's is below 10 % from λ on, that of minimax below its bound
    for n, value in ((1, 0.54), (3, 0.15), (5, 0.030)):
        x, error = root_error(n, "newton_schulz")
        assert (error[x >= np.sqrt(value)] <= 0.1 * x[x >= np.sqrt(value)]).all()
    for n, value, bound, most in ((1, 0.2, 0.115, 2.3), (3, 0.021, 0.029, 9.5), (5, 0.0013, 0.0058, 47)):
        x, error = root_error(n, "minimax")
        assert (error[x >= np.sqrt(value)] <= bound * x[x >= np.sqrt(value)]).all()
        assert math.prod(a for a, _ in iteration_steps(n, "minimax")) < most


def test_the_tool_computes_the_stored_coefficients():
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "minimax_coefficients.py"))
    assert tool["best_lower_end"](3) == pytest.approx(tool["MINIMAX_LOWER_ENDS"][2], rel=1e-6)


def test_the_plain_coefficients_are_exact():
    # 12 − 9w + 6w² − w³ has the root 2 + 2 cosh(acosh(5)/3); the second quadratic follows by division
    root = 2 + 2 * math.cosh(math.acosh(5) / 3)
    assert iteration_steps(4) == ((1.5, 0.5),) * 4
    assert two_step_factors((1.5, 0.5), (1.5, 0.5)) == ((-(3 + root), 3 * root), (root - 6, 12 / root), 1 / 16)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("function", [newton_schulz_sqrt, newton_schulz_inverse_sqrt])
def test_coefficients_that_do_not_exist_are_refused(function):
    with pytest.raises(ValueError, match="coefficients must be 'newton_schulz' or 'minimax', got 'chebyshev'"):
        function(jnp.eye(3), coefficients="chebyshev")
    with pytest.raises(ValueError, match="coefficients='minimax' is available for num_iters from 1 to 12, got 13"):
        function(jnp.eye(3), 13, coefficients="minimax")


@pytest.mark.parametrize(("num_iters", "error"), [(1, 0.80), (3, 0.57), (5, 0.24), (7, 0.03), (9, 0.0)])
def test_error_by_number_of_steps(num_iters, error):
    # of the docstring's table, 64 channels
    x = np.random.default_rng(0).normal(size=(256, 64))
    sigma = np.cov(x.T, bias=True)
    values, vectors = np.linalg.eigh(sigma)
    root = vectors * np.sqrt(values) @ vectors.T
    got = newton_schulz_sqrt(jnp.asarray(sigma, jnp.float32), num_iters)
    assert abs(np.linalg.norm(got - root) / np.linalg.norm(root) - error) < 0.006
