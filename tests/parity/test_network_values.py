"""Whole networks: outputs at test time, loss and every gradient, and optimiser steps."""

import functools
import types
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import ArrayLike
from reference import DOUBLE, SINGLE, STORED_SINGLE, assert_close, cases, load, to_ours

from gmsop_jax.config import default_config
from gmsop_jax.interop.matconvnet import from_params, to_params
from gmsop_jax.interop.parameters import to_trained
from gmsop_jax.models import create_model
from gmsop_jax.models.layers import Dropout
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.step import create_state, cross_entropy, make_train_step

pytestmark = pytest.mark.usefixtures("optimized")

NETWORKS = cases("nets/*.npz")
by_name: Any = {"ids": lambda path: path.stem}
ALPHA = 100.0


@functools.cache
def network(path):
    """The values, and the network that they were computed with, in single precision."""
    values = load(path)
    prefix = "param/"
    params = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    config, variables = from_params(params, num_selected=int(values["test/mask"][0].sum()))
    return types.SimpleNamespace(values=values, config=config, params=params, variables=variables)


def doubled(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def images(net, name, step=None):
    pixels = net.values[name] if step is None else net.values[name][step]
    return jnp.asarray(pixels.astype(np.float32) - net.values["rgb_mean"])


def fused(net, features):
    """Theirs as ours: a triangle's order differs."""
    return to_ours(features) if net.config.head == "gmsop" else features


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, variables, x):
    """Outputs at test time, with the map after each stage and the gate's logits."""

    def wanted(module, _):
        return (module.name or "").startswith(("stage", "gate"))

    return model.apply(variables, x, capture_intermediates=wanted)


@pytest.mark.parametrize("path", NETWORKS, **by_name)
@pytest.mark.usefixtures("x64")
def test_outputs_in_double(path):
    net = network(path)
    values, model = net.values, create_model(net.config)
    x = images(net, "test/x_uint8").astype(jnp.float64)
    (logits, aux), inner = outputs(model, doubled(net.variables), x)
    weights = np.asarray(aux["gate_weights"])
    assert_close("network, logits", logits, values["test/logits_f64"])
    assert_close("network, gate weights", weights, values["test/gate_weights_f64"])
    np.testing.assert_array_equal(weights > 0, values["test/mask"])
    assert_close("network, balance loss", ALPHA * aux["balance_loss"], values["test/balance_f64"])
    loss = cross_entropy(logits, jnp.asarray(values["test/labels_1based"] - 1))
    assert_close("network, loss", loss, values["test/loss_sum_f64"])

    captured = inner["intermediates"]
    gate = captured["head"]["mixture"]["gate"]["__call__"][0].logits
    assert_close("network, gate logits", gate, values["test/gate_logits_f64"])
    for stage in range(1, 5):
        block = f"stage{stage}_block{net.config.blocks_per_stage}"
        mean = captured["backbone"][block]["__call__"][0].mean((1, 2))
        theirs = values[f"test/conv{stage + 1}_{net.config.blocks_per_stage}_mean"]
        assert_close("network, maps of the backbone", mean, theirs)
    theirs = values["test/fusion_f64"]
    if theirs.ndim == 2:
        assert_close("network, features", aux["features"], fused(net, theirs))
    else:  # a sample, in their order
        assert_close("network, features", in_their_order(net, aux["features"]), theirs)


def in_their_order(net, features):
    if net.config.head != "gmsop":
        return features
    return np.asarray(features)[:, np.argsort(to_ours(np.arange(features.shape[1])))]


@pytest.mark.parametrize("path", NETWORKS, **by_name)
def test_outputs_in_single(path):
    net = network(path)
    (logits, aux), _ = outputs(create_model(net.config), net.variables, images(net, "test/x_uint8"))
    assert logits.dtype == jnp.float32
    weights = net.values["test/gate_weights_f64"]
    assert_close("network, logits, f32", logits, net.values["test/logits_f32"], SINGLE)
    assert_close("network, logits, f32", logits, net.values["test/logits_f64"], SINGLE)
    assert_close("network, gate weights, f32", aux["gate_weights"], weights, SINGLE)


@functools.cache
def gradient_function(path):
    """Loss and gradients in training, with the dropout's mask given (of ones for none)."""
    model = create_model(network(path).config)

    def loss(params, x, batch_stats, labels, noise, keep):
        def drop(call, args, kwargs, context):
            return args[0] * keep if isinstance(context.module, Dropout) else call(*args, **kwargs)

        with nn.intercept_methods(drop):
            (logits, aux), updates = model.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                train=True,
                gate_noise=noise,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
        loss_sum = cross_entropy(logits, labels)
        rest = {"logits": logits, "loss": loss_sum, "moments": updates["batch_stats"], **aux}
        return loss_sum + ALPHA * aux["balance_loss"], rest

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


def gradients(path, keep: ArrayLike = 1.0):
    """Gradients by the authors' names, the images' gradient, and the outputs, at the first step."""
    net = network(path)
    variables, values = doubled(net.variables), net.values
    batch = values["train/labels_1based"][0].size
    (grads, dx), rest = gradient_function(path)(
        variables["params"],
        images(net, "train/x_uint8", 0).astype(jnp.float64),
        variables["batch_stats"],
        jnp.asarray(values["train/labels_1based"][0] - 1),
        jnp.asarray(values["train/noise"][0], jnp.float64),
        jnp.broadcast_to(jnp.asarray(keep, jnp.float64), (batch, net.params["fusion_bn_bn_w"].size)),
    )
    return to_trained(net.config, grads), dx, rest


@pytest.mark.slow
@pytest.mark.parametrize("path", NETWORKS, **by_name)
@pytest.mark.usefixtures("x64")
def test_loss_and_every_gradient(path):
    net = network(path)
    grads, dx, rest = gradients(path)
    values = net.values
    assert_close("training, logits", rest["logits"], values["step1/logits_f64"])
    assert_close("training, loss", rest["loss"], values["step1/loss_sum_f64"])
    assert_close("training, balance loss", ALPHA * rest["balance_loss"], values["step1/balance_f64"])
    assert_close("training, gate weights", rest["gate_weights"], values["step1/gate_weights_f64"])
    assert_close("training, gradient of images", np.asarray(dx)[:2], values["step1/dinput_f64"])
    compared = 0
    for name, ours in grads.items():
        theirs = values.get(f"grad/{name}")
        if theirs is None:  # of a candidate that no image selected
            assert name.startswith("CM_")
            assert not np.any(ours)
        elif name != "conv1_b":  # 0 but for rounding: batch norm follows
            assert_close("training, gradients", ours, theirs)
            compared += 1
    assert compared >= len(grads) - 1 - 2 * len(values["step1/cm_unselected_0based"])
    check_moments(net, rest["moments"])


def check_moments(net, batch_stats):
    """Theirs lie among the gradients, times the batch's size; running ones move by 0.3."""
    variables = {"params": net.variables["params"], "batch_stats": batch_stats}
    moments = to_params(net.config, doubled(variables))
    size = len(net.values["train/labels_1based"][0])
    for name in (n for n in moments if n.endswith("_bn_m")):
        batch = (moments[name] - 0.7 * net.params[name].astype(np.float64)) / 0.3
        assert_close("training, moments", batch * size, net.values[f"grad/{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("path", NETWORKS, **by_name)
@pytest.mark.usefixtures("x64")
def test_loss_and_gradients_with_dropout(path):
    net = network(path)
    rate = float(net.values["drop/rate"])
    assert rate == net.config.dropout_rate
    keep = in_our_order(net, net.values["drop/u"].astype(np.float64) >= rate) / (1 - rate)
    grads, _, rest = gradients(path, keep)
    assert_close("dropout, loss", rest["loss"], net.values["drop/loss_sum_f64"])
    assert_close("dropout, logits", rest["logits"], net.values["drop/logits_f64"])
    for name, ours in grads.items():
        theirs = net.values.get(f"drop/grad_s/{name}")
        if theirs is not None and name != "conv1_b":
            assert_close("dropout, gradients", ours, theirs)


def in_our_order(net, mask):
    return to_ours(mask) if net.config.head == "gmsop" else mask


@pytest.mark.slow
@pytest.mark.parametrize("path", NETWORKS, **by_name)
@pytest.mark.usefixtures("x64")
def test_parameters_after_one_and_three_steps(path):
    net = network(path)
    values = net.values
    config = net.config.copy_and_resolve_references()
    config.dropout_rate = 0.0
    train = default_config().train
    train.momentum, train.weight_decay = float(values["train/momentum"]), float(values["train/weight_decay"])
    optimizer = create_optimizer(train, optax.constant_schedule(float(values["train/lr"])), config.pixel_scale)
    train.balance_weight = float(ALPHA)
    options = {"mean_rgb": values["rgb_mean"], "seed": 0, "balance_ddof": config.balance_ddof}
    step = jax.jit(make_train_step(create_model(config), optimizer, train, **options))
    state = create_state(doubled(net.variables), optimizer)
    for i in range(3):
        batch = {
            "image": jnp.asarray(values["train/x_uint8"][i]),
            "label": jnp.asarray(values["train/labels_1based"][i] - 1),
            "gate_noise": jnp.asarray(values["train/noise"][i], jnp.float64),
        }
        state, metrics = step(state, batch)
        bound = DOUBLE if i == 0 else 1e-8
        assert_close("steps, loss", metrics["loss_sum"], values[f"step{i + 1}/loss_sum_f64"], bound)
        if i == 0:
            compare_steps(net, state, 1)
    compare_steps(net, state, 3)
    momentum = optax.tree_utils.tree_get(state.opt_state, "trace")
    for name, ours in to_trained(config, momentum).items():
        if name not in idle_names(net, 3):
            assert_close("steps, momentum after 3", -ours, values[f"momentum3_s/{name}"])


def compare_steps(net, state, steps):
    """Parameters and moments against theirs, as differences from the start."""
    ours = to_params(net.config, state.variables)
    for name, start in net.params.items():
        if name in idle_names(net, steps):
            continue
        theirs = net.values[f"delta{steps}_s/{name}"]
        single = theirs.dtype == np.float32
        bound = STORED_SINGLE if single else (DOUBLE if steps == 1 else 1e-8)
        label = f"steps, parameters after {steps}"
        assert_close(label, ours[name] - start.astype(np.float64), theirs, bound)


def idle_names(net, steps):
    """What theirs doesn't compute as is natural: candidates that a step left unselected.

    conv1_b goes with them: its gradient is 0 but for rounding, which is all that the steps hold.
    """
    unselected = {int(i) for s in range(steps) for i in net.values[f"step{s + 1}/cm_unselected_0based"]}
    names = {n for n in net.params if any(n.startswith(f"CM_{i + 1}_") for i in unselected)}
    return names | {"conv1_b"}
