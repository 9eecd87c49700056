import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmsop_jax.ops import triangle_matrix, triangle_vector
from gmsop_jax.ops.triangle import triangle_side


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_order_by_hand():
    m = jnp.array([[11, 12, 13], [21, 22, 23], [31, 32, 33]])
    np.testing.assert_array_equal(triangle_vector(m), [11, 12, 13, 22, 23, 33])  # rows; only the upper half
    v = jnp.array([11, 12, 13, 22, 23, 33])
    np.testing.assert_array_equal(triangle_matrix(v), [[11, 12, 13], [12, 22, 23], [13, 23, 33]])


@pytest.mark.parametrize("d", [1, 2, 5, 128])
def test_order_is_that_of_triu_indices(d):
    m = normal(2, d, d)
    rows, cols = np.triu_indices(d)
    np.testing.assert_array_equal(triangle_vector(jnp.asarray(m)), m[:, rows, cols])


def test_published_dimension():
    assert triangle_vector(jnp.zeros((128, 128))).shape == (8256,)
    assert triangle_matrix(jnp.zeros((3, 8256))).shape == (3, 128, 128)


@pytest.mark.parametrize("d", [1, 2, 7])
def test_inverse_of_each_other(d):
    v = jnp.asarray(normal(2, 3, d * (d + 1) // 2))
    np.testing.assert_array_equal(triangle_vector(triangle_matrix(v)), v)
    m = jnp.asarray(normal(2, d, d))
    m = m + jnp.swapaxes(m, -1, -2)
    np.testing.assert_array_equal(triangle_matrix(triangle_vector(m)), m)


def test_gradients_are_those_of_scatters():
    d = 5
    rows, cols = np.triu_indices(d)
    m, v = jnp.asarray(normal(2, d, d)), jnp.asarray(normal(2, 15))
    to_vector, to_matrix = jnp.asarray(normal(2, 15, seed=1)), jnp.asarray(normal(2, d, d, seed=2))

    def plain_vector(m):
        return m[:, rows, cols]

    def plain_matrix(v):
        zero = jnp.zeros((2, d, d), v.dtype)
        return zero.at[:, cols, rows].set(v).at[:, rows, cols].set(v)

    np.testing.assert_array_equal(
        jax.vjp(triangle_vector, m)[1](to_vector)[0], jax.vjp(plain_vector, m)[1](to_vector)[0]
    )
    np.testing.assert_allclose(
        jax.vjp(triangle_matrix, v)[1](to_matrix)[0], jax.vjp(plain_matrix, v)[1](to_matrix)[0], rtol=1e-6
    )


def test_gradients_by_hand():
    # v reads m₀₀, m₀₁, m₁₁: m₁₀ has no gradient. m repeats v₁: its gradient is the sum of both places.
    assert jax.grad(lambda m: triangle_vector(m) @ jnp.array([1.0, 2, 3]))(jnp.eye(2)).tolist() == [[1, 2], [0, 3]]
    weights = jnp.array([[1.0, 2], [30, 4]])
    assert jax.grad(lambda v: jnp.sum(weights * triangle_matrix(v)))(jnp.ones(3)).tolist() == [1, 32, 4]


def test_second_derivatives():
    def curvature(v):
        return jnp.sum(triangle_vector(triangle_matrix(v) ** 3))

    hessian = jax.jacrev(jax.grad(curvature))(jnp.array([1.0, 2, 3]))
    np.testing.assert_allclose(hessian, np.diag([6.0, 12, 18]), rtol=1e-6)  # Σ v³


@pytest.mark.parametrize(("function", "shape"), [(triangle_vector, (4, 6, 6)), (triangle_matrix, (4, 21))])
def test_no_scatter_forward_or_backward(function, shape):
    def primitives(function) -> str:
        def both(x):
            y, pullback = jax.vjp(function, x)
            return y, pullback(jnp.cos(y))

        return str(jax.make_jaxpr(both)(jnp.ones(shape)))

    assert "scatter" not in primitives(function)
    assert "scatter" in primitives(lambda x: x[..., np.array([0, 1])])  # what a gather's gradient is otherwise


def test_under_jit_and_vmap():
    m = jnp.asarray(normal(2, 3, 4, 4))
    v = triangle_vector(m)
    np.testing.assert_array_equal(jax.jit(triangle_vector)(m), v)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(triangle_vector))(m), v)
    np.testing.assert_array_equal(jax.jit(jax.vmap(triangle_matrix))(v), triangle_matrix(v))


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shape", [(3,), (2, 3), (4, 3, 2)])
def test_other_than_square_is_refused(shape):
    with pytest.raises(ValueError, match="square matrices"):
        triangle_vector(jnp.ones(shape))


@pytest.mark.parametrize("t", [0, 2, 4, 8255])
def test_other_than_triangular_is_refused(t):
    with pytest.raises(ValueError, match=f"got {t}"):
        triangle_matrix(jnp.ones((2, t)))


@given(st.integers(1, 100_000))
def test_side_undoes_the_count(d):
    assert triangle_side(d * (d + 1) // 2) == d
    if d > 1:
        with pytest.raises(ValueError, match="a triangle has"):
            triangle_side(d * (d + 1) // 2 + 1)
