import jax
import jax.numpy as jnp
import numpy as np

from gmsop_jax.training.step import cross_entropy


def test_by_hand():
    # −ln softmax: ln 4 for four equal logits; logits ln 3 and 0: −ln ¾ and −ln ¼
    assert float(cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))) == np.float32(np.log(4))
    logits = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 1])), np.log(4 / 3) + np.log(4), rtol=1e-6)


def test_padding_counts_nothing():
    logits = jnp.array([[1.0, 0.0], [jnp.nan, 5.0]])
    labels, mask = jnp.array([0, 0]), jnp.array([True, False])
    np.testing.assert_allclose(cross_entropy(logits, labels, mask), np.log1p(np.exp(-1)), rtol=1e-6)


def test_large_logits_do_not_overflow():
    assert float(cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([0]))) == 0
    assert float(cross_entropy(jnp.array([[1e4, -1e4]]), jnp.array([1]))) == 2e4


def test_gradient_is_softmax_less_one():
    slope = jax.grad(lambda x: cross_entropy(x, jnp.array([1])))(jnp.zeros((1, 4)))
    np.testing.assert_allclose(slope, [[0.25, -0.75, 0.25, 0.25]], rtol=1e-6)


def test_smoothing_by_hand():
    # ¼ over two classes: q = (⅞, ⅛); −ln softmax is −ln ¾ and −ln ¼
    logits = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
    expected = 7 / 8 * np.log(4 / 3) + 1 / 8 * np.log(4)
    np.testing.assert_allclose(cross_entropy(logits[:1], jnp.array([0]), smoothing=0.25), expected, rtol=1e-6)
    mask = jnp.array([True, False])
    np.testing.assert_allclose(cross_entropy(logits, jnp.array([0, 1]), mask, smoothing=0.25), expected, rtol=1e-6)
    # at its least the softmax is q
    slope = jax.grad(lambda x: cross_entropy(x, jnp.array([0]), smoothing=0.25))(jnp.log(jnp.array([[7.0, 1.0]])))
    np.testing.assert_allclose(slope, [[0.0, 0.0]], atol=1e-6)
