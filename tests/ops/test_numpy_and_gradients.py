"""NumPy arrays in place of JAX arrays, and gradients that add in a fixed order."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gmsop_jax.ops

ops: Any = gmsop_jax.ops  # annotated for JAX arrays


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


SIGMA = np.asarray(ops.covariance_pool(jnp.asarray(normal(2, 9, 4))))
INDICES = np.array([[0, 2], [2, 1]], np.int32)
KERNELS = (normal(3, 4, 5), normal(3, 5, 2))
BANK = functools.partial(ops.apply_candidates, pool=ops.second_order_pool)

# name → function of one array that is differentiated, and that array
CASES: dict[str, tuple[Any, Any]] = {
    "average_pool": (ops.average_pool, normal(2, 9, 4)),
    "covariance_pool": (ops.covariance_pool, normal(2, 9, 4)),
    "second_order_pool": (ops.second_order_pool, normal(2, 9, 4)),
    "newton_schulz_sqrt": (ops.newton_schulz_sqrt, SIGMA),
    "newton_schulz_inverse_sqrt": (ops.newton_schulz_inverse_sqrt, SIGMA + np.eye(4, dtype=np.float32)),
    "minimax": (functools.partial(ops.newton_schulz_sqrt, coefficients="minimax"), SIGMA),
    "cross_covariance_pool": (lambda x: ops.cross_covariance_pool(x, normal(2, 9, 4)), normal(2, 9, 4) + 1),
    "multi_head_cross_covariance_pool": (
        lambda x: ops.multi_head_cross_covariance_pool(x, normal(2), 2),
        normal(2, 9, 8),
    ),
    "channel_attention": (lambda kernel: ops.channel_attention(normal(2, 4), kernel), normal(3)),
    "apply_gate": (lambda kernel: ops.apply_gate(normal(2, 4), kernel, num_selected=2).weights, normal(4, 3)),
    "batch_norm": (lambda x: ops.batch_norm(x, *4 * [np.ones(4, np.float32)], train=True)[0], normal(2, 9, 4)),
    "linear_logits": (lambda kernel: ops.linear_logits(normal(2, 4), kernel, normal(5)), normal(4, 5)),
    "matrix_power": (ops.matrix_power, SIGMA),
    "triangle_vector": (ops.triangle_vector, SIGMA),
    "triangle_matrix": (ops.triangle_matrix, normal(2, 10)),
    "top_k_gate": (lambda h: ops.top_k_gate(h, 2)[0], normal(2, 3)),
    "selection_weights": (lambda h: ops.selection_weights(h, INDICES), normal(2, 3)),
    "balance_loss": (ops.balance_loss, np.abs(normal(2, 3))),
    "gather, images": (lambda x: BANK(x, KERNELS, INDICES, dispatch="gather"), normal(2, 9, 4)),
    "gather, kernels": (lambda w: BANK(normal(2, 9, 4), w, INDICES, dispatch="gather"), KERNELS),
    "loop, images": (lambda x: BANK(x, KERNELS, INDICES, dispatch="loop"), normal(2, 9, 4)),
    "loop, kernels": (lambda w: BANK(normal(2, 9, 4), w, INDICES, dispatch="loop"), KERNELS),
    "group, images": (lambda x: BANK(x, KERNELS, INDICES, dispatch="group"), normal(2, 9, 4)),
    "group, kernels": (lambda w: BANK(normal(2, 9, 4), w, INDICES, dispatch="group"), KERNELS),
    "auto, kernels": (lambda w: BANK(normal(2, 9, 4), w, INDICES), KERNELS),
    "all candidates": (lambda w: ops.apply_all_candidates(normal(2, 9, 4), w, ops.average_pool), KERNELS),
    "mix, vectors": (lambda y: ops.mix_candidates(y, normal(2, 3), INDICES), normal(2, 2, 6)),
    "mix, weights": (lambda w: ops.mix_candidates(normal(2, 2, 6), w, INDICES), normal(2, 3)),
}


def slope(function, x):
    return jax.grad(lambda x: jnp.sum(jnp.sin(function(x))))(x)


@pytest.mark.parametrize("name", CASES)
def test_numpy_arrays_are_equal_to_jax_arrays(name):
    function, x = CASES[name]
    ours = jax.tree.map(jnp.asarray, x)
    np.testing.assert_array_equal(function(x), function(ours))
    np.testing.assert_allclose(jax.jit(lambda: function(x))(), function(ours), rtol=1e-4, atol=1e-6)
    for got, expected in zip(jax.tree.leaves(slope(function, x)), jax.tree.leaves(slope(function, ours)), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("dispatch", ["gather", "group", "loop", "auto"])
def test_numpy_kernels_with_traced_images_and_indices(dispatch):
    def run(x, indices):
        return BANK(x, KERNELS, indices, dispatch=dispatch)

    np.testing.assert_allclose(jax.jit(run)(normal(2, 9, 4), INDICES), run(normal(2, 9, 4), INDICES), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("loop", "auto", "group"))])
def test_no_gradient_is_a_scatter(name):
    # on a GPU a scatter adds by atomic operations, whose order differs from run to run
    function, x = CASES[name]
    text = jax.jit(functools.partial(slope, function)).lower(x).as_text()
    assert "scatter" not in text


def test_indexing_would_be_a_scatter():
    assert "scatter" in jax.jit(functools.partial(slope, lambda w: w[INDICES])).lower(KERNELS[0]).as_text()
