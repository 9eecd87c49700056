import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.ops import (
    apply_all_candidates,
    apply_candidates,
    average_pool,
    mix_candidates,
    second_order_pool,
    select_top_k,
)

WIDTHS = (3, 6, 4)
every_dispatch = pytest.mark.parametrize("dispatch", ["gather", "group", "loop"])
every_pool = pytest.mark.parametrize("pool", [average_pool, second_order_pool])


def bank(n: int, widths: tuple[int, ...] = WIDTHS) -> list[jax.Array]:
    random = np.random.default_rng(n)
    return [jnp.asarray(random.normal(size=(n, i, o))) for i, o in itertools.pairwise(widths)]


def images(b: int = 5, p: int = 7) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(b, p, WIDTHS[0])))


def select(b: int, n: int, k: int) -> jax.Array:
    return select_top_k(jnp.asarray(np.random.default_rng(2).normal(size=(b, n))), k)


def dense(x: jax.Array, kernels: list[jax.Array], indices: jax.Array, pool) -> jax.Array:
    """Every candidate on every image, then the selected ones."""
    y = x[:, None]
    for kernel in kernels:
        y = jax.nn.relu(y @ kernel)
    return jnp.take_along_axis(pool(y), indices[:, :, None], axis=1)


@every_dispatch
def test_by_hand(dispatch):
    # candidate 1 doubles and candidate 0 negates; ReLU cuts what is negative: (2, 0) and (0, 2)
    x = jnp.array([[[1.0], [-2.0]]])
    kernels = [jnp.array([[[-1.0]], [[2.0]]])]
    first_position = apply_candidates(x, kernels, jnp.array([[1, 0]]), lambda y: y[..., 0, :], dispatch)
    assert first_position.tolist() == [[[2.0], [0.0]]]
    assert apply_candidates(x, kernels, jnp.array([[1, 0]]), average_pool, dispatch).tolist() == [[[1.0], [1.0]]]


@every_dispatch
@every_pool
@pytest.mark.parametrize(
    ("b", "k", "dtype", "tolerance"),
    [(5, 1, "float64", 1e-11), (5, 4, "float64", 1e-11), (1, 3, "float64", 1e-11), (5, 2, "float32", 1e-4)],
)
def test_values_and_gradients_are_those_of_the_dense_computation(x64, dispatch, pool, b, k, dtype, tolerance):
    x, kernels = images(b).astype(dtype), [kernel.astype(dtype) for kernel in bank(4)]
    indices = select(b, 4, k)

    def value_and_gradients(function):
        def both(x, kernels):
            y, pullback = jax.vjp(function, x, kernels)
            return y, pullback(jnp.cos(y))

        return jax.jit(both)(x, kernels)

    got = value_and_gradients(lambda x, w: apply_candidates(x, w, indices, pool, dispatch))
    expected = value_and_gradients(lambda x, w: dense(x, w, indices, pool))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1, float(jnp.abs(b).max())))


@every_dispatch
def test_a_candidate_that_nobody_selected_has_zero_gradient(x64, dispatch):
    x, kernels = images(), bank(4)
    indices = jnp.array([[0, 2]] * 5)

    def loss(kernels):
        return jnp.sum(apply_candidates(x, kernels, indices, average_pool, dispatch) ** 2)

    for slope in jax.grad(loss)(kernels):
        assert [bool(np.any(slope[i] != 0)) for i in range(4)] == [True, False, True, False]


@every_dispatch
def test_no_capacity_limit_when_all_select_the_same(x64, dispatch):
    x, kernels, indices = images(b=16), bank(8), jnp.full((16, 1), 6)
    got = apply_candidates(x, kernels, indices, average_pool, dispatch)
    np.testing.assert_allclose(got, dense(x, kernels, indices, average_pool), rtol=1e-12)


@every_dispatch
def test_under_jit_and_vmap(x64, dispatch):
    x, kernels, indices = images(b=6), bank(4), select(6, 4, 2)
    apply = functools.partial(apply_candidates, pool=second_order_pool, dispatch=dispatch)
    y = apply(x, kernels, indices)
    np.testing.assert_allclose(jax.jit(apply)(x, kernels, indices), y, rtol=1e-12, atol=1e-13)
    halves = jax.vmap(apply, in_axes=(0, None, 0))(x.reshape(2, 3, 7, 3), kernels, indices.reshape(2, 3, 2))
    np.testing.assert_allclose(halves.reshape(y.shape), y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("choice", ["random", "one", "uneven"])
def test_groups_of_many_pairs(x64, choice):
    x, kernels = images(b=48, p=3), bank(4)  # 96 pairs: blocks of 3
    indices = {
        "random": select(48, 4, 2),
        "one": jnp.full((48, 2), 3),  # an image may even select a candidate twice
        "uneven": jnp.array([[0, 1]] + [[2, 3]] * 47),
    }[choice]

    def value_and_gradients(function):
        y, pullback = jax.vjp(function, x, kernels)
        return y, pullback(jnp.cos(y))

    got = value_and_gradients(lambda x, w: apply_candidates(x, w, indices, average_pool, "group"))
    expected = value_and_gradients(lambda x, w: dense(x, w, indices, average_pool))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), got, expected)


def test_groups_copy_fewer_weights_than_pairs():
    def copied(dispatch: str) -> float:
        function = jax.grad(lambda x, w, i: jnp.sum(apply_candidates(x, w, i, average_pool, dispatch)), (0, 1))  # pyright: ignore[reportArgumentType]
        x, kernels, indices = jnp.ones((64, 4, 32)), [jnp.ones((4, 32, 64))], jnp.zeros((64, 4), int)
        analysis = jax.jit(function).lower(x, kernels, indices).compile().cost_analysis()
        assert analysis is not None
        return analysis["bytes accessed"]

    assert copied("group") < copied("gather") / 2


def test_gradients_of_groups_have_no_scatter_of_numbers():
    function = jax.grad(lambda x, w: jnp.sum(apply_candidates(x, w, select(48, 4, 2), average_pool, "group")), (0, 1))
    text = jax.jit(function).trace(images(b=48), bank(4)).lower(lowering_platforms=("cuda",)).as_text()
    scatters = [line for line in text.splitlines() if "stablehlo.scatter" in line]
    assert all("unique_indices = true" in line for line in scatters)
    assert len(scatters) == 1  # which pair is in which slot


@pytest.mark.parametrize("b", [6, 48])  # the default for these on a GPU is gather and group
def test_the_default_on_gpus_has_no_scatter_of_numbers(monkeypatch, b):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def loss(x, kernels):
        return jnp.sum(apply_candidates(x, kernels, select(b, 4, 2), second_order_pool) ** 2)

    arguments = images(b).astype("float32"), [kernel.astype("float32") for kernel in bank(4)]
    text = jax.jit(jax.grad(loss, (0, 1))).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    scattered = [part[part.index("}) : ") :].partition("-> ")[2] for part in text.split('stablehlo.scatter"')[1:]]
    assert [kind.split(">")[0].rpartition("x")[2] for kind in scattered] == ["i32"] * (b > 6)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize(
    ("x", "kernels"),
    [
        ((2, 7, 4), [(3, 5, 2)]),
        ((2, 7, 4), [(3, 4, 5), (3, 4, 2)]),
        ((2, 7, 4), [(3, 4, 5), (2, 5, 2)]),
        ((2, 7, 4), [(4, 2)]),
        ((2, 7, 4), []),
        ((2, 3, 3, 4), [(3, 4, 2)]),
    ],
)
def test_shapes_that_do_not_fit_are_refused(x, kernels):
    arrays = [jnp.ones(shape) for shape in kernels]
    shapes = ", ".join(map(str, kernels)) or "no kernel"
    message = re.escape(f"with the same n, got {x} and {shapes}")
    with pytest.raises(ValueError, match=message):
        apply_candidates(jnp.ones(x), arrays, jnp.zeros((2, 1), int), average_pool)
    with pytest.raises(ValueError, match=message):
        apply_all_candidates(jnp.ones(x), arrays, average_pool)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("indices", [jnp.zeros(5, int), jnp.zeros((4, 2), int), jnp.zeros((5, 2))])
def test_indices_that_are_not_candidates_of_each_image_are_refused(indices):
    with pytest.raises(ValueError, match=re.escape(f"of the 5 images, got {indices.dtype} {indices.shape}")):
        apply_candidates(images(), bank(4), indices, average_pool)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("shapes", [((2, 2, 6), (2, 3), (2, 1)), ((2, 6), (2, 3), (2, 2)), ((2, 2, 6), (1, 3), (2, 2))])
def test_shapes_that_cannot_be_mixed_are_refused(shapes):
    pooled, weights, indices = (jnp.zeros(shape, int) for shape in shapes)
    with pytest.raises(ValueError, match=re.escape(f"got {', '.join(map(str, shapes))}")):
        mix_candidates(pooled, weights, indices)


@pytest.mark.usefixtures("unchecked_types")
def test_an_unknown_dispatch_is_refused():
    with pytest.raises(ValueError, match="'sorted'"):
        apply_candidates(images(), bank(4), select(5, 4, 2), average_pool, "sorted")  # pyright: ignore[reportArgumentType]


def compiled(n: int, k: int, dispatch: str, gradient: bool) -> jax.stages.Compiled:
    """For 8 images of 64 positions, 32 channels."""

    def loss(x, kernels, indices):
        return jnp.sum(apply_candidates(x, kernels, indices, average_pool, dispatch))  # pyright: ignore[reportArgumentType]

    function = jax.grad(loss, (0, 1)) if gradient else loss
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((8, 64, 32), (n, 32, 32), (n, 32, 32))]
    return jax.jit(function).lower(shapes[0], shapes[1:], jax.ShapeDtypeStruct((8, k), "int32")).compile()


def flops(*args) -> float:
    analysis = compiled(*args).cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.parametrize("gradient", [False, True])
def test_cost_follows_k_and_not_n(gradient):
    few, many = flops(8, 4, "gather", gradient), flops(64, 4, "gather", gradient)
    # two layers: 2 · (8 · 4 pairs) · 64 · 32 · 32 each, thrice that with the gradient
    products = 2 * 2 * 32 * 64 * 32 * 32 * (3 if gradient else 1)
    # the gradients of the pairs are summed by candidate: n products for each of their numbers
    sums = 2 * 2 * 32 * 32 * 32 if gradient else 0
    assert products <= few - 8 * sums < 1.2 * products
    assert abs((many - 64 * sums) - (few - 8 * sums)) < 0.02 * products
    assert flops(64, 8, "gather", gradient) > 1.9 * many


def test_the_loop_makes_two_tiles_at_a_time():
    # of a loop the compiler counts the body once: two pairs, two layers, forward again and backward
    tile = 2 * 2 * 64 * 32 * 32
    for n, k in ((8, 4), (64, 4), (64, 8)):
        assert 6 * tile <= flops(n, k, "loop", True) < 10 * tile


def test_the_loop_keeps_nothing_of_a_tile():
    def memory(dispatch: str) -> int:
        analysis = compiled(8, 4, dispatch, True).memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # gather keeps at least the first layer's output for the backward pass: 32 pairs × 64 × 32 floats
    assert memory("gather") > 32 * 64 * 32 * 4
    # the loop, a few arrays of two pairs
    assert memory("loop") < 20 * 64 * 32 * 4
