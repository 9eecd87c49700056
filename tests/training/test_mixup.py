import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.training.step import MIXUP_STREAM, draw_share, mix_batch, step_rngs, swap_neighbours


def test_by_hand():
    images = jnp.array([10, 30, 200, 100, 7], jnp.uint8).reshape(5, 1, 1, 1)
    mixed = mix_batch({"image": images, "label": jnp.arange(5), "more": jnp.arange(5)}, jnp.float32(0.75))
    assert mixed["image"].ravel().tolist() == [15, 25, 175, 125, 7]
    assert mixed["image"].dtype == jnp.float32
    assert mixed["label"].tolist() == mixed["more"].tolist() == [0, 1, 2, 3, 4]
    assert mixed["other_label"].tolist() == [1, 0, 3, 2, 4]


def test_a_single_row_is_mixed_with_itself():
    assert swap_neighbours(jnp.array([[3, 4]])).tolist() == [[3, 4]]


def test_share_is_a_function_of_seed_and_step():
    shares = jax.jit(jax.vmap(lambda step: draw_share(0, step, 0.2)))(jnp.arange(2000))
    assert float(shares[7]) == pytest.approx(float(draw_share(0, jnp.int32(7), 0.2)))
    assert float(draw_share(1, jnp.int32(7), 0.2)) != pytest.approx(float(shares[7]))
    assert 0.5 <= shares.min() < 0.6
    # E max(λ, 1 − λ) of Beta(0.2, 0.2), by NumPy
    drawn = np.random.default_rng(0).beta(0.2, 0.2, 100_000)
    np.testing.assert_allclose(shares.mean(), np.maximum(drawn, 1 - drawn).mean(), atol=0.02)


def test_its_stream_differs_from_those_of_the_network():
    own = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), MIXUP_STREAM)
    others = step_rngs(3, jnp.int32(5)).values()
    keys = [tuple(jax.random.key_data(key).tolist()) for key in (own, *others)]
    assert len(set(keys)) == 3
