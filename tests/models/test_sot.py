"""The head of SoT against its formulas in slow float64 NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax import ops
from gmsop_jax.models import CrossCovarianceHead

KEY = jax.random.key(0)


def tokens() -> np.ndarray:
    return np.random.default_rng(0).normal(1, 1, size=(2, 7, 6))


def normalized(c, start, alpha):
    u = c @ start / np.linalg.norm(c @ start)
    v = c.T @ u / np.linalg.norm(c.T @ u)
    s = u @ c @ v
    return s**alpha * np.outer(u, v) + (c - s * np.outer(u, v)) / (s ** (1 - alpha) + 1e-5)


def test_the_head_is_its_formulas(x64):
    head: Any = CrossCovarianceHead(5, num_heads=3, head_width=4, power=0.3)
    x = tokens()
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), head.init(KEY, jnp.asarray(x)))
    logits, aux = jax.jit(head.apply)(variables, jnp.asarray(x))
    params = jax.tree.map(np.asarray, variables["params"])
    expected = []
    for image in x:
        q, k = (image @ params["queries_keys"]["kernel"]).reshape(7, 2, 3, 4).transpose(1, 2, 0, 3)
        matrices = [(a - a.mean(0)).T @ (b - b.mean(0)) / 7 for a, b in zip(q, k, strict=True)]
        expected.append(np.ravel([normalized(c, params["start"], 0.3) for c in matrices]))
    np.testing.assert_allclose(aux["features"], expected, rtol=1e-10, atol=1e-12)
    classifier = params["classifier"]
    np.testing.assert_allclose(logits, np.array(expected) @ classifier["kernel"] + classifier["bias"], rtol=1e-10)


def test_the_gradient_is_the_finite_difference(x64):
    c, start = jnp.asarray(tokens()[:, :6]), jnp.linspace(-1, 2, 6)
    rng = np.random.default_rng(1)
    direction = jnp.asarray(rng.normal(size=c.shape)), jnp.asarray(rng.normal(size=start.shape))

    @jax.jit
    def loss(c, start):
        return jnp.sum(jnp.sin(ops.normalize_singular_value(c, start)))

    slopes = jax.jit(jax.grad(loss, (0, 1)))(c, start)
    slope = sum(jnp.vdot(a, b) for a, b in zip(slopes, direction, strict=True))
    step = 1e-6
    above, below = (loss(c + sign * step * direction[0], start + sign * step * direction[1]) for sign in (1, -1))
    np.testing.assert_allclose(slope, (above - below) / (2 * step), rtol=1e-6)


def test_a_zero_matrix_gives_zero_and_a_finite_gradient():
    zero, start = jnp.zeros((3, 3)), jnp.ones(3)
    assert not ops.normalize_singular_value(zero, start).any()
    assert np.isfinite(jax.grad(lambda c: jnp.sum(ops.normalize_singular_value(c, start)))(zero)).all()


def test_shapes_without_positions_or_of_other_keys_are_refused(unchecked_types):
    for queries, keys in (((2, 0, 3), (2, 0, 3)), ((2, 4, 3), (2, 5, 3)), ((3,), (3,))):
        with pytest.raises(ValueError, match=r"of one shape \[\.\.\., p, r\] with p ≥ 1"):
            ops.cross_covariance_pool(jnp.ones(queries), jnp.ones(keys))
    with pytest.raises(ValueError, match="2 heads of width 3 need 12 channels, got 10"):
        ops.multi_head_cross_covariance_pool(jnp.ones((1, 4, 10)), jnp.ones(3), 2)
    with pytest.raises(ValueError, match=r"needs tokens \[b, p, c\], got shape \(4, 12\)"):
        ops.multi_head_cross_covariance_pool(jnp.ones((4, 12)), jnp.ones(3), 2)
