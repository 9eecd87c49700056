import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from gmsop_jax.ops import matrix_power


def covariance(eigenvalues, seed: int = 0):
    """A symmetric matrix with these eigenvalues."""
    d = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))
    return jnp.asarray(q * np.asarray(eigenvalues) @ q.T)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.75, 1.0, 2.0])
def test_powers_of_the_eigenvalues(x64, alpha):
    values = np.array([0.5, 1.0, 2.0, 7.0])
    np.testing.assert_allclose(matrix_power(covariance(values), alpha), covariance(values**alpha), atol=1e-13)


def test_alpha_half_squares_to_the_matrix(x64):
    sigma = jnp.stack([covariance([1.0, 2.0, 3.0], seed) for seed in range(4)])
    root = jnp.asarray(matrix_power(sigma))
    np.testing.assert_allclose(root @ root, sigma, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.7])
@pytest.mark.parametrize("values", [(0.2, 1.0, 3.0), (1.0, 1.0, 1.0), (1.0, 1.0 + 1e-9, 2.0), (1e-4, 1.0, 1.0)])
def test_gradient_is_that_of_finite_differences(x64, alpha, values):
    """Also where eigenvalues are equal, or differ in their ninth digit."""

    def power(x):
        return matrix_power((x + x.T) / 2, alpha)

    check_grads(power, (covariance(values),), order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)


def test_gradient_of_close_eigenvalues_by_hand(x64):
    # f(λ) = √λ: the divided difference is 1/(√λ₁ + √λ₂), here 1/(1 + 2) off the diagonal and 1/2, 1/4 on it
    (slope,) = jax.vjp(matrix_power, jnp.diag(jnp.array([1.0, 4.0])))[1](jnp.ones((2, 2)))
    np.testing.assert_allclose(slope, [[1 / 2, 1 / 3], [1 / 3, 1 / 4]], rtol=1e-14)


def test_second_derivatives_in_reverse_mode(x64):
    def slope(x):
        return jax.grad(lambda x: jnp.sum(jnp.sin(matrix_power((x + x.T) / 2, 0.3))))(x)

    check_grads(slope, (covariance([0.2, 1.0, 3.0]),), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-6)


def test_zero_and_rank_deficient_matrices(x64):
    for sigma in (jnp.zeros((3, 3)), covariance([0.0, 0.0, 2.0])):
        root, pullback = jax.vjp(matrix_power, sigma)
        np.testing.assert_allclose(root @ root, sigma, atol=1e-13)
        assert np.isfinite(pullback(jnp.ones((3, 3)))[0]).all()


def test_under_jit_and_vmap(x64):
    sigma = jnp.stack([covariance([1.0, 2.0, 3.0], seed) for seed in range(4)])
    np.testing.assert_allclose(jax.jit(jax.vmap(matrix_power))(sigma), matrix_power(sigma), atol=1e-14)


@pytest.mark.usefixtures("unchecked_types")
def test_refusals():
    with pytest.raises(ValueError, match=r"alpha must be positive, got 0"):
        matrix_power(jnp.eye(2), 0)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        matrix_power(jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="bfloat16"):
        matrix_power(jnp.eye(2, dtype=jnp.bfloat16))
