from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmsop_jax.config import ConfigDict, default_config
from gmsop_jax.errors import ConfigError
from gmsop_jax.training.optimizer import create_optimizer, create_schedule, rate_factor_tree


def section(**fields: Any) -> ConfigDict:
    """`config.train` with some fields changed."""
    train = default_config().train
    train.update(fields)
    return train


def schedule_of(rates, steps_per_epoch: int, kind: str = "steps", warmup_epochs: float = 0.0) -> optax.Schedule:
    return create_schedule(section(learning_rates=rates, schedule=kind, warmup_epochs=warmup_epochs), steps_per_epoch)


def optimizer_of(schedule: optax.Schedule, pixel_scale: float = 60.0, **fields: Any):
    return create_optimizer(section(**fields), schedule, pixel_scale)


def test_schedule_boundaries():
    # 3 steps an epoch: 0.1 for steps 0…5 (two epochs), 0.01 for 6…8, then 0.001 forever
    schedule = schedule_of(((0.1, 2), (0.01, 1), (0.001, 1)), 3)
    expected = [0.1] * 6 + [0.01] * 3 + [0.001] * 3 + [0.001] * 5
    np.testing.assert_allclose(np.array([schedule(step) for step in range(17)]), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(6), 0.01, rtol=1e-6)


def test_a_single_rate():
    assert schedule_of(((0.1, 2),), 3)(100) == 0.1


def rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    return np.array([schedule(step) for step in range(steps)])


def test_cosine_by_hand():
    # 8 steps from 0.4: at an eighth, a quarter, a half of π …, then 0
    schedule = schedule_of(((0.4, 2),), 4, kind="cosine")
    expected = [0.2 * (1 + np.cos(np.pi * t / 8)) for t in range(8)] + [0, 0, 0]
    assert expected[4] == pytest.approx(0.2)
    np.testing.assert_allclose(rates(schedule, 11), expected, rtol=1e-5)
    assert rates(schedule, 100)[8:].tolist() == [0] * 92


def test_warm_up_rises_to_what_the_schedule_says():
    # 2 epochs of 3 steps: sixths of 0.6 to the end of its epoch, then of 0.06, then the schedule itself
    schedule = schedule_of(((0.6, 1), (0.06, 2)), 3, warmup_epochs=2.0)
    np.testing.assert_allclose(rates(schedule, 8), [0.1, 0.2, 0.3, 0.04, 0.05, 0.06, 0.06, 0.06], rtol=1e-6)
    cosine = rates(schedule_of(((0.4, 2),), 4, kind="cosine"), 9)
    warm = rates(schedule_of(((0.4, 2),), 4, kind="cosine", warmup_epochs=0.5), 9)
    np.testing.assert_allclose(warm, [cosine[0] / 2, *cosine[1:]], rtol=1e-6)


def test_unknown_optimizers_and_schedules_are_refused():
    with pytest.raises(ValueError, match="must be steps or cosine, got 'linear'"):
        schedule_of(((0.1, 1),), 3, kind="linear")
    with pytest.raises(ValueError, match="must be sgd or adamw, got 'lion'"):
        optimizer_of(lambda _: 0.1, optimizer="lion")


def params():
    return {
        "backbone": {"stem": {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, "x": {"kernel": jnp.array([2.0])}},
        "head": {"stem": {"kernel": jnp.array([2.0])}},
    }


def test_two_steps_by_hand():
    optimizer = optimizer_of(lambda _: 0.1, momentum=0.9, weight_decay=0.5, pixel_scale=10.0)
    p = params()
    state = optimizer.init(p)
    # first:  g = 1 + 0.5 · 2 = 2,      m = 2,               p = 2 − 0.1 · 2 = 1.8
    # second: g = 1 + 0.5 · 1.8 = 1.9,  m = 0.9 · 2 + 1.9 = 3.7, p = 1.8 − 0.37 = 1.43; no Nesterov
    # the stem's kernel at 0.1/10² = 0.001:
    # first:  p = 2 − 0.002 = 1.998;  second: g = 1.999, m = 3.799, p = 1.998 − 0.003799 = 1.994201
    for others, stem in ((1.8, 1.998), (1.43, 1.994201)):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, p), state, p)
        p = optax.apply_updates(p, updates)
        expected = jax.tree.map(lambda leaf, value=others: jnp.full_like(leaf, value), params())
        expected["backbone"]["stem"]["kernel"] = jnp.array([stem])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), p, expected)


def test_the_stem_is_as_any_other_at_pixel_scale_one():
    optimizer = optimizer_of(lambda _: 0.1, pixel_scale=1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params()), optimizer.init(params()), params())
    assert len({float(leaf[0]) for leaf in jax.tree.leaves(updates)}) == 1


def test_published_stem_rate():
    # lr/3600 for pixels that are mean-subtracted but not scaled
    optimizer = optimizer_of(lambda _: 0.1, weight_decay=0.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params()), optimizer.init(params()), params())
    np.testing.assert_allclose(updates["backbone"]["stem"]["kernel"], [-0.1 / 3600], rtol=1e-6)  # pyright: ignore
    np.testing.assert_allclose(updates["backbone"]["stem"]["bias"], [-0.1], rtol=1e-6)  # pyright: ignore


def test_the_stem_moves_as_with_scaled_pixels():
    # y = k · x at x = 60 u is the plain y = (60 k) · u: with no decay, k at lr/3600 is 60 k at lr, over 60
    optimizer = optimizer_of(lambda _: 0.1, weight_decay=0.0)
    plain = optimizer_of(lambda _: 0.1, weight_decay=0.0, pixel_scale=1.0)
    u = 0.7

    def tree(value):
        return {"backbone": {"stem": {"kernel": jnp.array([value])}}}

    raw, scaled = tree(0.05), tree(60 * 0.05)
    raw_state, scaled_state = optimizer.init(raw), plain.init(scaled)
    for _ in range(3):
        slope = jax.grad(lambda p: jnp.sum((p["backbone"]["stem"]["kernel"] * 60 * u - 1) ** 2))(raw)
        updates, raw_state = optimizer.update(slope, raw_state, raw)
        raw = optax.apply_updates(raw, updates)
        slope = jax.grad(lambda p: jnp.sum((p["backbone"]["stem"]["kernel"] * u - 1) ** 2))(scaled)
        updates, scaled_state = plain.update(slope, scaled_state, scaled)
        scaled = optax.apply_updates(scaled, updates)
        a, b = (jax.tree.leaves(p)[0] for p in (raw, scaled))
        np.testing.assert_allclose(60 * a, b, rtol=1e-5)


# ---- other optimisers, against NumPy


def train(optimizer: optax.GradientTransformation, start: Any, slopes: list[float]) -> Any:
    """Parameters after one step for each slope; in a step, all gradients equal the slope."""
    p, state = start, optimizer.init(start)
    for slope in slopes:
        updates, state = optimizer.update(jax.tree.map(lambda leaf, s=slope: jnp.full_like(leaf, s), p), state, p)
        p = optax.apply_updates(p, updates)
    return p


SLOPES = [0.3, -2.0, 0.7, 0.1]


@pytest.mark.parametrize("pixel_scale", [1.0, 60.0])
def test_adamw_against_numpy(x64, pixel_scale):
    optimizer = optimizer_of(
        lambda step: 0.01 / (1 + step), optimizer="adamw", momentum=0.8, beta2=0.99, weight_decay=0.05,
        pixel_scale=pixel_scale,
    )  # fmt: skip
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params())
    got = train(optimizer, start, SLOPES)
    for part, scale in (("x", 1.0), ("stem", pixel_scale)):
        p, m, v = 2.0, 0.0, 0.0
        for t, g in enumerate(SLOPES, 1):
            m, v = 0.8 * m + 0.2 * g, 0.99 * v + 0.01 * g**2
            adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            p -= 0.01 / t * (adam / scale + 0.05 * p)
        np.testing.assert_allclose(got["backbone"][part]["kernel"], [p], rtol=1e-12)


def test_adamw_moves_the_stem_as_with_scaled_pixels(x64):
    # as above for SGD, with decay too: k that meets 60 u is K = 60 k that meets u
    raw, scaled = ({"backbone": {"stem": {"kernel": jnp.array([k])}}} for k in (0.05, 60 * 0.05))
    options: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.1}
    optimizer, plain = (optimizer_of(lambda _: 0.1, pixel_scale=s, **options) for s in (60.0, 1.0))
    a = train(optimizer, raw, [60 * s for s in SLOPES])["backbone"]["stem"]["kernel"]
    b = train(plain, scaled, SLOPES)["backbone"]["stem"]["kernel"]
    np.testing.assert_allclose(60 * a, b, rtol=1e-7)  # equal except for Adam's 10⁻⁸


def test_nesterov_against_numpy(x64):
    optimizer = optimizer_of(lambda _: 0.1, momentum=0.9, nesterov=True, weight_decay=0.5, pixel_scale=1.0)
    got = train(optimizer, {"w": jnp.array([2.0])}, SLOPES)
    p, m = 2.0, 0.0
    for slope in SLOPES:
        g = slope + 0.5 * p
        m = 0.9 * m + g
        p -= 0.1 * (g + 0.9 * m)
    np.testing.assert_allclose(got["w"], [p], rtol=1e-12)


def test_the_default_keeps_the_state_of_older_checkpoints():
    before = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.trace(decay=0.9),
        optax.masked(optax.scale(1.0), lambda tree: jax.tree.map(lambda _: False, tree)),
        optax.scale_by_learning_rate(lambda _: 0.1),
    )
    now = optimizer_of(lambda _: 0.1)
    assert jax.tree.structure(now.init(params())) == jax.tree.structure(before.init(params()))


# ---- factors of the rates


def test_rate_factors():
    factors = (("backbone", 0.5), ("backbone/stem", 0), ("head/stem/kernel", 2.0), ("backbone/stem/bias", 0.25))
    plain, scaled = (
        train(optimizer_of(lambda _: 0.1, pixel_scale=1.0, weight_decay=0.3, rate_factors=f), params(), [0.7])
        for f in ((), factors)
    )
    moved = jax.tree.map(lambda a, b: float((b - 2)[0] / (a - 2)[0]), plain, scaled)
    expected = {
        "backbone": {"stem": {"kernel": 0, "bias": 0.25}, "x": {"kernel": 0.5}},
        "head": {"stem": {"kernel": 2}},
    }
    assert jax.tree.leaves(moved) == pytest.approx(jax.tree.leaves(expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_frozen_part_keeps_its_bits(kind):
    optimizer = optimizer_of(lambda _: 0.1, optimizer=kind, rate_factors=[("backbone", 0)])
    got = train(optimizer, params(), [*SLOPES, np.inf])
    jax.tree.map(np.testing.assert_array_equal, got["backbone"], params()["backbone"])
    assert not np.array_equal(got["head"]["stem"]["kernel"], [2.0])


def test_the_last_of_the_pairs_that_match_holds():
    tree = {"backbone": {"stage1_block1": 0, "stage1_block10": 0}}
    factors = rate_factor_tree(tree, [("backbone/stage1_block1", 3), ("backbone", 0.5)])
    assert factors == {"backbone": {"stage1_block1": 0.5, "stage1_block10": 0.5}}
    factors = rate_factor_tree(tree, [("backbone", 0.5), ("backbone/stage1_block1", 3)])
    assert factors == {"backbone": {"stage1_block1": 3, "stage1_block10": 0.5}}  # whole names


@pytest.mark.parametrize(
    ("part", "hint"),
    [
        ("backbone/sten", "did you mean backbone/stem"),
        ("classifier", "parts are backbone, head and what they contain"),
        ("backbone/", "did you mean backbone"),
    ],
)
def test_an_unknown_part_is_refused(part, hint):
    optimizer = optimizer_of(lambda _: 0.1, rate_factors=[("backbone", 0.1), (part, 0.1)])
    with pytest.raises(ConfigError, match=f"config.train.rate_factors names '{part}', .*; {hint}"):
        optimizer.init(params())


# ---- skipped steps


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_a_skipped_step_shifts_no_later_rate_and_no_bias_correction(kind):
    """The optimiser's counts follow the training step, also after an update was left out."""
    optimizer = optimizer_of(lambda step: 0.1 / (1 + step), optimizer=kind, weight_decay=0.0)
    p = params()
    state, updates = optimizer.init(p), {}
    grads = jax.tree.map(jnp.ones_like, p)
    for step in (0, 1, 4):  # steps 2 and 3 are skipped
        updates, state = optimizer.update(grads, state, p, step=jnp.int32(step))
        counts = [int(count) for _, count in optax.tree.get_all_with_path(state, "count")]
        assert counts == [step + 1] * len(counts) != []
    # SGD: m = 1 + 0.9 + 0.81.  Adam: three of five gradients of 1, so m = 0.271 and v = 0.002997 at t = 5.
    adam = 0.271 / (1 - 0.9**5) / np.sqrt(0.002997 / (1 - 0.999**5))
    expected = -0.1 / 5 * {"sgd": 2.71, "adamw": adam}[kind]
    np.testing.assert_allclose(jax.tree.leaves(updates)[-1], [expected], rtol=1e-4)
