import functools
import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gmsop_jax.ops import apply_candidates, second_order_candidates, second_order_pool, select_top_k
from gmsop_jax.ops.kernels import launch

TOLERANCE = 1e-5  # of the largest entry; 1e-6 is what sums of another order make


def features(b: int, p: int, c: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(b, p, c)), dtype)


def bank(n: int, widths: tuple[int, ...], dtype: str = "float32") -> list[jax.Array]:
    random = np.random.default_rng(n)
    return [jnp.asarray(random.normal(size=(n, i, o)) * (2 / i) ** 0.5, dtype) for i, o in itertools.pairwise(widths)]


def select(b: int, n: int, k: int) -> jax.Array:
    return select_top_k(jnp.asarray(np.random.default_rng(2).normal(size=(b, n))), k)


def plain(x: jax.Array, kernels: list[jax.Array], indices: jax.Array, num_iters: int) -> jax.Array:
    return apply_candidates(x, kernels, indices, functools.partial(second_order_pool, num_iters=num_iters), "gather")


def value_and_gradients(function, x, kernels, indices, num_iters=3):
    @jax.jit
    def both(x, kernels):
        y, pullback = jax.vjp(lambda x, kernels: function(x, kernels, indices, num_iters), x, kernels)
        return y, pullback(jnp.cos(3 * y))

    return jax.tree.leaves(both(x, kernels))


def check(x, kernels, indices, num_iters=3, tolerance=TOLERANCE):
    got = value_and_gradients(second_order_candidates, x, kernels, indices, num_iters)
    expected = value_and_gradients(plain, x, kernels, indices, num_iters)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())
    return got


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
def test_values_and_gradients_are_the_plain_version_s(num_iters):
    check(features(3, 64, 16), bank(4, (16, 32, 16)), select(3, 4, 2), num_iters)


@pytest.mark.parametrize(
    ("b", "p", "widths", "n", "k"),
    [
        (2, 35, (5, 24, 12), 3, 3),  # a map of 5 × 7, every candidate, no power of two
        (1, 130, (16, 32), 4, 1),  # one image, one candidate, one layer, three blocks of positions
        (2, 1, (8, 16), 2, 1),  # one position: Σ = 0
        (2, 70, (32,), 1, 1),  # no layer
        (1, 256, (128, 256, 128), 3, 2),  # the paper's
    ],
)
def test_of_many_sizes(b, p, widths, n, k):
    check(features(b, p, widths[0]), bank(n, widths), select(b, n, k))


def test_of_bfloat16():
    # the plain version also rounds its sums over pairs to 8 bits
    x, kernels, indices = features(2, 100, 16, "bfloat16"), bank(4, (16, 32, 16), "bfloat16"), select(2, 4, 2)
    got = check(x, kernels, indices, tolerance=2e-2)
    np.testing.assert_allclose(got[0], plain(x, kernels, indices, 3), atol=1e-3)


def test_a_large_mean_loses_no_digits():
    # Σ as the mean square less the squared mean would be wrong in its second digit: 3000² against float32's 2⁻²⁴
    x = features(1, 200, 16) + 3000
    expected = second_order_pool(x[:, None])
    np.testing.assert_allclose(second_order_candidates(x, [], jnp.zeros((1, 1), int)), expected, atol=1e-3)


def test_a_candidate_that_nobody_selected_has_zero_gradient():
    _, _, *slopes = check(features(3, 20, 16), bank(4, (16, 16, 16)), jnp.array([[0, 2]] * 3))
    for slope in slopes:
        assert [bool(np.any(slope[i] != 0)) for i in range(4)] == [True, False, True, False]


def test_a_zero_tile_has_zero_value_and_gradients():
    x, kernels = features(2, 20, 16).at[0].set(0), bank(2, (16, 16))
    got = value_and_gradients(second_order_candidates, x, kernels, jnp.array([[0], [1]]))
    for of_zero, of_another in map(np.asarray, got):
        assert not of_zero.any()
        assert np.all(np.isfinite(of_another))
        assert of_another.any()


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_each_platform_s_way_to_the_weights(platform):
    x, w, indices = features(2, 16, 16), bank(5, (16, 16))[0], jnp.array([[4, 1, 1], [0, 4, 3]], "int32")

    def kernel(x, readers, g, y, *, precision):
        y[...] = x[...] @ readers[0]() + g[...]

    g = features(6, 16, 16).reshape(2, 3, 16, 16)
    out = [jax.ShapeDtypeStruct(g.shape, "float32")]
    [y] = launch.call(kernel, platform, True, out, indices, x, [w], [g])
    np.testing.assert_allclose(y, x[:, None] @ w[indices] + g, atol=1e-5)


def test_outside_jit_and_under_vmap():
    x, kernels, indices = features(4, 20, 16), bank(4, (16, 16)), select(4, 4, 2)
    y = second_order_candidates(x, kernels, indices)
    apply = jax.vmap(second_order_candidates, in_axes=(0, None, 0))
    halves = apply(x.reshape(2, 2, 20, 16), kernels, indices.reshape(2, 2, 2))
    np.testing.assert_allclose(halves.reshape(y.shape), y, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "p", "dtype", "num_iters", "message"),
    [
        (ValueError, 4, "float32", 0, "num_iters must be at least 1"),
        (ValueError, 0, "float32", 3, "p ≥ 1 positions"),
        (TypeError, 4, "float16", 3, "float16"),
    ],
)
def test_what_is_refused(error, p, dtype, num_iters, message):
    with pytest.raises(error, match=message):
        second_order_candidates(features(1, p, 16, dtype), [], jnp.zeros((1, 1), int), num_iters)


def test_different_dtypes_are_refused():
    with pytest.raises(TypeError, match="bfloat16"):
        second_order_candidates(features(1, 4, 16), bank(2, (16, 16), "bfloat16"), jnp.zeros((1, 1), int))


def loss(x, kernels, indices):
    return jnp.sum(second_order_candidates(x, kernels, indices) ** 2)


def paper_shapes(dtype: str):
    """128 channels of 16 × 16 positions, through 8 of 16 candidates of 256 and 128."""
    shapes = [(4, 256, 128), (16, 128, 256), (16, 256, 128)]
    x, *kernels = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    return x, kernels, jax.ShapeDtypeStruct((4, 8), "int32")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("platform", "target"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton"), ("cpu", None)]
)
def test_lowers_for(platform, target, dtype):
    checks = [] if target is None else [jax.export.DisabledSafetyCheck.custom_call(target)]
    for function, kernels in ((loss, 1), (jax.grad(loss, (0, 1)), 2)):
        exported = jax.export.export(jax.jit(function), platforms=[platform], disabled_checks=checks)
        program = exported(*paper_shapes(dtype)).mlir_module()
        if target is None:
            assert "custom_call" not in program
        else:
            assert program.count(f"@{target}(") == kernels


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiles_for_a_tpu_where_none_is(dtype, monkeypatch):
    # all that a program keeps in VMEM must fit there
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    one = SingleDeviceSharding(device)
    for function in (loss, jax.grad(loss, (0, 1))):
        jitted = jax.jit(function, in_shardings=one, out_shardings=one)
        program = jitted.lower(*paper_shapes(dtype)).compile().as_text()
        assert program is not None
        assert "tpu_custom_call" in program


@pytest.mark.parametrize("gradient", [False, True])
def test_copies_no_weights(gradient):
    # apart from the kernel's own, nothing is as large as the pairs' weights, nor any product left to XLA
    function = jax.grad(loss, (0, 1)) if gradient else loss
    program = jax.jit(function).trace(*paper_shapes("float32")).lower(lowering_platforms=("tpu",)).as_text()
    assert "dot_general" not in program
    assert ("4x8x128x256" in program) == gradient
