import jax
import jax.numpy as jnp
import numpy as np
import optax

from gmsop_jax.optimizer import create_optimizer, piecewise_schedule


def test_schedule_boundaries():
    # 3 steps an epoch: 0.1 for steps 0…5 (two epochs), 0.01 for 6…8, then 0.001 for ever
    schedule = piecewise_schedule(((0.1, 2), (0.01, 1), (0.001, 1)), 3)
    expected = [0.1] * 6 + [0.01] * 3 + [0.001] * 3 + [0.001] * 5
    np.testing.assert_allclose(np.array([schedule(step) for step in range(17)]), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(schedule)(6), 0.01, rtol=1e-6)


def test_a_single_rate():
    assert piecewise_schedule(((0.1, 2),), 3)(100) == 0.1


def params():
    return {
        "backbone": {"stem": {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}, "x": {"kernel": jnp.array([2.0])}},
        "head": {"stem": {"kernel": jnp.array([2.0])}},
    }


def test_two_steps_by_hand():
    optimizer = create_optimizer(lambda _: 0.1, momentum=0.9, weight_decay=0.5, pixel_scale=10.0)
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
    optimizer = create_optimizer(lambda _: 0.1, pixel_scale=1.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params()), optimizer.init(params()), params())
    assert len({float(leaf[0]) for leaf in jax.tree.leaves(updates)}) == 1


def test_published_stem_rate():
    # lr/3600 for pixels that are mean-subtracted but not scaled
    optimizer = create_optimizer(lambda _: 0.1, weight_decay=0.0)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params()), optimizer.init(params()), params())
    np.testing.assert_allclose(updates["backbone"]["stem"]["kernel"], [-0.1 / 3600], rtol=1e-6)  # pyright: ignore
    np.testing.assert_allclose(updates["backbone"]["stem"]["bias"], [-0.1], rtol=1e-6)  # pyright: ignore


def test_the_stem_moves_as_with_scaled_pixels():
    # y = k · x at x = 60 u is the plain y = (60 k) · u: with no decay, k at lr/3600 is 60 k at lr, over 60
    optimizer = create_optimizer(lambda _: 0.1, weight_decay=0.0)
    plain = create_optimizer(lambda _: 0.1, weight_decay=0.0, pixel_scale=1.0)
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
