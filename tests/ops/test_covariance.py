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


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"floating features, got {jnp.dtype(dtype)}"):
        covariance_pool(jnp.ones((4, 2), dtype))


@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3)])
def test_shapes_without_positions_are_refused(shape):
    with pytest.raises(ValueError, match=r"p ≥ 1 positions, got"):
        covariance_pool(jnp.ones(shape))


def test_second_order_pool_is_its_three_parts():
    x = jnp.asarray(features(2, 9, 4, dtype=np.float32))
    expected = triangle_vector(newton_schulz_sqrt(covariance_pool(x), num_iters=5))
    np.testing.assert_array_equal(second_order_pool(x, 5), expected)
    assert expected.shape == (2, 10)
