"""The ops under pmap on eight devices; run by test_eight_devices.py in a process that has them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.ops import (
    apply_candidates,
    average_pool,
    balance_loss,
    covariance_pool,
    newton_schulz_sqrt,
    second_order_pool,
    top_k_gate,
    triangle_matrix,
    triangle_vector,
)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def features() -> jax.Array:
    return normal(8, 2, 6, 4)


SIGMA = covariance_pool(features())
FUNCTIONS = {
    "covariance_pool": (covariance_pool, features()),
    "newton_schulz_sqrt": (lambda s: newton_schulz_sqrt(s, 3), SIGMA),
    "triangle_vector": (triangle_vector, SIGMA),
    "triangle_matrix": (triangle_matrix, normal(8, 2, 10)),
    "straight_through": (lambda h: top_k_gate(h, 2)[0], normal(8, 3, 5)),
    "masked": (lambda h: top_k_gate(h, 2, "masked")[0], normal(8, 3, 5)),
}


def test_there_are_eight():
    assert jax.device_count() == 8


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_those_of_one_device(name):
    function, x = FUNCTIONS[name]

    def both(x):
        y, pullback = jax.vjp(function, x)
        return y, pullback(jnp.cos(y))[0]

    for got, expected in zip(jax.pmap(both)(x), jax.jit(both)(x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_candidates_are_those_of_one_device():
    kernels = [normal(5, 4, 3)]
    indices = top_k_gate(normal(16, 5), 2)[1].reshape(8, 2, 2)

    def both(x, indices):
        def loss(kernels):
            y = apply_candidates(x, kernels, indices, average_pool)
            return jnp.sum(jnp.cos(y)), y

        return jax.grad(loss, has_aux=True)(kernels)

    slopes, y = jax.pmap(both)(features(), indices)
    (slope,), expected = both(features().reshape(16, 6, 4), indices.reshape(16, 2))
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.sum(slopes[0], axis=0), slope, rtol=1e-4, atol=1e-5)


def test_balance_loss_is_that_of_the_global_batch():
    weights = jax.nn.softmax(normal(8, 3, 5))
    expected, slope = jax.value_and_grad(lambda w: balance_loss(w.reshape(24, 5)))(weights)
    got = jax.pmap(lambda w: balance_loss(w, "batch"), "batch")(weights)
    np.testing.assert_allclose(got, np.full(8, expected), rtol=1e-5)

    def mean_loss(weights):
        return jnp.mean(jax.pmap(lambda w: balance_loss(w, "batch"), "batch")(weights))

    np.testing.assert_allclose(jax.grad(mean_loss)(weights), slope, rtol=1e-4, atol=1e-7)


def test_a_sharded_batch_ties_as_a_whole():
    # one image anywhere that doesn't tie ends the draw everywhere
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    select = jax.jit(lambda h: top_k_gate(h, 2, rng=jax.random.key(0))[1])
    tied = jnp.ones((64, 6))
    np.testing.assert_array_equal(select(jax.device_put(tied, split)), select(tied))
    assert (np.asarray(select(tied)) != [0, 1]).any()
    mixed = tied.at[63, 5].set(2.0)
    expected = np.tile([0, 1], (64, 1))
    expected[63] = [5, 0]
    np.testing.assert_array_equal(select(jax.device_put(mixed, split)), expected)


@pytest.mark.parametrize("kind", ["shard_map", "jit"])
def test_masks_are_split_with_the_batch(kind):
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("batch")
    x = normal(16, 6, 4)
    mask = x[..., 0] < 0.5
    x = jnp.where(mask[..., None], x, jnp.nan)

    def both(x, mask):
        y, pullback = jax.vjp(lambda x: second_order_pool(x, where=mask), x)
        return y, pullback(jnp.cos(y))[0]

    mapped = jax.shard_map(both, mesh=mesh, in_specs=(rows, rows), out_specs=(rows, rows))
    run = mapped if kind == "shard_map" else both
    placed = jax.device_put((x, mask), jax.sharding.NamedSharding(mesh, rows))
    for got, expected in zip(jax.jit(run)(*placed), both(x, mask), strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
