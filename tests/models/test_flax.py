"""Heads are ordinary Flax modules: under Flax's transformations, with its RNG streams, with NumPy parameters."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gmsop_jax.models import (
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    GAPHead,
    GatedMixtureHead,
    MixtureHead,
    MPNCOVHead,
    SecondOrderHead,
)

KEY = jax.random.key(0)
BANK: dict[str, Any] = {"num_candidates": 4, "candidate_widths": (7, 3)}
GATED: dict[str, Any] = {**BANK, "num_selected": 2, "gate_widths": (5, 4), "gate_init": "random"}
HEADS: dict[str, tuple[Any, tuple, dict[str, Any]]] = {
    "gap": (GAPHead, (5,), {}),
    "sop": (CovarianceHead, (5,), {}),
    "srsop": (SecondOrderHead, (5, (4,), True), {}),
    "dropcov": (DropCovHead, (5, (4,), True), {}),
    "sot": (CrossCovarianceHead, (5,), {"num_heads": 2, "head_width": 3}),
    "mpncov": (MPNCOVHead, (5,), {}),
    "avesop": (MixtureHead, (5,), BANK),
    "gmsop": (GatedMixtureHead, (5,), GATED),
    "gmgap": (GatedMixtureHead, (5,), {**GATED, "order": 1}),
}
every_head = pytest.mark.parametrize("name", HEADS)


def create(name: str, lift: Any = lambda cls: cls) -> Any:
    cls, args, fields = HEADS[name]
    return lift(cls)(*args, **fields)


def maps(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).gamma(2.0, size=(*lead, 3, 3, 4, 6)).astype(np.float32))


def assert_equal(a, b, rtol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-5)


@every_head
def test_params_alone_are_enough_in_init_and_in_training(name):
    head = create(name)
    for rngs in (KEY, {"params": KEY}):
        for train in (False, True):
            variables = head.init(rngs, maps(), train)
    (logits, _), updates = head.apply(variables, maps(), True, rngs={"params": KEY}, mutable=["batch_stats"])
    assert np.isfinite(logits).all()
    assert jax.tree.structure(updates.get("batch_stats", {})) == jax.tree.structure(variables.get("batch_stats", {}))
    assert_equal(head.apply(variables, maps()), head.apply(variables, maps(), train=False))  # evaluation by default


def test_the_params_stream_draws_what_other_keys_do_not():
    head = create("gmsop")
    variables = head.init(KEY, maps())

    def run(**rngs):
        return np.asarray(head.apply(variables, maps(), True, rngs=rngs, mutable=["batch_stats"])[0][0])

    assert (run(params=KEY) != run(params=jax.random.key(1))).any()
    streams = {"gating": jax.random.key(2), "dropout": jax.random.key(3)}
    np.testing.assert_array_equal(run(params=KEY, **streams), run(params=jax.random.key(1), **streams))


@every_head
def test_remat(name):
    plain, lifted = create(name), create(name, lambda cls: nn.remat(cls, static_argnums=(2,)))
    variables = plain.init(KEY, maps())

    def slope(head):
        def loss(params):
            (logits, aux), _ = head.apply(
                {**variables, "params": params}, maps(), True, rngs={"params": KEY}, mutable=["batch_stats"]
            )
            return jnp.sum(logits**2) + aux["balance_loss"]

        return jax.value_and_grad(loss)(variables["params"])

    assert_equal(slope(lifted), slope(plain), rtol=1e-4)


@every_head
def test_vmap(name):
    options: dict[str, Any] = {
        "variable_axes": {"params": 0, "batch_stats": 0},
        "split_rngs": {"params": True, "dropout": True},
        "in_axes": (0, None),
    }

    def lift(cls):
        return nn.vmap(cls, **options)

    plain, lifted = create(name), create(name, lift)
    variables = lifted.init({"params": KEY}, maps(2), False)
    (logits, _), _ = lifted.apply(variables, maps(2), True, rngs={"params": KEY}, mutable=["batch_stats"])
    assert logits.shape == (2, 3, 5)
    both = lifted.apply(variables, maps(2), False)[0]
    for i in range(2):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        assert_equal(plain.apply(part, maps(2)[i])[0], both[i])


@every_head
def test_scan(name):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            logits, _ = create(name)(x, True)
            return carry + jnp.sum(logits), logits

    loop: Any = nn.scan(
        Step, variable_broadcast="params", variable_carry="batch_stats", split_rngs={"params": False, "dropout": True}
    )()
    # nn.scan can't create carried variables, those of nn.BatchNorm either, so the module is initialized without it
    variables = Step().init({"params": KEY, "dropout": KEY}, jnp.zeros(()), maps(2)[0])
    rngs = {"params": KEY, "dropout": KEY}
    (total, logits), _ = loop.apply(variables, jnp.zeros(()), maps(2), rngs=rngs, mutable=["batch_stats"])
    assert logits.shape == (2, 3, 5)
    np.testing.assert_allclose(total, logits.sum(), rtol=1e-4)


@every_head
def test_tabulate(name):
    assert "classifier" in create(name).tabulate(KEY, maps())


@every_head
def test_nnx_bridge(name):
    model: Any = nnx.bridge.ToNNX(create(name), rngs=nnx.Rngs(0)).lazy_init(maps())
    assert model(maps())[0].shape == (3, 5)
    logits, _ = model(maps(), True, mutable=["batch_stats"])
    assert np.isfinite(logits).all()


# ---- NumPy parameters


@every_head
def test_numpy_parameters_are_equal_to_jax_arrays(name):
    head = create(name)
    variables = head.init(KEY, maps())
    numbers = jax.device_get(variables)

    def both(variables, x):
        def loss(params):
            (logits, aux), updates = head.apply(
                {**variables, "params": params}, x, train=True, rngs={"params": KEY}, mutable=["batch_stats"]
            )
            return jnp.sum(logits**2), (logits, aux, updates)

        return head.apply(variables, x), jax.grad(loss, has_aux=True)(variables["params"])

    expected = both(variables, maps())
    assert_equal(both(numbers, np.asarray(maps())), expected, rtol=1e-6)
    assert_equal(jax.jit(lambda x: both(numbers, x))(maps()), expected, rtol=1e-3)


def test_float64_numpy_parameters_and_maps():
    for name in HEADS:
        head = create(name)
        variables = head.init(KEY, maps())
        double = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        got = head.apply(double, np.asarray(maps(), np.float64), True, rngs={"params": KEY}, mutable=["batch_stats"])
        assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype("float32")}


# ---- precision of the logits


@every_head
def test_bfloat16_logits_are_not_rounded(name):
    cls, args, fields = HEADS[name]
    head = cls(*args, **fields, dtype=jnp.bfloat16)
    variables = head.init(KEY, maps())
    logits = np.asarray(head.apply(variables, maps())[0])
    assert logits.dtype == np.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9


def test_bfloat16_logits_of_many_classes_do_not_tie():
    head: Any = GAPHead(1000, dtype=jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1, 1, 64)).astype(np.float32))
    logits = np.sort(head.apply(head.init(KEY, x), x)[0])
    assert (logits[:, -1] == logits[:, -2]).mean() < 1e-3  # 2 % with logits rounded to bfloat16


# ---- determinism on GPUs


@every_head
def test_no_gradient_of_a_head_is_a_scatter(name):
    cls, args, fields = HEADS[name]
    head = cls(*args, **fields, **({"dispatch": "gather"} if cls is GatedMixtureHead else {}))
    variables = jax.eval_shape(head.init, KEY, maps())

    def loss(params, x):
        (logits, aux), _ = head.apply(
            {**variables, "params": params}, x, True, rngs={"params": KEY}, mutable=["batch_stats"]
        )
        return jnp.sum(logits**2) + aux["balance_loss"]

    variables = head.init(KEY, maps())
    text = jax.jit(jax.grad(loss, (0, 1))).lower(variables["params"], maps()).as_text()
    assert "scatter" not in text
