"""The gated mixture's layers: logits, selection, weights, balance loss, fusion, and their gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import SINGLE, assert_close, cases, load

from gmsop_jax.config import default_config
from gmsop_jax.models import Gate
from gmsop_jax.ops import (
    apply_candidates,
    average_pool,
    balance_loss,
    select_top_k,
    selection_weights,
)
from gmsop_jax.training.optimizer import create_optimizer

MIXTURES = cases("layers/mixture_*.npz")
TRAINED = [path for path in MIXTURES if "full_dH_f64" in load(path)]
by_name: Any = {"ids": lambda path: path.stem}
_NAMES = {"gating_w": "gating_w", "gating_noise_w": "gating_noise_w", "feat": "feat", "last": "last"}


def gate_logits(w, noise_w, features, noise):
    """Our gate without trunk, on features that are pooled already."""
    n = w.shape[1]
    variables = {"params": {"kernel": w, "noise_kernel": noise_w}}
    gate: Any = Gate(num_candidates=n, num_selected=n, gate_widths=(), gate_order=1)
    return gate.apply(variables, features[:, None], train=True, gate_noise=noise).logits


@jax.jit
def mixture(inputs, noise, indices):
    """Everything from features to fused features, with the intermediate values.

    `d_logits` and `d_weights`, zeros, are added so that gradients can be taken there.
    """
    logits = gate_logits(inputs["gating_w"], inputs["gating_noise_w"], inputs["feat"], noise)
    logits = logits + inputs["d_logits"]
    weights = selection_weights(logits, indices, "masked") + inputs["d_weights"]
    last = inputs["last"].reshape(len(noise), -1, inputs["last"].shape[-1])
    pooled = apply_candidates(last, [inputs["F"]], indices, average_pool)
    fused = jnp.einsum("bk,bkf->bf", jnp.take_along_axis(weights, indices, 1), pooled)
    return fused, {"logits": logits, "weights": weights, "pooled": pooled}


@jax.jit
@jax.grad
def gradients(inputs, noise, indices, dfusion, alpha):
    """Of fusion · dfusion + α · balance loss."""
    fused, parts = mixture(inputs, noise, indices)
    return jnp.sum(fused * dfusion) + alpha * balance_loss(parts["weights"])


def mixture_inputs(values, dtype):
    inputs = {name: jnp.asarray(values[name], dtype) for name in (*_NAMES, "F")}
    zeros = jnp.zeros((len(values["feat"]), values["gating_w"].shape[1]), dtype)
    return inputs | {"d_logits": zeros, "d_weights": zeros}


def noise_of(values):
    return values.get("noise", np.zeros(len(values["feat"]), np.float32))


def selected(mask):
    """The selected of each image, as indices."""
    return jnp.asarray(np.argsort(~mask, axis=1, kind="stable")[:, : mask[0].sum()])


@pytest.mark.parametrize("path", MIXTURES, **by_name)
@pytest.mark.usefixtures("x64")
def test_forward_in_double(path):
    values = load(path)
    inputs = mixture_inputs(values, jnp.float64)
    indices = selected(values["mask"])
    fused, parts = mixture(inputs, jnp.asarray(noise_of(values), jnp.float64), indices)
    theirs = np.take_along_axis(values["cm_out_f64"], np.asarray(indices)[..., None], 1)
    assert_close("gate logits", parts["logits"], values["H_f64"])
    assert_close("gate weights", parts["weights"], values["sfm_f64"])
    assert_close("candidates", parts["pooled"], theirs)
    assert_close("fusion", fused, values["fusion_f64"])
    balance = balance_loss(parts["weights"])
    assert_close("balance loss", balance * values["loss_weight"], values["balance_f64"])
    assert_close("balance loss", jnp.sqrt(balance), values["RSD_f64"])


@pytest.mark.parametrize("path", MIXTURES, **by_name)
def test_forward_in_single(path):
    values = load(path)
    inputs = mixture_inputs(values, jnp.float32)
    fused, parts = mixture(inputs, jnp.asarray(noise_of(values)), selected(values["mask"]))
    assert fused.dtype == jnp.float32
    assert_close("mixture, f32", parts["logits"], values["H_f32"], SINGLE)
    assert_close("mixture, f32", parts["weights"], values["sfm_f32"], SINGLE)
    assert_close("mixture, f32", fused, values["fusion_f32"], SINGLE)


@pytest.mark.parametrize("path", MIXTURES, **by_name)
def test_selection(path):
    values = load(path)
    logits, k = jnp.asarray(values["H_f32"]), int(values["K"])
    if values["tie_path_used"]:  # the draw is random: that there is one is what can be compared
        draws = [select_top_k(logits, k, jax.random.key(seed)) for seed in range(8)]
        assert len({tuple(sorted(row)) for draw in draws for row in draw.tolist()}) > 1
        return
    ours = np.asarray(select_top_k(logits, k, jax.random.key(0)))
    mask = (ours[..., None] == np.arange(logits.shape[1])).any(1)
    np.testing.assert_array_equal(mask, values["mask"])


@pytest.mark.parametrize("run", ["full", "nobalance", "balanceonly"])
@pytest.mark.parametrize("path", TRAINED, **by_name)
@pytest.mark.usefixtures("x64")
def test_gradients(path, run):
    values = load(path)
    inputs = mixture_inputs(values, jnp.float64)
    noise = jnp.asarray(noise_of(values), jnp.float64)
    indices = selected(values["mask"])
    dfusion = jnp.asarray(values["dfusion"], jnp.float64)

    alpha = float(values["loss_weight"]) * (run != "nobalance")
    grads = gradients(inputs, noise, indices, dfusion * (run != "balanceonly"), alpha)
    gains = {"d_logits": "H", "d_weights": "sfm", **_NAMES, "F": "F"}
    for name, gain in gains.items():
        theirs = values.get(f"{run}_d{gain}_f64")
        if theirs is None:  # the balance loss alone reaches the gate only
            assert run == "balanceonly"
            assert not np.any(grads[name])
        elif values["tie_path_used"] and gain == "feat":  # a sum of equal columns that cancels
            np.testing.assert_allclose(grads[name], theirs, atol=1e-9 * np.abs(grads["gating_w"]).max())
        else:
            assert_close(f"mixture, gradient of {gain}", grads[name], theirs)


@pytest.mark.parametrize("path", TRAINED, **by_name)
@pytest.mark.usefixtures("x64")
def test_a_candidate_that_no_image_selects_gets_gradient_zero(path):
    values = load(path)
    inputs = mixture_inputs(values, jnp.float64)
    noise = jnp.asarray(noise_of(values), jnp.float64)
    indices = selected(values["mask"])
    dfusion = jnp.asarray(values["dfusion"], jnp.float64)
    grads = gradients(inputs, noise, indices, dfusion, 0.0)
    used = np.any(np.asarray(grads["F"]), axis=(1, 2))
    np.testing.assert_array_equal(used, values["full_CM_has_gradient"])


@pytest.mark.parametrize("path", cases("layers/gating_ties_*.npz"), **by_name)
@pytest.mark.usefixtures("x64")
def test_ties_within_an_image(path):
    """Ties drop the highest indices first. Image 4's largest logit is 0, and theirs weighs it 0."""
    values = load(path)
    logits = jnp.asarray(values["H"], jnp.float64)
    indices = select_top_k(logits, int(values["K"]), jax.random.key(0))
    mask = (np.asarray(indices)[..., None] == np.arange(logits.shape[1])).any(1)
    np.testing.assert_array_equal(mask, values["mask"])

    weights, vjp = jax.vjp(lambda h: selection_weights(h, indices, "masked"), logits)
    (gradient,) = vjp(jnp.asarray(values["dsfm"], jnp.float64))
    others = np.arange(len(logits)) != 4
    assert_close("gate weights, ties", weights[others], values["sfm_f64"][others])
    assert_close("gate weights, ties, gradient", gradient[others], values["dH_f64"][others])

    natural = np.where(mask[4], np.exp(values["H"][4].astype(np.float64)), 0)
    assert_close("gate weights, a logit of 0", weights[4], natural / natural.sum())
    assert values["sfm_f64"][4, values["H"][4].argmax()] == 0


@pytest.mark.usefixtures("x64")
def test_steps_with_candidates_that_are_not_selected():
    """Every step starts from their state of the step before.

    Of the candidates that no image selects, theirs applies the gradient of an earlier step again (3 in
    step 2), and leaves those that had none yet as they are. Natural, and ours, is gradient 0: weight
    decay and momentum alone.
    """
    values = load(cases("layers/stale_gradient.npz")[0])
    rate, decay, mu = (float(values[k]) for k in ("lr", "weight_decay", "momentum"))
    train = default_config().train
    train.momentum, train.weight_decay = mu, decay
    optimizer = create_optimizer(train, optax.constant_schedule(rate), 1.0)
    params: Any = {name: jnp.asarray(values[name], jnp.float64) for name in _LEARNED}
    state = optimizer.init(params)
    momentum = np.zeros_like(values["step1_mom_F"])
    for step in (1, 2, 3):
        gradients: Any = stale_case_gradients(values, step - 1, params)
        updates, state = optimizer.update(gradients, state, params)
        stepped: Any = optax.apply_updates(params, updates)
        theirs = {name: values[f"step{step}_val_{name}"] for name in _LEARNED}
        natural = np.asarray(params["F"]) + rate * (mu * momentum - decay * np.asarray(params["F"]))
        idle = np.logical_not(np.any(values[f"step{step}_mask"], axis=0))
        assert (np.abs(natural - theirs["F"])[idle].max((1, 2)) > 1e-7).all()
        expected = theirs | {"F": np.where(idle.reshape(-1, 1, 1), natural, theirs["F"])}
        for name in _LEARNED:
            assert_close("mixture, parameters after a step", stepped[name], expected[name])
        params = {name: jnp.asarray(theirs[name]) for name in _LEARNED}
        state = with_momentum(state, {n: -jnp.asarray(values[f"step{step}_mom_{n}"]) for n in _LEARNED})
        momentum = values[f"step{step}_mom_F"]


_LEARNED = ("gating_w", "gating_noise_w", "F")


def with_momentum(state, momentum):
    """The optimiser's state with the momentum replaced."""
    is_trace = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
    return jax.tree.map(lambda node: optax.TraceState(momentum) if is_trace(node) else node, state, is_leaf=is_trace)


def stale_case_gradients(values, step, params):
    """Of (fusion · cotangent + 100 · balance loss)/batch, as the authors' script takes them."""
    batch = {k: jnp.asarray(values[k][step], jnp.float64) for k in ("feat", "last", "noise", "dfusion")}
    indices = selected(values[f"step{step + 1}_mask"])
    zeros = jnp.zeros(values[f"step{step + 1}_mask"].shape)
    inputs = {**params, "feat": batch["feat"], "last": batch["last"], "d_logits": zeros, "d_weights": zeros}
    grads = gradients(inputs, batch["noise"], indices, batch["dfusion"], 100.0)
    return {name: grads[name] / int(values["B"]) for name in _LEARNED}
