"""Adaptive channel dropout against the authors' steps on features, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax import ops

KEY = jax.random.key(0)
KERNEL = np.array([0.5, -1.0, 2.0])


def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 6, 64))


@jax.jit
def ours(x, kernel):
    attention = ops.channel_attention(ops.average_pool(x), kernel)
    return ops.adaptive_channel_dropout(ops.covariance_pool(x), attention, KEY)


def attended(x, kernel):
    """(a, x · a + x) of one image, by definition."""
    mean = [0, *x.mean(0), 0]
    h = np.array([sum(kernel[j] * mean[i + j] for j in range(3)) for i in range(x.shape[1])])
    a = np.exp(h) / np.exp(h).sum()
    return a, x * a + x


def cosine(a, x):
    row_sums = np.cov(x, rowvar=False, bias=True).sum(-1)
    return a @ row_sums / np.linalg.norm(a) / np.linalg.norm(row_sums)


def test_training_is_the_authors_steps(x64):
    x = features()
    pairs = [attended(image, KERNEL) for image in x]
    rate = 1 - 10 / math.log2(64) * np.mean([cosine(a, y) for a, y in pairs])
    assert 0.1 < rate < 0.9
    kept = np.asarray(jax.random.uniform(KEY, (3, 64))) >= rate
    dropped = [y * mask / (1 - rate) for (_, y), mask in zip(pairs, kept, strict=True)]
    expected = [np.cov(y, rowvar=False, bias=True) for y in dropped]
    np.testing.assert_allclose(ours(jnp.asarray(x), jnp.asarray(KERNEL)), expected, rtol=1e-11, atol=1e-13)


def test_rates_stay_between_0_and_1():
    attention = jnp.full((1, 2), 0.5)
    # cosine 1 and log₂ 2 = 1: 1 − 10; cosine −1: 1 + 10
    assert ops.channel_dropout_rate(jnp.eye(2)[None], attention) == 0
    assert ops.channel_dropout_rate(-jnp.eye(2)[None], attention) == 1


def test_gradients_are_those_with_a_constant_rate(x64):
    x, kernel = jnp.asarray(features()), jnp.asarray(KERNEL)
    kept = jnp.any(ours(x, kernel) != 0, axis=-1)

    def on_features(x, kernel):
        a = ops.channel_attention(jnp.mean(x, axis=1), kernel)
        x = x + x * a[:, None]
        rate = ops.channel_dropout_rate(ops.covariance_pool(x), a)
        return ops.covariance_pool(x * (kept / (1 - rate))[:, None])

    def slopes(function):
        return jax.jit(jax.grad(lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel))), (0, 1)))(x, kernel)

    for got, expected in zip(slopes(ours), slopes(on_features), strict=True):
        assert expected.any()
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_rate_and_draw_are_those_of_the_whole_batch(x64):
    x = jnp.asarray(features())

    def part(x):
        attention = ops.channel_attention(ops.average_pool(x), KERNEL)
        return ops.adaptive_channel_dropout(ops.covariance_pool(x), attention, KEY, axis_name="batch")

    split = jax.jit(jax.vmap(part, axis_name="batch"))
    np.testing.assert_allclose(split(x[:, None])[:, 0], ours(x, KERNEL), rtol=1e-12)


def test_images_that_do_not_count_and_zero_covariances(x64):
    x = jnp.asarray(features()).at[1].set(0)
    a, where = ops.channel_attention(ops.average_pool(x), KERNEL), jnp.array([True, False, True])
    rate = ops.channel_dropout_rate(ops.covariance_pool(x), a, where=where)
    np.testing.assert_allclose(rate, ops.channel_dropout_rate(ops.covariance_pool(x[::2]), a[::2]), rtol=1e-12)
    slope = jax.grad(lambda x: jnp.sum(ours(x, KERNEL)))(jnp.zeros_like(x))
    assert not slope.any()  # everything is dropped: the cosine is 0, and the rate 1


def test_a_kernel_of_another_length_is_refused(unchecked_types):
    for shape in ((2,), (5,), (3, 1)):
        with pytest.raises(ValueError, match=r"needs a kernel of shape \(3,\), got \("):
            ops.channel_attention(jnp.ones((2, 4)), jnp.ones(shape))
