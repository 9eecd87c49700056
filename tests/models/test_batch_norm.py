from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.models import BatchNorm

EPSILON = 1e-5


def norm(**fields) -> Any:
    """Flax declares `apply` as giving almost anything."""
    return BatchNorm(**fields)


def variables(mean=0.0, sigma=1.0, scale=1.0, bias=0.0):
    return {
        "params": {"scale": jnp.array([scale]), "bias": jnp.array([bias])},
        "batch_stats": {"mean": jnp.array([mean]), "sigma": jnp.array([sigma])},
    }


def test_starts_at_identity():
    x = jnp.array([[2.0], [4.0]])
    fresh = norm().init(jax.random.key(0), x, train=True)
    assert jax.tree.map(float, jax.tree.map(jnp.squeeze, fresh)) == {
        "params": {"scale": 1.0, "bias": 0.0},
        "batch_stats": {"mean": 0.0, "sigma": 1.0},
    }
    np.testing.assert_array_equal(norm().apply(fresh, x, train=False), x)


def test_training_by_hand():
    # x = 2, 4: μ = 3, biased variance 1, σ = √(1 + 1e-5); y = scale · ±1/σ + bias
    x = jnp.array([[2.0], [4.0]])
    y, updates = norm().apply(variables(1.0, 2.0, 10.0, 5.0), x, train=True, mutable=["batch_stats"])
    sigma = np.sqrt(1 + EPSILON)
    np.testing.assert_allclose(y, [[5 - 10 / sigma], [5 + 10 / sigma]], rtol=1e-6)
    # running moments: 0.7 · old + 0.3 · batch, of μ and of σ itself
    moments = updates["batch_stats"]
    np.testing.assert_allclose(moments["mean"], [0.7 * 1 + 0.3 * 3], rtol=1e-6)
    np.testing.assert_allclose(moments["sigma"], [0.7 * 2 + 0.3 * sigma], rtol=1e-6)


def test_evaluation_by_hand_divides_by_the_running_sigma_without_epsilon():
    y = norm().apply(variables(3.0, 0.002, 2.0, 1.0), jnp.array([[3.004]]), train=False)
    np.testing.assert_allclose(y, [[5.0]], rtol=1e-3)  # 2 · 0.004/0.002 + 1; √(0.002² + ε) would give 2.1


def test_moments_are_over_all_axes_but_the_last():
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, size=(2, 4, 5, 3)).astype(np.float32))
    fresh = norm().init(jax.random.key(0), x, train=False)
    y, updates = norm(running_rate=1.0).apply(fresh, x, train=True, mutable=["batch_stats"])
    flat = np.asarray(y, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(flat.std(0), 1, rtol=1e-4)
    np.testing.assert_allclose(updates["batch_stats"]["sigma"], np.asarray(x).reshape(-1, 3).std(0), rtol=1e-4)


def test_half_precision_input_has_float32_moments():
    x = (
        jnp.full((4, 64, 64, 1), 300, jnp.bfloat16).at[0].set(304)
    )  # the square of 300 needs more than bfloat16's digits
    y, updates = norm(dtype=jnp.bfloat16).apply(variables(), x, train=True, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    moments = updates["batch_stats"]
    assert moments["mean"].dtype == moments["sigma"].dtype == jnp.float32
    # mean 301, variance ¾ · 1 + ¼ · 9 = 3; the square of the mean in float32 is exact to 0.008
    np.testing.assert_allclose(moments["mean"], [0.3 * 301], rtol=1e-5)
    np.testing.assert_allclose(moments["sigma"], [0.7 + 0.3 * np.sqrt(3)], rtol=2e-3)


def test_moments_over_a_mapped_axis_are_those_of_the_whole_batch():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32))
    fresh = norm().init(jax.random.key(0), x[0], train=False)
    whole, updates = norm().apply(fresh, x.reshape(24, 3), train=True, mutable=["batch_stats"])

    def part(x):
        return norm(axis_name="batch").apply(fresh, x, train=True, mutable=["batch_stats"])

    parts, part_updates = jax.vmap(part, axis_name="batch")(x)
    np.testing.assert_allclose(parts.reshape(24, 3), whole, rtol=1e-5, atol=1e-6)
    for name, value in updates["batch_stats"].items():
        np.testing.assert_allclose(part_updates["batch_stats"][name], [value] * 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_follows_the_input(x64, dtype):
    x = jnp.ones((2, 3), dtype)
    fresh = norm().init(jax.random.key(0), x, train=False)
    fresh = jax.tree.map(lambda leaf: leaf.astype(dtype), fresh)
    assert norm().apply(fresh, x, train=False).dtype == dtype


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("first_image_is_far", [False, True])
@pytest.mark.parametrize("ratio", [1, 1000, 3000, 10_000, -10_000])
def test_a_mean_far_above_sigma_costs_no_digits(ratio, first_image_is_far, devices):
    """On a CPU, the largest error of PyTorch 2.13 is 4e-5 at a ratio of 1,000 and 7e-4 at 10,000."""
    x = np.random.default_rng(0).normal(ratio, 1, size=(32, 16, 16, 3)).astype(np.float32)
    if first_image_is_far:
        x[0] += 5
    flat = x.astype(np.float64).reshape(-1, 3)
    exact = ((x - flat.mean(0)) / np.sqrt(flat.var(0) + EPSILON)).astype(np.float64)
    fresh = norm().init(jax.random.key(0), x, train=False)

    def run(x):
        return norm(running_rate=1.0, axis_name="batch").apply(fresh, x, train=True, mutable=["batch_stats"])

    y, updates = jax.vmap(run, axis_name="batch")(x.reshape(devices, -1, *x.shape[1:]))
    assert np.abs(np.asarray(y).reshape(x.shape) - exact).max() <= 3e-5
    moments = jax.tree.map(lambda leaf: leaf[0], updates["batch_stats"])
    np.testing.assert_allclose(moments["mean"], flat.mean(0), rtol=3e-7, atol=1e-6)
    np.testing.assert_allclose(moments["sigma"], np.sqrt(flat.var(0) + EPSILON), rtol=1e-5)


def test_evaluation_of_a_mean_far_above_sigma_costs_no_digits():
    x = jnp.array([[10_000.0], [10_001.0]])
    y = norm().apply(variables(10_000.0, 3.0, 1.0, 0.5), x, train=False)
    np.testing.assert_allclose(y, [[0.5], [0.5 + 1 / 3]], rtol=1e-6)


def test_the_shift_changes_no_gradient(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, size=(4, 5, 2)))

    def ours(x):
        fresh = variables()
        fresh = jax.tree.map(lambda leaf: jnp.tile(leaf.astype(x.dtype), 2), fresh)
        return jnp.sum(jnp.sin(norm().apply(fresh, x, train=True, mutable=["batch_stats"])[0]))

    def plain(x):
        return jnp.sum(jnp.sin((x - x.mean((0, 1))) / jnp.sqrt(x.var((0, 1)) + EPSILON)))

    np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(plain)(x), rtol=1e-10, atol=1e-12)
