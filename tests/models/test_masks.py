"""Heads on tokens and maps with a mask: the result is that of the input without the masked positions."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
from gmsop_jax.nnx import from_linen

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
    "avesop": MixtureHead(5, **BANK),
    "gmgap": GatedMixtureHead(5, **GATED, order=1),
    "gmsop, gather": GatedMixtureHead(5, **GATED, dispatch="gather"),
    "gmsop, group": GatedMixtureHead(5, **GATED, dispatch="group"),
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


def create(head: Any, x: np.ndarray) -> Any:
    """The variables of a Linen head, in the dtype of x."""
    variables = jax.jit(head.init)(KEY, jnp.asarray(x))
    return jax.tree.map(lambda leaf: leaf.astype(x.dtype), variables)


def run(head: Any, variables: Any, x: Any, *, train: bool = True, with_nnx: bool = False, **options: Any) -> Any:
    """(logits and aux, batch statistics, gradients of the parameters and of x).

    The loss does not depend on the logits of images after the third.
    """

    def loss(output):
        logits, aux = output
        return jnp.vdot(jnp.sin(jnp.arange(15.0)), logits[:3]) + aux["balance_loss"]

    def of_linen(params, x, noise, options):
        variables_now = {**variables, "params": params}
        rngs = {"dropout": KEY}
        output, updates = head.apply(
            variables_now, x, train=train, gate_noise=noise, rngs=rngs, mutable=["batch_stats"], **options
        )
        return loss(output), (output, updates)

    def of_nnx(params, x, noise, options):
        module: Any = nnx.merge(graph, params, jax.tree.map(jnp.asarray, others))
        output = module(x, train, noise, **options)
        return loss(output), (output, nnx.state(module, nnx.BatchStat))

    params = variables["params"]
    if with_nnx:
        graph, params, others = nnx.split(from_linen(head, variables), nnx.Param, ...)
    slope = jax.value_and_grad(of_nnx if with_nnx else of_linen, (0, 1), has_aux=True)
    (_, (output, updates)), slopes = jax.jit(slope)(params, x, jnp.arange(len(x)) - 1.0, options)
    return output, updates, *slopes


def assert_close(got, expected, tolerance):
    """The largest difference of each array is at most `tolerance` of its largest entry, or of 1 if that is larger."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = max(1, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=str(path))


def relative_norm(got, expected):
    """‖got − expected‖/‖expected‖ over all arrays together."""
    expected = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(expected)]
    differences = [a - b for a, b in zip(jax.tree.leaves(got), expected, strict=True)]
    return np.sqrt(sum(np.sum(a**2) for a in differences) / sum(np.sum(b**2) for b in expected))


@every_head
@pytest.mark.parametrize(
    ("dtype", "with_nnx"), [(np.float64, False), (np.float32, True)], ids=["float64 linen", "float32 nnx"]
)
def test_masked_equals_shortened(head, dtype, with_nnx):
    """The masked batch also contains a fourth image without any position, which changes nothing."""
    # Training normalises by the moments of three images, which can enlarge the rounding of float32, with or without a
    # mask. In float32, this test therefore evaluates. Gradients of parameters have twice the tolerance: they are sums
    # over all positions, in another order, and each of the two is as far from that in float64.
    form, train, tolerance = ((9,), True, 1e-12) if dtype == np.float64 else ((3, 3), False, 1e-6)
    with jax.enable_x64(dtype == np.float64):
        x, mask = np.zeros((4, 9, 6), dtype), np.zeros((4, 9), bool)
        x[:3], mask[:3] = tokens(dtype), MASK
        shortened = x[mask].reshape(3, 6, 6)
        variables = create(head, shortened)
        *expected, expected_slope = run(head, variables, jnp.asarray(shortened), train=train, with_nnx=with_nnx)
        masked = garbage(x, mask).reshape(4, *form, 6)
        where = jnp.asarray(mask.reshape(4, *form))
        *got, slope = run(head, variables, masked, train=train, with_nnx=with_nnx, where=where)
        (logits, aux), updates, slopes = got
        assert not aux["features"][3].any()
        first_three = {name: value if name == "balance_loss" else value[:3] for name, value in aux.items()}
        values, expected_values = ((logits[:3], first_three), updates), tuple(expected[:2])
        assert_close(values, expected_values, tolerance)
        slope = slope.reshape(x.shape)
        assert_close(slope[mask].reshape(3, 6, 6), expected_slope, tolerance)
        assert_close(slopes, expected[2], 2 * tolerance)
        gradient, expected_gradient = (slopes, slope[mask].reshape(3, 6, 6)), (expected[2], expected_slope)
        assert relative_norm(gradient, expected_gradient) <= tolerance
        assert not slope[~mask].any()


@some_heads
def test_masked_equals_shortened_in_training(head):
    """In float32, with the statistics of a batch that is not tiny."""
    rng = np.random.default_rng(9)
    x = rng.gamma(2.0, size=(32, 36, 16)).astype(np.float32)
    mask = np.stack([rng.permutation(36) < 30 for _ in x])
    shortened = x[mask].reshape(32, 30, 16)
    variables = create(head, shortened)
    *expected, expected_slope = run(head, variables, jnp.asarray(shortened))
    *got, slope = run(head, variables, garbage(x, mask), where=jnp.asarray(mask))
    assert_close(got[:2], expected[:2], 1e-6)
    gradient = (got[2], slope[mask].reshape(shortened.shape))
    assert relative_norm(gradient, (expected[2], expected_slope)) <= 1e-6


@some_heads
def test_maps_equal_tokens(head):
    x, apply = tokens(np.float32), jax.jit(head.apply, static_argnames="train")
    maps, mask = jnp.asarray(x.reshape(3, 3, 3, 6)), MASK.reshape(3, 3, 3)
    variables = jax.jit(head.init)(KEY, maps)
    for masks in ({}, {"where": mask}):
        flat = {name: value.reshape(3, 9) for name, value in masks.items()}
        for a, b in zip(
            jax.tree.leaves(apply(variables, maps, **masks)), jax.tree.leaves(apply(variables, x, **flat)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


@some_heads
def test_a_batch_with_no_position_at_all_is_finite(head):
    x = tokens(np.float32)
    variables = jax.jit(head.init)(KEY, jnp.asarray(x))
    out, updates, *slopes = run(head, variables, garbage(x, MASK & False), where=MASK & False)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((out, updates, slopes)))
    if updates:
        assert_close(updates["batch_stats"], variables["batch_stats"], 0)


@some_heads
def test_weights_equal_repeated_positions(x64, head):
    x, counts = tokens(), np.array([2, 0, 1, 3, 1, 1, 0, 2, 1])
    variables = create(head, x)
    weights = jnp.asarray(np.tile(counts, (3, 1)))
    *expected, _ = run(head, variables, jnp.asarray(np.repeat(x, counts, axis=1)))
    *got, _ = run(head, variables, jnp.asarray(x), where=weights)
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
    apply = jax.jit(gate.apply)
    assert_close(apply(variables, jnp.asarray(x), where=MASK), apply(variables, shortened), 1e-12)
