import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.ops import apply_candidates, select_top_k

WIDTHS = (3, 6, 4)


def bank(n: int, widths: tuple[int, ...] = WIDTHS) -> list[jax.Array]:
    random = np.random.default_rng(n)
    return [jnp.asarray(random.normal(size=(n, i, o))) for i, o in itertools.pairwise(widths)]


def images(b: int = 5, p: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(b, p, WIDTHS[0])))


def select(b: int, n: int, k: int) -> jax.Array:
    return select_top_k(jnp.asarray(np.random.default_rng(2).normal(size=(b, n))), k)


def dense(x: jax.Array, kernels: list[jax.Array], indices: jax.Array) -> jax.Array:
    """Every candidate on every image, then the selected ones."""
    y = x[:, None]
    for kernel in kernels:
        y = jax.nn.relu(y @ kernel)
    return jnp.take_along_axis(y, indices[:, :, None, None], axis=1)


def test_by_hand():
    # candidate 1 doubles and candidate 0 negates; ReLU cuts what is negative
    x = jnp.array([[[1.0], [-2.0]]])
    kernels = [jnp.array([[[-1.0]], [[2.0]]])]
    assert apply_candidates(x, kernels, jnp.array([[1, 0]])).tolist() == [[[[2.0], [0.0]], [[0.0], [2.0]]]]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_values_and_gradients_are_those_of_the_dense_computation(x64, k):
    x, kernels, indices = images(), bank(4), select(5, 4, k)
    y, pullback = jax.vjp(lambda *a: apply_candidates(*a, indices), x, kernels)
    expected, expected_pullback = jax.vjp(lambda *a: dense(*a, indices), x, kernels)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    g = jnp.cos(y)
    for got, wanted in zip(*(jax.tree.leaves(p(g)) for p in (pullback, expected_pullback)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-13)


def test_a_candidate_that_nobody_selected_has_zero_gradient(x64):
    x, kernels = images(), bank(4)
    indices = jnp.array([[0, 2]] * 5)
    for slope in jax.grad(lambda w: jnp.sum(apply_candidates(x, w, indices) ** 2))(kernels):
        assert [bool(np.any(slope[i] != 0)) for i in range(4)] == [True, False, True, False]


def test_no_capacity_limit_when_all_select_the_same(x64):
    x, kernels, indices = images(b=16), bank(8), jnp.full((16, 1), 6)
    np.testing.assert_allclose(apply_candidates(x, kernels, indices), dense(x, kernels, indices), rtol=1e-12)


def test_under_jit_and_vmap(x64):
    x, kernels, indices = images(b=6), bank(4), select(6, 4, 2)
    y = apply_candidates(x, kernels, indices)
    np.testing.assert_allclose(jax.jit(apply_candidates)(x, kernels, indices), y, rtol=1e-12, atol=1e-13)
    halves = jax.vmap(apply_candidates, in_axes=(0, None, 0))(x.reshape(2, 3, 7, 3), kernels, indices.reshape(2, 3, 2))
    np.testing.assert_allclose(halves.reshape(y.shape), y, rtol=1e-12, atol=1e-13)


def flops(n: int, k: int, gradient: bool) -> float:
    """Of the compiled program for 8 images of 64 positions, 32 channels."""

    def loss(x, kernels, indices):
        return jnp.sum(apply_candidates(x, kernels, indices))

    function = jax.grad(loss, (0, 1)) if gradient else loss
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 64, 32), (n, 32, 32), (n, 32, 32))]
    indices = jax.ShapeDtypeStruct((8, k), "int32")
    analysis = jax.jit(function).lower(shapes[0], shapes[1:], indices).compile().cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.parametrize("gradient", [False, True])
def test_cost_follows_k_and_not_n(gradient):
    few, many = flops(8, 4, gradient), flops(64, 4, gradient)
    # two layers: 2 · (8 · 4 pairs) · 64 · 32 · 32 each, thrice that with the gradient
    products = 2 * 2 * 32 * 64 * 32 * 32 * (3 if gradient else 1)
    assert products <= few < 1.2 * products
    assert many < 1.02 * few
    assert flops(64, 8, gradient) > 1.9 * many
