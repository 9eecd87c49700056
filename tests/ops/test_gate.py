import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmsop_jax.ops import balance_loss, select_top_k, selection_weights, top_k_gate

KEY = jax.random.key(0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- which are selected


def test_selected_by_hand():
    # softmax over the logits ln 1 and ln 3 of candidates 3 and 1: ¼ and ¾
    weights, indices = top_k_gate(jnp.log(jnp.array([[0.1, 3.0, 0.5, 1.0]])), 2)
    np.testing.assert_array_equal(indices, [[1, 3]])
    np.testing.assert_allclose(weights, [[0, 0.75, 0, 0.25]], rtol=1e-6)


def test_softmax_over_all_by_hand():
    # softmax of ln (4, 3, 2, 1) is (4, 3, 2, 1)/10; the two smallest are dropped, and the rest stays as it is
    logits = jnp.log(jnp.array([[4.0, 3.0, 2.0, 1.0]]))
    weights = selection_weights(logits, jnp.array([[0, 1]]), softmax="all")
    np.testing.assert_allclose(weights, [[0.4, 0.3, 0, 0]], rtol=1e-6)


def test_gradient_of_the_softmax_over_all_by_hand():
    # ∂wᵢ/∂hⱼ = wᵢ(δᵢⱼ − pⱼ) for p the softmax over all; masked: of the selected w₀ alone, straight-through: of any
    logits = jnp.log(jnp.array([[4.0, 3.0, 2.0, 1.0]]))

    def slope(candidate, gradient):
        def weight(h):
            return selection_weights(h, jnp.array([[0, 1]]), gradient, "all")[0, candidate]

        return np.asarray(jax.grad(weight)(logits))[0]

    np.testing.assert_allclose(slope(0, "masked"), 0.4 * np.array([0.6, -0.3, -0.2, -0.1]), rtol=1e-5)
    np.testing.assert_allclose(slope(0, "straight_through"), slope(0, "masked"), rtol=1e-5)
    np.testing.assert_array_equal(slope(3, "masked"), np.zeros(4))
    np.testing.assert_allclose(slope(3, "straight_through"), 0.1 * np.array([-0.4, -0.3, -0.2, 0.9]), rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_k_nonzeros_that_sum_to_one(seed, k):
    logits = 5 * normal(5, 6, seed=seed)
    weights, indices = (np.asarray(a) for a in top_k_gate(jnp.asarray(logits), k))
    assert ((weights > 0).sum(-1) == k).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(indices), np.sort(np.argsort(-logits, -1)[:, :k]))
    assert (np.take_along_axis(weights, indices, -1) > 0).all()


def test_variance_over_n():
    weights = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])  # s = (1.5, .5, 0): squares about ⅔ sum to 7/6
    np.testing.assert_allclose(balance_loss(weights), (7 / 6 / 2) / (4 / 9), rtol=1e-6)
    np.testing.assert_allclose(balance_loss(weights, ddof=0), (7 / 6 / 3) / (4 / 9), rtol=1e-6)


def test_one_of_all_and_all_of_all():
    logits = jnp.asarray(normal(4, 5))
    one, index = top_k_gate(logits, 1)
    np.testing.assert_array_equal(one, np.eye(5)[np.asarray(index)[:, 0]])
    every, indices = top_k_gate(logits, 5)
    np.testing.assert_allclose(every, softmax(np.asarray(logits)), rtol=1e-6)
    np.testing.assert_array_equal(np.sort(indices), [list(range(5))] * 4)


def test_a_selected_logit_of_exactly_zero_keeps_its_weight():
    weights, _ = top_k_gate(jnp.array([[0.0, -1.0, -2.0]]), 2)  # the authors' code drops it
    np.testing.assert_allclose(weights, [[*softmax(np.array([0.0, -1.0])), 0]], rtol=1e-6)


@pytest.mark.parametrize("rng", [None, KEY])
def test_ties_at_the_threshold_drop_the_higher_index(rng):
    logits = jnp.array([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]])  # the second image makes it no tie of all
    np.testing.assert_array_equal(select_top_k(logits, 2, rng), [[1, 2], [3, 0]])


# ---- the draw where all tie


def test_all_tied_without_key_takes_the_lowest():
    np.testing.assert_array_equal(select_top_k(jnp.ones((3, 5)), 2), [[0, 1]] * 3)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
def test_all_tied_with_key_draws_for_each_image(value):
    indices = np.asarray(select_top_k(jnp.full((400, 8), value), 3, KEY))
    assert all(len(set(row)) == 3 for row in indices)
    counts = np.bincount(indices.ravel(), minlength=8)
    # 400 images × 3 of 8: mean 150, standard deviation √(400 · 3/8 · 5/8) = 9.7; five of them either side
    assert (abs(counts - 150) < 49).all()
    assert len({tuple(sorted(row)) for row in indices}) > 40  # of 56 subsets
    np.testing.assert_array_equal(indices, select_top_k(jnp.full((400, 8), value), 3, KEY))
    assert (indices != np.asarray(select_top_k(jnp.full((400, 8), value), 3, jax.random.key(1)))).any()


def test_images_may_tie_at_different_values():
    logits = jnp.broadcast_to(jnp.arange(50.0)[:, None], (50, 8))
    assert (np.asarray(select_top_k(logits, 2, KEY)) != [0, 1]).any()


def test_rounding_does_not_hide_a_tie():
    # equal columns of a matrix product need not come out equal in bits
    eps = np.finfo(np.float32).eps
    logits = np.full((50, 8), 3, np.float32)
    logits[:, 5] += 4 * eps  # two units in the last place
    assert len(np.unique(logits)) == 2
    counts = np.bincount(np.asarray(select_top_k(jnp.asarray(logits), 2, KEY)).ravel(), minlength=8)
    assert (counts > 0).all()
    assert counts[5] < 40
    logits[:, 5] += 1e-4  # a real difference
    assert (np.asarray(select_top_k(jnp.asarray(logits), 2, KEY))[:, 0] == 5).all()


def test_weights_after_a_draw_are_equal():
    weights, _ = top_k_gate(jnp.ones((6, 8)), 4, rng=KEY)
    np.testing.assert_array_equal(np.sort(weights), [[0, 0, 0, 0, 0.25, 0.25, 0.25, 0.25]] * 6)


def test_no_draw_where_all_are_selected():
    np.testing.assert_array_equal(select_top_k(jnp.ones((3, 4)), 4, KEY), [[0, 1, 2, 3]] * 3)


# ---- gradients


def pullback(function, logits, g):
    return np.asarray(jax.vjp(function, jnp.asarray(logits))[1](jnp.asarray(g))[0])


def test_straight_through_is_hard_forward_and_soft_backward():
    logits, g = normal(4, 6), normal(4, 6, seed=1)
    weights, _ = top_k_gate(jnp.asarray(logits), 2)
    hard, _ = top_k_gate(jnp.asarray(logits), 2, "masked")
    np.testing.assert_array_equal(weights, hard)
    got = pullback(lambda h: top_k_gate(h, 2)[0], logits, g)
    np.testing.assert_array_equal(got, pullback(jax.nn.softmax, logits, g))
    assert (got != 0).all()  # over all candidates, selected or not


def test_straight_through_by_hand():
    # soft weights of equal logits are ¼; d softmax/dh = diag(s) − s sᵀ; with cotangent e₀: (¼ − 1/16, −1/16, …)
    got = pullback(lambda h: top_k_gate(h, 2)[0], np.zeros((1, 4), np.float32), [[1.0, 0, 0, 0]])
    np.testing.assert_allclose(got, [[3 / 16, -1 / 16, -1 / 16, -1 / 16]], rtol=1e-6)


def test_masked_gradient_is_that_of_the_selected():
    # selected 0 and 1 with weights ½ each: ½·½ = ¼ for cotangent e₀; nothing for the others
    logits = np.array([[1.0, 1.0, 0.0, -1.0]], np.float32)
    got = pullback(lambda h: top_k_gate(h, 2, "masked")[0], logits, [[1.0, 0, 5, 7]])
    np.testing.assert_allclose(got, [[0.25, -0.25, 0, 0]], rtol=1e-6)


def test_gradients_agree_where_all_are_selected():
    logits, g = normal(3, 4), normal(3, 4, seed=1)
    masked = pullback(lambda h: top_k_gate(h, 4, "masked")[0], logits, g)
    np.testing.assert_allclose(pullback(lambda h: top_k_gate(h, 4)[0], logits, g), masked, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["straight_through", "masked"])
def test_under_jit_vmap_and_grad(mode):
    logits = jnp.asarray(normal(3, 4, 6))

    def both(h):
        weights, indices = top_k_gate(h, 2, mode)
        return weights, indices, jax.grad(lambda h: jnp.sum(top_k_gate(h, 2, mode)[0][:, 1] ** 2))(h)

    plain = [both(h) for h in logits]
    for got, expected in zip(jax.jit(jax.vmap(both))(logits), zip(*plain, strict=True), strict=True):
        np.testing.assert_allclose(got, np.stack(expected), rtol=1e-5, atol=1e-7)


def test_dtypes(x64):
    for given_dtype, dtype in ((jnp.bfloat16, jnp.float32), (jnp.float32, jnp.float32), (jnp.float64, jnp.float64)):
        weights, indices = top_k_gate(jnp.asarray(normal(2, 4), given_dtype), 2)
        assert weights.dtype == dtype
        assert jnp.issubdtype(indices.dtype, jnp.integer)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(ValueError, match=f"between 1 and the number of candidates 4, got {k}"):
        top_k_gate(jnp.ones((2, 4)), k)


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_gradient_is_refused():
    with pytest.raises(ValueError, match="got 'hard'"):
        selection_weights(jnp.ones((2, 4)), jnp.zeros((2, 1), jnp.int32), "hard")  # pyright: ignore[reportArgumentType]


# ---- the balance loss


def test_balance_loss_by_hand():
    # usage (1.5, 0.5, 1): mean 1, squares of deviations ¼ + ¼ + 0, over N − 1 = 2
    weights = jnp.array([[0.5, 0.5, 0.0], [1.0, 0.0, 1.0]])
    np.testing.assert_allclose(balance_loss(weights), 0.25, rtol=1e-6)
    np.testing.assert_allclose(balance_loss(7 * weights), 0.25, rtol=1e-6)  # no unit


def test_balance_loss_of_even_use_and_of_one_candidate():
    assert balance_loss(jnp.full((4, 3), 0.25)) == 0
    single = jnp.array([[1.0], [0.5]])
    assert balance_loss(single) == 0
    np.testing.assert_array_equal(jax.grad(balance_loss)(single), np.zeros((2, 1)))
    # all on one of n: deviations 1 − 1/n and n − 1 times −1/n, sum of squares 1 − 1/n; over (n − 1)/n²: n
    np.testing.assert_allclose(balance_loss(jnp.eye(5)[:1]), 5, rtol=1e-6)


def test_balance_loss_gradient_by_hand():
    # two candidates, usage (a, b): L = ½(a − b)²/¼(a + b)² = 2((a − b)/(a + b))²
    # a = 3, b = 1: dL/da = 4(a − b)/(a + b) · 2b/(a + b)² = 4 · ½ · ⅛ = ¼; dL/db = −4 · ½ · 2a/(a + b)² = −¾
    slope = jax.grad(balance_loss)(jnp.array([[1.0, 0.5], [2.0, 0.5]]))
    np.testing.assert_allclose(slope, [[0.25, -0.75]] * 2, rtol=1e-6)


def test_balance_loss_over_a_mapped_axis_is_that_of_the_whole_batch():
    weights = jax.nn.softmax(jnp.asarray(normal(4, 3, 5)))  # four parts of three images
    whole, slope = jax.value_and_grad(lambda w: balance_loss(w.reshape(12, 5)))(weights)
    parts = jax.vmap(lambda w: balance_loss(w, "batch"), axis_name="batch")(weights)
    np.testing.assert_allclose(parts, np.full(4, whole), rtol=1e-5)
    assert abs(np.mean([balance_loss(w) for w in weights]) - whole) > 0.1 * whole  # not the mean of the parts'
    mapped = jax.grad(lambda w: jax.vmap(lambda w: balance_loss(w, "batch"), axis_name="batch")(w).mean())(weights)
    np.testing.assert_allclose(mapped, slope, rtol=1e-4, atol=1e-7)
