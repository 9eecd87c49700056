"""Heads on tokens and maps with a mask: the result is that of the input without the masked positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.models import (
    BatchNorm,
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    GAPHead,
    Gate,
    GatedMixtureHead,
    MixtureHead,
    MPNCOVHead,
    SecondOrderHead,
)

KEY = jax.random.key(0)
BANK: dict[str, Any] = {"num_candidates": 4, "candidate_widths": (7, 3), "dropout_rate": 0.0}
GATED: dict[str, Any] = {**BANK, "num_selected": 2, "gate_widths": (5, 4), "gate_init": "random"}
HEADS: dict[str, Any] = {
    "gap": GAPHead(5),
    "sop": CovarianceHead(5),
    "srsop": SecondOrderHead(5, (8, 4), True),
    "mpncov": MPNCOVHead(5, (4,)),
    "dropcov": DropCovHead(5, (8, 4), True),
    "sot": CrossCovarianceHead(5, num_heads=2, head_width=3),
    "avegap": MixtureHead(5, **BANK, order=1),
    "concatsop": MixtureHead(5, **BANK, combine="concatenate"),
    "gmgap": GatedMixtureHead(5, **GATED, order=1),
    "gmsop, gather": GatedMixtureHead(5, **GATED, dispatch="gather"),
    "gmsop, loop": GatedMixtureHead(5, **GATED, dispatch="loop", balance_on="softmax"),
}
every_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
some_heads = pytest.mark.parametrize("head", [HEADS["srsop"], HEADS["gmsop, gather"]], ids=["srsop", "gmsop"])

MASK = np.array([[1, 0, 1, 1, 0, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]], bool)


def tokens(dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(0).gamma(2.0, size=(3, 9, 6)).astype(dtype)


def garbage(x: np.ndarray, mask: np.ndarray) -> jax.Array:
    """The features with NaN and infinity in place of what is masked."""
    broken = np.where(np.arange(x.shape[-1]) % 2, np.nan, np.inf)
    return jnp.asarray(np.where(mask[..., None], x, broken).astype(x.dtype))


def train(head, variables, x, **options) -> Any:
    """(logits and aux, batch statistics, gradients of the parameters and of x)."""

    @jax.jit
    def run(params, x, options):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x, options)

    def loss(params, x, options):
        noise = jnp.arange(len(x)) - 1.0
        out, updates = head.apply(
            {**variables, "params": params},
            x,
            train=True,
            gate_noise=noise,
            rngs={"dropout": KEY},
            mutable=["batch_stats"],
            **options,
        )
        return jnp.sum(jnp.sin(out[0])) + out[1]["balance_loss"], (out, updates)

    (_, (out, updates)), slopes = run(variables["params"], x, options)
    return out, updates, *slopes


def assert_close(got, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = max(1, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * scale, err_msg=str(path))


@every_head
def test_masked_tokens_equal_shortened_tokens(x64, head):
    x = tokens()
    shortened = jnp.asarray(x[MASK].reshape(3, 6, 6))
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), jax.jit(head.init)(KEY, shortened))
    *expected, expected_slope = train(head, variables, shortened)
    *got, slope = train(head, variables, garbage(x, MASK), where=MASK)
    assert_close(got, expected, 1e-12)
    assert_close(slope[MASK].reshape(3, 6, 6), expected_slope, 1e-12)
    assert not slope[~MASK].any()


@some_heads
def test_evaluation_with_masked_tokens_in_float32(head):
    x = tokens(np.float32)
    shortened = jnp.asarray(x[MASK].reshape(3, 6, 6))
    run = jax.jit(head.apply)
    variables = jax.jit(head.init)(KEY, shortened)
    assert_close(run(variables, garbage(x, MASK), where=MASK), run(variables, shortened), 3e-6)


@some_heads
def test_maps_equal_tokens(head):
    x, run = tokens(np.float32), jax.jit(head.apply, static_argnames="train")
    maps, mask = jnp.asarray(x.reshape(3, 3, 3, 6)), MASK.reshape(3, 3, 3)
    variables = jax.jit(head.init)(KEY, maps)
    for masks in ({}, {"where": mask}):
        flat = {name: value.reshape(3, 9) for name, value in masks.items()}
        for a, b in zip(
            jax.tree.leaves(run(variables, maps, **masks)), jax.tree.leaves(run(variables, x, **flat)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@some_heads
def test_an_image_with_no_position_left_counts_nowhere(x64, head):
    x, mask = tokens(), MASK.copy()
    mask[1] = False
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), jax.jit(head.init)(KEY, jnp.asarray(x)))

    @jax.jit
    def run(x, mask, kept):
        def loss(params, x):  # without the logits of the empty image, which depend on the parameters
            (logits, aux), updates = head.apply(
                {**variables, "params": params}, x, True, jnp.zeros(len(x)), mask, mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(logits[kept])) + aux["balance_loss"], (logits[kept], aux, updates)

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)

    (slopes, dx), (logits, aux, updates) = run(garbage(x, mask), mask, jnp.array([0, 2]))
    (expected_slopes, _), (expected, expected_aux, expected_updates) = run(
        garbage(x, mask)[::2], mask[::2], jnp.array([0, 1])
    )
    assert not aux["features"][1].any()
    assert not dx[1].any()
    got = slopes, logits, aux["balance_loss"], updates
    assert_close(got, (expected_slopes, expected, expected_aux["balance_loss"], expected_updates), 1e-12)


@some_heads
def test_a_batch_with_no_position_at_all_is_finite(head):
    x = tokens(np.float32)
    variables = jax.jit(head.init)(KEY, jnp.asarray(x))
    out, updates, *slopes = train(head, variables, garbage(x, MASK & False), where=MASK & False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, updates, slopes)))
    if updates:
        assert_close(updates["batch_stats"], variables["batch_stats"], 0)


@some_heads
def test_weights_equal_repeated_positions(x64, head):
    x, counts = tokens(), np.array([2, 0, 1, 3, 1, 1, 0, 2, 1])
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), jax.jit(head.init)(KEY, jnp.asarray(x)))
    weights = jnp.asarray(np.tile(counts, (3, 1)))
    *expected, _ = train(head, variables, jnp.asarray(np.repeat(x, counts, axis=1)))
    *got, _ = train(head, variables, jnp.asarray(x), where=weights)
    assert_close(got, expected, 1e-12)


@some_heads
@pytest.mark.usefixtures("unchecked_types")
def test_a_mask_of_another_shape_is_refused(head):
    x = jnp.asarray(tokens(np.float32))
    for shape in ((9,), (3, 8), (3, 1), (3, 3, 3), (3, 9, 6)):
        with pytest.raises(ValueError, match=r"one entry for each position, shape \(3, 9\) .* got shape"):
            head.init(KEY, x, where=jnp.ones(shape, bool))


# ---- batch norm


def test_moments_of_masked_rows_over_devices(x64):
    """Parts with different numbers of rows weigh in the moments by these numbers."""
    x = np.random.default_rng(1).normal(100, 2, size=(4, 6, 3))
    mask = np.arange(6) < np.array([[6], [1], [0], [3]])
    norm: Any = BatchNorm(axis_name="batch")
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), norm.init(KEY, jnp.asarray(x[0])))

    def part(x, mask):
        return norm.apply(variables, x, train=True, where=mask, mutable=["batch_stats"])

    y, updates = jax.vmap(part, axis_name="batch")(garbage(x, mask), mask)
    rows = x[mask]
    sigma = np.sqrt(rows.var(0) + 1e-5)
    np.testing.assert_allclose(y[mask], (rows - rows.mean(0)) / sigma, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], np.tile(0.3 * rows.mean(0), (4, 1)), rtol=1e-12)
    np.testing.assert_allclose(updates["batch_stats"]["sigma"], np.tile(0.7 + 0.3 * sigma, (4, 1)), rtol=1e-12)


def test_masked_rows_with_a_mean_far_above_sigma_cost_no_digits():
    x = np.random.default_rng(1).normal(3000, 1, size=(8, 64, 2)).astype(np.float32)
    mask = np.arange(64) > 30 * np.ones((8, 1))
    mask[0] = False
    norm: Any = BatchNorm(running_rate=1.0)
    _, updates = norm.apply(norm.init(KEY, x), garbage(x, mask), train=True, where=mask, mutable=["batch_stats"])
    np.testing.assert_allclose(updates["batch_stats"]["sigma"], x[mask].astype(np.float64).std(0), rtol=1e-4)


def test_a_norm_without_masks_still_serves():
    class Plain(nn.Module):
        dtype: Any = None

        @nn.compact
        def __call__(self, x, train):
            return x

    x = jnp.ones((2, 4, 3))
    head: Any = SecondOrderHead(5, (4,), True, Plain)
    assert head.apply(head.init(KEY, x), x)[0].shape == (2, 5)


def test_a_gate_by_itself_takes_a_mask(x64):
    x = tokens()
    gate: Any = Gate(4, num_selected=2, gate_widths=(5,), gate_init="random")
    shortened = jnp.asarray(x[MASK].reshape(3, 6, 6))
    variables = jax.tree.map(lambda leaf: leaf.astype(x.dtype), gate.init(KEY, shortened))
    run = jax.jit(gate.apply)
    assert_close(run(variables, jnp.asarray(x), where=MASK), run(variables, shortened), 1e-12)
