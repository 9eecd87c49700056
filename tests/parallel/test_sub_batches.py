from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmsop_jax.config import default_config
from gmsop_jax.ops import average_pool, balance_loss, second_order_pool, top_k_gate
from gmsop_jax.training.step import create_state, make_train_step


def make_step(model: Any, optimizer: optax.GradientTransformation, *, balance_ddof: int = 1, **fields):
    train = default_config().train
    train.update(fields)
    step = make_train_step(model, optimizer, train, seed=0, mean_rgb=[9, 9, 9], balance_ddof=balance_ddof)
    return jax.jit(step)


class Plain(nn.Module):
    """A gated network with no batch norm and no draws, so that parts of a batch can equal the whole."""

    @nn.compact
    def __call__(self, images, *, train, gate_noise=None):
        x = nn.relu(nn.Conv(6, (3, 3))(images / 60)).reshape(images.shape[0], -1, 6)
        weights, _ = top_k_gate(nn.Dense(4)(average_pool(x)), 2)
        features = jnp.concatenate([second_order_pool(x, 3), weights], axis=-1)
        aux = {"features": features, "gate_weights": weights, "balance_loss": balance_loss(weights)}
        return nn.Dense(5)(features), aux


@pytest.fixture(scope="module")
def steps():
    model = Plain()
    optimizer = optax.sgd(0.1, momentum=0.9)
    made = {n: make_step(model, optimizer, sub_batches=n) for n in (1, 2, 4)}
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)), train=False)
    return made, create_state(variables, optimizer)


def batch(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rows)
    return {"image": rng.integers(0, 256, (rows, 5, 5, 3), np.uint8), "label": rng.integers(0, 5, rows).astype("i4")}


@pytest.fixture(scope="module")
def mixing_steps():
    """As `steps`, with mixup, label smoothing and averages."""
    model = Plain()
    optimizer = optax.sgd(0.1, momentum=0.9)
    options: dict[str, Any] = {"label_smoothing": 0.1, "mixup_alpha": 0.3, "ema_decay": 0.5}
    made = {n: make_step(model, optimizer, sub_batches=n, **options) for n in (1, 2)}
    variables = model.init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)), train=False)
    return made, create_state(variables, optimizer, averaged=True)


@pytest.mark.parametrize("sub_batches", [2, 4])
@pytest.mark.parametrize("rows", [12, 10, 7])  # 10 = 2 · 5 goes in two parts at most, 7 in one
def test_parts_equal_the_whole(steps, sub_batches, rows):
    assert_parts_equal_the_whole(steps, sub_batches, rows)


def test_pairs_are_mixed_before_the_batch_is_cut(mixing_steps):
    assert_parts_equal_the_whole(mixing_steps, 2, 10)  # in parts of five rows


def assert_parts_equal_the_whole(steps, sub_batches, rows):
    made, state = steps
    expected_state, expected = made[1](state, batch(rows))
    new_state, metrics = made[sub_batches](state, batch(rows))
    assert expected["balance_loss"] > 0.01
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), new_state, expected_state)


def test_parts_balance_what_the_whole_does():
    """The softmax over all candidates, its variance over n."""

    class Soft(Plain):
        @nn.compact
        def __call__(self, images, *, train, gate_noise=None):
            logits = nn.Dense(4)(jnp.mean(images, axis=(1, 2)) / 60)
            importance = jax.nn.softmax(logits)
            loss = balance_loss(importance, ddof=0)
            aux = {"gate_weights": top_k_gate(logits, 2)[0], "importance": importance, "balance_loss": loss}
            return logits, aux

    optimizer = optax.sgd(0.1, momentum=0.9)
    variables = Soft().init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)), train=False)
    state = create_state(variables, optimizer)
    whole, parts = (make_step(Soft(), optimizer, sub_batches=n, balance_ddof=0)(state, batch(12)) for n in (1, 3))
    assert whole[1]["balance_loss"] > 1e-4
    np.testing.assert_allclose(parts[1]["balance_loss"], whole[1]["balance_loss"], rtol=1e-5)
    np.testing.assert_allclose(parts[1]["grad_norm"], whole[1]["grad_norm"], rtol=1e-5)


def test_only_one_part_is_in_memory(steps):
    made, state = steps
    large = batch(512)

    def temporary_bytes(n):
        return made[n].lower(state, large).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(4) < 0.5 * temporary_bytes(1)
