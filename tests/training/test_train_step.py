from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmsop_jax.config import default_config
from gmsop_jax.models import BatchNorm, GatedMixtureHead, Network
from gmsop_jax.training import step
from gmsop_jax.training.step import TrainState, create_state, draw_share, make_eval_step, normalize, step_rngs

MEAN = np.array([100.0, 50.0, 0.0], np.float32)


def make_train_step(model, optimizer, *, seed: int = 0, **fields):
    train = default_config().train
    train.update(fields)
    return step.make_train_step(model, optimizer, train, seed=seed, mean_rgb=MEAN, balance_ddof=1)


def batch(b: int = 6, **more) -> dict[str, Any]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, size=(b, 4, 4, 3), dtype=np.uint8)
    return {"image": jnp.asarray(images), "label": jnp.arange(b) % 3, **more}


class Linear(nn.Module):
    """Three logits, linear in the mean colour, and a balance loss of b²."""

    @nn.compact
    def __call__(self, images, *, train=False, gate_noise=None):
        del train, gate_noise
        b = self.param("b", nn.initializers.constant(3.0), ())
        logits = nn.Dense(3, kernel_init=nn.initializers.zeros)(images.mean((1, 2)) / 100)
        return logits, {"balance_loss": b**2}


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        return nn.relu(BatchNorm()(nn.Dense(5)(images / 60), train=train))


def start(model: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return create_state(model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))), optimizer)


@pytest.fixture(scope="module")
def gated():
    """A network with gate and dropout, its compiled step for seed 1, and the state before the first step."""
    head = GatedMixtureHead(
        3, num_candidates=4, num_selected=2, candidate_widths=(4, 3), gate_widths=(3,), dropout_rate=0.5
    )
    model, optimizer = Network(Backbone(), head), optax.sgd(0.01)
    step = jax.jit(make_train_step(model, optimizer, seed=1))
    return model, step, start(model, optimizer)


def difference(a: Any, b: Any) -> float:
    return max(float(jnp.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_normalize_by_hand():
    image = jnp.array([[[[110, 50, 255]]]], jnp.uint8)
    pixels = normalize(image, MEAN)
    assert pixels.dtype == jnp.float32
    assert pixels.tolist() == [[[[10.0, 0.0, 255.0]]]]


def test_loss_is_mean_cross_entropy_and_alpha_over_b_times_the_balance_loss():
    # zero weights: each cross entropy is ln 3, and d/dlogits = 1/3 − onehot; the balance loss is 9, its slope 6
    model, optimizer = Linear(), optax.sgd(1.0)
    state = start(model, optimizer)
    data = batch()
    new, metrics = jax.jit(make_train_step(model, optimizer, balance_weight=20.0))(state, data)
    np.testing.assert_allclose(metrics["loss_sum"], 6 * np.log(3), rtol=1e-6)
    assert float(metrics["balance_loss"]) == 9
    np.testing.assert_allclose(new.params["b"], 3.0 - 20 / 6 * 6, rtol=1e-6)
    x = (np.asarray(data["image"], np.float32) - MEAN).mean((1, 2)) / 100
    residual = 1 / 3 - np.eye(3)[np.asarray(data["label"])]
    np.testing.assert_allclose(new.params["Dense_0"]["kernel"], -x.T @ residual / 6, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(new.params["Dense_0"]["bias"], [0, 0, 0], atol=1e-6)
    slopes = np.concatenate([(x.T @ residual / 6).ravel(), [20.0]])
    np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(slopes), rtol=1e-5)


def test_smaller_batch_is_divided_by_its_own_size():
    model, optimizer = Linear(), optax.sgd(1.0)
    state = start(model, optimizer)
    new, metrics = jax.jit(make_train_step(model, optimizer, balance_weight=20.0))(state, batch(4))
    np.testing.assert_allclose(new.params["b"], 3.0 - 20 / 4 * 6, rtol=1e-6)
    assert int(metrics["count"]) == 4


def test_counts_are_of_the_logits_before_the_step():
    # equal logits: class 0 is guessed; two of six are of class 0
    model, optimizer = Linear(), optax.sgd(1.0)
    _, metrics = jax.jit(make_train_step(model, optimizer))(start(model, optimizer), batch())
    assert {name: int(metrics[name]) for name in ("top1_errors", "top5_errors", "count")} == {
        "top1_errors": 4,
        "top5_errors": 0,
        "count": 6,
    }


def test_state_moves(gated):
    _, step, state = gated
    new, _ = step(state, batch())
    assert int(new.step) == 1
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert difference(new.params, state.params) > 0
    # 0.7 · old + 0.3 · batch, of the backbone's batch norm
    moments = state.batch_stats["backbone"]["BatchNorm_0"], new.batch_stats["backbone"]["BatchNorm_0"]
    dense = state.params["backbone"]["Dense_0"]
    x = (np.asarray(batch()["image"], np.float32) - MEAN) / 60 @ np.asarray(dense["kernel"]) + np.asarray(dense["bias"])
    np.testing.assert_allclose(moments[1]["mean"], 0.3 * x.mean((0, 1, 2)), rtol=1e-3, atol=1e-5)
    sigma = np.sqrt(x.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(moments[1]["sigma"], 0.7 + 0.3 * sigma, rtol=1e-3)


def test_all_that_is_random_is_a_function_of_seed_and_step(gated):
    model, step, state = gated
    new, metrics = step(state, batch())
    again, same = step(state, batch())
    assert difference((new, metrics), (again, same)) == 0
    _, later = step(state.replace(step=jnp.int32(7)), batch())
    assert float(later["loss_sum"]) != float(metrics["loss_sum"])
    other = jax.jit(make_train_step(model, optax.sgd(0.01), seed=2))
    assert float(other(state, batch())[1]["loss_sum"]) != float(metrics["loss_sum"])


def test_streams_differ_from_each_other_and_from_step_to_step():
    keys = [jax.random.key_data(k).tolist() for step in (0, 1) for k in step_rngs(3, jnp.int32(step)).values()]
    keys += [jax.random.key_data(k).tolist() for k in step_rngs(4, jnp.int32(0)).values()]
    assert set(step_rngs(3, jnp.int32(0))) == {"gating", "dropout"}
    assert len({tuple(key) for key in keys}) == 6


def test_one_program_for_all_steps(gated):
    _, step, state = gated
    traced = []

    @jax.jit
    def counted(state, batch):
        traced.append(state)
        return step(state, batch)

    for _ in range(3):
        state, _ = counted(state, batch())
    assert len(traced) == 1


def asks_the_host(program: str) -> bool:
    return any(word in program for word in ("infeed", "outfeed", " send(", " recv(", "callback"))


def test_the_program_never_asks_the_host(gated):
    _, step, state = gated
    assert not asks_the_host(step.lower(state, batch()).compile().as_text() or "")
    control = jax.jit(lambda x: jax.pure_callback(lambda x: x, x, x)).lower(jnp.ones(2)).compile()
    assert asks_the_host(control.as_text() or "")


def test_gate_noise_of_the_batch_replaces_the_draw(gated):
    _, step, state = gated
    gate = state.params["head"]["mixture"]["gate"]
    uneven = jax.tree.map(lambda leaf: leaf, state.params)
    for i, name in enumerate(("kernel", "noise_kernel")):
        uneven["head"]["mixture"]["gate"][name] = jax.random.normal(jax.random.key(i), gate[name].shape)
    state = state.replace(params=uneven)
    losses = [float(step(state, batch(gate_noise=jnp.full(6, g)))[1]["balance_loss"]) for g in (0.0, 0.0, 3.0)]
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_leaves_out_padding_and_needs_no_rng(gated):
    model, _, state = gated
    evaluate = jax.jit(make_eval_step(model, mean_rgb=MEAN, flip_average=False))
    whole = evaluate(state.variables, batch(mask=jnp.ones(6, bool)))
    padded = {name: jnp.concatenate([x, jnp.zeros_like(x[:2])]) for name, x in batch().items()}
    mask = jnp.array([True] * 6 + [False] * 2)
    with_padding = evaluate(state.variables, {**padded, "mask": mask})
    for name, value in whole.items():
        np.testing.assert_allclose(with_padding[name], value, rtol=1e-6, err_msg=name)
    assert int(whole["count"]) == 6


def test_a_network_without_batch_norm_can_be_trained():
    model, optimizer = Linear(), optax.sgd(1.0)
    state = start(model, optimizer)
    assert state.batch_stats == {}
    new, _ = jax.jit(make_train_step(model, optimizer))(state, batch())
    assert new.batch_stats == {}


# ---- mixup, smoothing and averages


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("rows", [6, 5])  # the odd last row is mixed with itself
def test_loss_and_gradient_with_mixup_and_smoothing_against_numpy(rows):
    model, optimizer = Linear(), optax.sgd(1.0)
    state = start(model, optimizer).replace(step=jnp.int32(3))
    kernel = np.random.default_rng(1).normal(size=(3, 3))
    state.params["Dense_0"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    step = make_train_step(model, optimizer, seed=5, label_smoothing=0.1, mixup_alpha=0.4)
    data = batch(rows)
    new, metrics = jax.jit(step)(state, data)

    share = float(draw_share(5, jnp.int32(3), 0.4))
    neighbour = np.array([1, 0, 3, 2, 5, 4])[:rows] if rows == 6 else np.array([1, 0, 3, 2, 4])
    x = (np.asarray(data["image"], np.float64) - MEAN).mean((1, 2)) / 100
    x = share * x + (1 - share) * x[neighbour]
    onehot = np.eye(3)[np.asarray(data["label"])]
    targets = share * onehot + (1 - share) * onehot[neighbour]
    targets = 0.9 * targets + 0.1 / 3
    probabilities = softmax(x @ kernel)
    np.testing.assert_allclose(metrics["loss_sum"], -np.sum(targets * np.log(probabilities)), rtol=1e-5)
    slope = x.T @ (probabilities - targets) / rows
    np.testing.assert_allclose(new.params["Dense_0"]["kernel"], kernel - slope, rtol=1e-4, atol=1e-5)
    wrong = np.argmax(probabilities, -1) != np.asarray(data["label"])  # against the own label
    assert int(metrics["top1_errors"]) == wrong.sum()


def test_averages_follow_the_steps():
    model, optimizer = Linear(), optax.sgd(0.1)
    state = create_state(model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 3))), optimizer, averaged=True)
    assert difference(state.evaluated, state.variables) == 0
    step = jax.jit(make_train_step(model, optimizer, ema_decay=0.15), donate_argnums=0)
    expected = float(state.params["b"])
    for d in (0.1, 0.15, 0.15):  # 1/10, then no more than the decay, as 2/11 and 3/12 are
        state, _ = step(state, batch())
        expected = d * expected + (1 - d) * float(state.params["b"])
        np.testing.assert_allclose(state.evaluated["params"]["b"], expected, rtol=1e-6)
    assert float(state.params["b"]) != pytest.approx(expected)


class Corner(nn.Module):
    """Logits linear in the first pixel, which a mirror image has at the other end of its row."""

    @nn.compact
    def __call__(self, images, *, train=False):
        del train
        return nn.Dense(3)(images[:, 0, 0] / 100), {"gate_weights": images[:, 0, 0, :2]}


def test_evaluation_with_mirror_images():
    model, data = Corner(), batch(mask=jnp.ones(6, bool))
    variables = model.init(jax.random.key(1), jnp.zeros((1, 4, 4, 3)))
    got = jax.jit(make_eval_step(model, mean_rgb=MEAN, flip_average=True))(variables, data)
    corners = np.asarray(data["image"], np.float64)[:, 0, [0, -1]] - MEAN
    kernel = np.asarray(variables["params"]["Dense_0"]["kernel"], np.float64)
    logits = (corners / 100 @ kernel).mean(1)
    loss = -np.log(softmax(logits)[np.arange(6), np.asarray(data["label"])]).sum()
    np.testing.assert_allclose(got["loss_sum"], loss, rtol=1e-5)
    np.testing.assert_allclose(got["gate_weight_sum"], corners.mean(1).sum(0)[:2], rtol=1e-5)
    once = jax.jit(make_eval_step(model, mean_rgb=MEAN, flip_average=False))(variables, data)
    assert abs(float(once["loss_sum"]) - loss) > 1e-3
