import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import DTypeLike

from gmsop_jax.ops import average_pool, covariance_pool, newton_schulz_sqrt, second_order_pool, triangle_vector


def features(*shape: int, dtype: DTypeLike = np.float64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def test_average_by_hand():
    np.testing.assert_array_equal(average_pool(jnp.array([[1.0, 0.0], [3.0, 4.0]])), [2.0, 2.0])


def test_covariance_by_hand():
    # μ = (2, 2); centred rows (−1, −2) and (1, 2); the sum of outer products ((2, 4), (4, 8)), over p = 2
    x = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(covariance_pool(x), [[1.0, 2.0], [2.0, 4.0]])


def test_covariance_is_numpys_biased_one(x64):
    x = features(7, 3)
    sigma = covariance_pool(jnp.asarray(x))
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False, bias=True), rtol=1e-12, atol=1e-15)
    assert not np.allclose(sigma, np.cov(x, rowvar=False), rtol=0.01)  # divided by p − 1


def test_covariance_over_any_leading_axes(x64):
    x = features(2, 3, 5, 4)
    expected = [[np.cov(m, rowvar=False, bias=True) for m in row] for row in x]
    np.testing.assert_allclose(covariance_pool(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(jax.vmap(covariance_pool)(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(jax.jit(covariance_pool)(jnp.asarray(x)), expected, rtol=1e-12, atol=1e-15)


def test_covariance_gradient(x64):
    # L = Σᵢⱼ GᵢⱼΣᵢⱼ: dL/dx = (1/p) (x − μ)(G + Gᵀ)
    x, g = features(6, 3), np.random.default_rng(1).normal(size=(3, 3))
    gradient = jax.grad(lambda x: jnp.sum(g * covariance_pool(x)))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, (x - x.mean(0)) @ (g + g.T) / 6, rtol=1e-12, atol=1e-14)


def test_single_position_has_no_covariance():
    np.testing.assert_array_equal(covariance_pool(jnp.ones((1, 3))), np.zeros((3, 3)))


def test_large_mean_does_not_cancel():
    x = features(64, 4, dtype=np.float32)
    sigma = covariance_pool(jnp.asarray(x + np.float32(1000)))
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False, bias=True), atol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_widened_before_it_is_centred(dtype):
    x = jnp.asarray(features(8, 3), dtype)
    sigma = covariance_pool(x)
    assert sigma.dtype == jnp.float32
    np.testing.assert_array_equal(sigma, covariance_pool(x.astype(jnp.float32)))
    assert average_pool(x).dtype == jnp.float32


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"floating features, got {jnp.dtype(dtype)}"):
        covariance_pool(jnp.ones((4, 2), dtype))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3)])
def test_shapes_without_positions_are_refused(shape):
    with pytest.raises(ValueError, match=r"average_pool needs .* p ≥ 1 positions, got"):
        average_pool(jnp.ones(shape))
    with pytest.raises(ValueError, match=r"p ≥ 1 positions, got"):
        covariance_pool(jnp.ones(shape))


def test_second_order_pool_is_its_three_parts():
    x = jnp.asarray(features(2, 9, 4, dtype=np.float32))
    expected = triangle_vector(newton_schulz_sqrt(covariance_pool(x), num_iters=5))
    np.testing.assert_array_equal(second_order_pool(x, 5), expected)
    assert expected.shape == (2, 10)


@pytest.mark.parametrize("coefficients", ["newton_schulz", "minimax"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_gradient_of_second_order_pool_is_that_of_its_three_parts(x64, n, coefficients):
    def parts(x):
        return triangle_vector(newton_schulz_sqrt(covariance_pool(x), n, coefficients=coefficients))

    def pool(x):
        return second_order_pool(x, n, coefficients=coefficients)

    x, g = jnp.asarray(features(2, 9, 4)), jnp.asarray(np.random.default_rng(1).normal(size=(2, 10)))
    (slope,), (expected,) = (jax.vjp(function, x)[1](g) for function in (pool, parts))
    np.testing.assert_allclose(slope, expected, rtol=0, atol=1e-13)

    def directional(function):
        slope = jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))
        return jax.grad(lambda x: jnp.sum(jnp.cos(slope(x))))(x)

    np.testing.assert_allclose(directional(pool), directional(parts), rtol=0, atol=1e-12)


def test_second_order_pool_of_constant_features_has_zero_gradient():
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(second_order_pool(x)))(jnp.ones((2, 9, 4))), 0)


def test_number_of_products_of_second_order_pool():
    """The mean and the covariance take one product in each direction; the root takes 5 forward and 13 backward."""
    x = jnp.ones((9, 4))
    assert str(jax.make_jaxpr(second_order_pool)(x)).count("dot_general") == 2 + 5
    _, pullback = jax.vjp(second_order_pool, x)
    assert str(jax.make_jaxpr(pullback)(jnp.ones(10))).count("dot_general") == 2 + 13


# ---- masks and weights

POOLS = {
    "average": average_pool,
    "covariance": covariance_pool,
    "second moment": functools.partial(covariance_pool, centered=False),
    "second order": second_order_pool,
    "second order, not centered": functools.partial(second_order_pool, centered=False),
}
every_pool = pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
MASK = np.array([[True, False, True, True, False, True], [False, True, True, False, True, True]])


def value_and_slope(pool, x, **options):
    """The value of a pooling and the gradient of a sum of its sines."""
    return pool(x, **options), jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, **options))))(x)


def test_second_moment_by_hand():
    # rows (1, 0) and (3, 4): ((1 + 9, 12), (12, 16)) over 2
    x = jnp.array([[1.0, 0.0], [3.0, 4.0]])
    np.testing.assert_array_equal(covariance_pool(x, centered=False), [[5.0, 6.0], [6.0, 8.0]])


def test_second_moment_gradient(x64):
    x, g = features(6, 3), np.random.default_rng(1).normal(size=(3, 3))
    gradient = jax.grad(lambda x: jnp.sum(g * covariance_pool(x, centered=False)))(jnp.asarray(x))
    np.testing.assert_allclose(gradient, x @ (g + g.T) / 6, rtol=1e-12, atol=1e-14)


@every_pool
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_masked_input_equals_shortened_input(x64, pool, dtype, tolerance):
    x = (features(2, 6, 3) + 1).astype(dtype)
    masked = x.copy()
    masked[~MASK] = np.array([[np.nan], [np.inf], [-np.inf], [3e38]])
    y, slope = value_and_slope(pool, jnp.asarray(masked), where=MASK)
    shortened = jnp.asarray(x[MASK].reshape(2, 4, 3))
    expected, expected_slope = value_and_slope(pool, shortened)
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope[MASK].reshape(2, 4, 3), expected_slope, rtol=tolerance, atol=tolerance)
    assert not slope[~MASK].any()


@every_pool
def test_integer_weights_equal_repeated_positions(x64, pool):
    x, counts = features(4, 3), np.array([2, 0, 1, 3])
    expected, slope = value_and_slope(pool, jnp.asarray(np.repeat(x, counts, axis=0)))
    summed = np.stack([rows.sum(0) for rows in np.split(slope, np.cumsum(counts)[:-1])])
    for weights in (counts, counts * 0.25, (counts / 8).astype(np.float16)):  # only the ratios matter
        y, got = value_and_slope(pool, jnp.asarray(x), where=weights)
        np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(got, summed, rtol=1e-12, atol=1e-12)


@every_pool
def test_gradient_of_weights_is_the_finite_difference(x64, pool):
    x, weights = jnp.asarray(features(5, 3)), jnp.array([0.5, 0.0, 2.0, 1.0, 0.25])

    def loss(weights):
        return jnp.sum(jnp.sin(pool(x, where=weights)))

    slope = jax.grad(loss)(weights)
    nudges = 1e-6 * jnp.eye(5)
    expected = jax.vmap(lambda nudge: (loss(weights + nudge) - loss(weights - nudge)) / 2e-6)(nudges)
    np.testing.assert_allclose(np.delete(slope, 1), np.delete(expected, 1), rtol=1e-7, atol=1e-9)
    assert slope[1] == 0  # an excluded position may hold anything


@every_pool
def test_an_image_with_no_position_left_gives_zeros_and_zero_gradients(pool):
    x = jnp.asarray(features(2, 6, 3, dtype=np.float32)).at[0, :3].set(np.nan)
    weights = jnp.ones((2, 6)).at[0].set(0)
    y, slope = value_and_slope(pool, x, where=weights)
    assert not y[0].any()
    assert not slope[0].any()
    assert np.isfinite(y).all()
    assert slope[1].all()
    assert not jax.grad(lambda w: jnp.sum(pool(x, where=w)))(weights)[0].any()


@every_pool
def test_masks_under_jit_and_vmap(pool):
    x = jnp.asarray(features(2, 6, 3, dtype=np.float32))

    def run(x, where):
        return value_and_slope(pool, x, where=where)

    expected = run(x, jnp.asarray(MASK))
    for got in (jax.jit(run)(x, MASK), jax.jit(jax.vmap(run))(x, MASK)):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pool", [average_pool, covariance_pool, second_order_pool])
def test_without_a_mask_the_program_selects_nothing(pool):
    def program(**options):
        return jax.jit(jax.grad(lambda x: jnp.sum(pool(x, **options)))).lower(jnp.ones((2, 6, 3))).as_text()

    # newton_schulz_sqrt itself compares the trace with 0
    from_root = program().count("select") if pool is second_order_pool else 0
    assert program().count("select") == from_root
    assert program(where=jnp.ones((2, 6), bool)).count("select") > from_root


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("pool", [average_pool, second_order_pool])
@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 1), (2, 6, 1), (2, 6, 3), ()])
def test_a_mask_of_another_shape_is_refused(pool, shape):
    with pytest.raises(ValueError, match=r"one entry for each position, shape \(2, 6\) .* got shape"):
        pool(jnp.ones((2, 6, 3)), where=np.ones(shape, bool))


@pytest.mark.usefixtures("unchecked_types")
def test_complex_weights_are_refused():
    with pytest.raises(TypeError, match="non-negative weights, got complex64"):
        average_pool(jnp.ones((6, 3)), where=jnp.ones(6, jnp.complex64))


@pytest.mark.parametrize("pool", [average_pool, covariance_pool, second_order_pool])
@pytest.mark.parametrize("weight", [-1.0, np.nan, np.inf])
def test_weights_that_are_negative_or_not_finite_give_nan(pool, weight):
    x = jax.random.normal(jax.random.key(0), (2, 6, 3))
    y = jax.jit(pool)(x, where=jnp.ones((2, 6)).at[0, 2].set(weight))
    assert jnp.isnan(y[0]).all()
    np.testing.assert_allclose(y[1], pool(x)[1], rtol=1e-5, atol=1e-6)


# ---- forward mode


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("pool", [covariance_pool, second_order_pool])
def test_forward_mode_equals_finite_differences_with_and_without_a_mask(x64, pool, centered):
    rng = np.random.default_rng(0)
    x, dx = jnp.asarray(rng.normal(size=(7, 3))), jnp.asarray(rng.normal(size=(7, 3)))
    for where in (None, jnp.arange(7.0)):  # the first position has no weight
        lean = functools.partial(pool, where=where, centered=centered)
        value, tangent = jax.jvp(functools.partial(lean, forward_mode=True), (x,), (dx,))
        np.testing.assert_allclose(value, lean(x), rtol=1e-12)
        numeric = (lean(x + 1e-6 * dx) - lean(x - 1e-6 * dx)) / 2e-6
        np.testing.assert_allclose(tangent, numeric, rtol=1e-6, atol=1e-8)


def test_forward_mode_in_the_weights_and_in_hessian_vector_products(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)))
    weights, dweights = jnp.arange(5.0), jnp.ones(5)

    def loss(x, weights, forward_mode=True):
        return jnp.sum(second_order_pool(x, where=weights, forward_mode=forward_mode) ** 3)

    _, slope = jax.jvp(lambda w: loss(x, w), (weights,), (dweights,))
    lean = jax.grad(loss, 1)(x, weights, False)
    np.testing.assert_allclose(slope, jnp.sum(lean * dweights), rtol=1e-9)  # no gradient flows into a weight of 0
    _, forward_over_reverse = jax.jvp(lambda x: jax.grad(loss)(x, weights), (x,), (x,))
    reverse_over_reverse = jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, weights, False) * jax.lax.stop_gradient(x)))(x)
    np.testing.assert_allclose(forward_over_reverse, reverse_over_reverse, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("optimized")  # sums in another order than unoptimized programs
def test_masked_positions_do_not_change_the_rounding():
    """The roots of small eigenvalues would enlarge a difference in the last bits of a covariance."""
    rng = np.random.default_rng(0)
    x = rng.normal(1, 1, size=(4, 49, 32)).astype(np.float32)
    mask = np.stack([rng.permutation(49) < 30 for _ in x])
    pool = jax.jit(covariance_pool)
    masked, shortened = pool(x, where=mask), pool(x[mask].reshape(4, 30, 32))
    np.testing.assert_array_equal(masked, shortened)
