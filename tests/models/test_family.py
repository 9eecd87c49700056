"""Every head and gate against a slow NumPy version in float64, and its gradients against finite differences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.models import (
    CovarianceHead,
    DropCovHead,
    GAPHead,
    Gate,
    GatedMixtureHead,
    MixtureHead,
    MPNCOVHead,
    SecondOrderHead,
)

BANK: dict[str, Any] = {"num_candidates": 4, "candidate_widths": (7, 3)}
GATED: dict[str, Any] = {**BANK, "num_selected": 2, "gate_widths": (5, 4)}
PLAIN_HEADS: dict[str, Any] = {
    "gap": GAPHead(5),
    "gap, projected": GAPHead(5, (8, 4)),
    "sop": CovarianceHead(5),
    "srsop": SecondOrderHead(5),
    "srsop, projected, batch norm, 5 steps": SecondOrderHead(5, (4,), True, num_iters=5),
    "mpncov": MPNCOVHead(5),
    "dropcov": DropCovHead(5, (4,), True),
    "mpncov, 0.3": MPNCOVHead(5, (4,), power=0.3),
}
MIXTURES: dict[str, Any] = {
    "avegap": MixtureHead(5, **BANK, order=1),
    "avesop": MixtureHead(5, **BANK),
    "concatgap": MixtureHead(5, **BANK, order=1, combine="concatenate"),
    "concatsop": MixtureHead(5, **BANK, combine="concatenate"),
    "gmgap": GatedMixtureHead(5, **GATED, order=1),
    "gmsop": GatedMixtureHead(5, **GATED),
    "gate on averages": GatedMixtureHead(5, **GATED, gate_order=1),
    "gate on covariances": GatedMixtureHead(5, **GATED, order=1, gate_order=2),
    "softmax over all": GatedMixtureHead(5, **GATED, gate_softmax="all"),
}
HEADS = PLAIN_HEADS | MIXTURES


def feature_map() -> np.ndarray:
    return np.random.default_rng(0).gamma(2.0, size=(3, 3, 4, 6))


def varied(head) -> Any:
    """Variables of a head, none at the special value it starts with."""
    variables = head.init(jax.random.key(0), jnp.asarray(feature_map()), train=False)
    rng = np.random.default_rng(1)

    def vary(path, leaf):
        if "sigma" in str(path[-1]):
            return jnp.asarray(rng.uniform(0.5, 2, leaf.shape))
        return jnp.asarray(np.asarray(leaf, np.float64) + 0.3 * rng.normal(size=leaf.shape))

    return jax.tree_util.tree_map_with_path(vary, variables)


# ---- the slow version: one image at a time, by definition


def covariance(x):
    mean = x.mean(0)
    return sum(np.outer(row - mean, row - mean) for row in x) / len(x)


def newton_schulz(sigma, num_iters):
    if not sigma.any():
        return sigma
    y, z, eye = sigma / np.trace(sigma), np.eye(len(sigma)), np.eye(len(sigma))
    for _ in range(num_iters):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return np.sqrt(np.trace(sigma)) * y


def power(sigma, alpha):
    values, vectors = np.linalg.eigh(sigma)
    values = np.where(values > np.spacing(values[-1]), values, 0)
    return vectors @ np.diag(values**alpha) @ vectors.T


def triangle(m):
    return np.array([m[i, j] for i in range(len(m)) for j in range(i, len(m))])


def pool(x, order, num_iters=3):
    return x.mean(0) if order == 1 else triangle(newton_schulz(covariance(x), num_iters))


def batch_norm(x, variables, *path):
    params, moments = variables["params"], variables["batch_stats"]
    for name in path:
        params, moments = params[name], moments[name]
    return (x - moments["mean"]) / moments["sigma"] * params["scale"] + params["bias"]


def softmax(h):
    return np.exp(h - h.max()) / np.exp(h - h.max()).sum()


def plain_features(head, variables, x):
    params = variables["params"]
    for i in range(1, len(head.projection_widths) + 1):
        x = x @ params[f"projection{i}"]["kernel"]
        if head.projection_batch_norm:
            x = batch_norm(x, variables, f"projection{i}_bn")
        x = np.maximum(x, 0)
    if isinstance(head, GAPHead):
        return x.mean(0)
    if isinstance(head, CovarianceHead | DropCovHead):
        return triangle(covariance(x))
    if isinstance(head, SecondOrderHead):
        return triangle(newton_schulz(covariance(x), head.num_iters))
    return triangle(power(covariance(x), head.power))


def candidates(head, variables, x):
    bank = variables["params"]["mixture"]
    for i in range(head.num_candidates):
        y = np.maximum(np.maximum(x @ bank["candidates1"][i], 0) @ bank["candidates2"][i], 0)
        yield pool(y, head.order)


def weights(head, variables, x):
    for i in range(1, len(head.gate_widths) + 1):
        x = x @ variables["params"]["mixture"]["gate"][f"conv{i}"]["kernel"]
        x = np.maximum(batch_norm(x, variables, "mixture", "gate", f"conv{i}_bn"), 0)
    h = variables["params"]["mixture"]["gate"]["kernel"].T @ pool(x, head.gate_order or head.order)
    chosen = np.argsort(-h)[: head.num_selected]
    w = np.zeros_like(h)
    w[chosen] = softmax(h)[chosen] if head.gate_softmax == "all" else softmax(h[chosen])
    return w


def slow_features(head, variables, x):
    if not hasattr(head, "num_candidates"):
        return plain_features(head, variables, x)
    pooled = np.array(list(candidates(head, variables, x)))
    if isinstance(head, GatedMixtureHead):
        return weights(head, variables, x) @ pooled
    return pooled.mean(0) if head.combine == "average" else pooled.ravel()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_its_slow_version(x64, name):
    head, maps = HEADS[name], feature_map()
    variables = varied(head)
    logits, aux = head.apply(variables, jnp.asarray(maps), train=False)
    numbers = jax.tree.map(np.asarray, variables)
    features = np.array([slow_features(head, numbers, x.reshape(-1, x.shape[-1])) for x in maps])
    np.testing.assert_allclose(aux["features"], features, rtol=1e-10, atol=1e-12)
    normal = batch_norm(features, numbers, "bn") if name in MIXTURES else features
    classifier = numbers["params"]["classifier"]
    np.testing.assert_allclose(logits, normal @ classifier["kernel"] + classifier["bias"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in HEADS if name != "dropcov"])  # whose rate passes no gradient
def test_a_heads_gradient_is_the_finite_difference(x64, name):
    head, maps = HEADS[name], jnp.asarray(feature_map())
    if isinstance(head, GatedMixtureHead):  # straight-through is no derivative of what is computed
        head = head.copy(gate_gradient="masked")
    variables = varied(head)
    rng = np.random.default_rng(2)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), (variables["params"], maps))

    def loss(params_and_maps):
        params, x = params_and_maps
        (logits, aux), _ = head.apply(
            {**variables, "params": params},
            x,
            train=True,
            gate_noise=jnp.zeros(3),
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.sin(logits)) + aux["balance_loss"]

    at = (variables["params"], maps)
    slope = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, jax.grad(loss)(at), direction))

    def moved(step):
        return loss(jax.tree.map(lambda p, d: p + step * d, at, direction))

    step = 1e-6
    np.testing.assert_allclose(slope, (moved(step) - moved(-step)) / (2 * step), rtol=2e-6)


# ---- the gate's options by hand


def one_weight_gate(**options) -> tuple[Any, Any]:
    """A gate on two averages (1, 2), with W_g = [[1, 0, −1], [0, ½, 0]] and W_n = 0: h = (1, 1, −1)."""
    gate = Gate(num_candidates=3, num_selected=1, gate_widths=(), gate_order=1, **options)
    params = {"kernel": jnp.array([[1.0, 0.0, -1.0], [0.0, 0.5, 0.0]])}
    if options.get("gate_noise", "image") in ("image", "candidate"):
        params["noise_kernel"] = jnp.zeros((2, 3))
    return gate, {"params": params}


FEATURES = jnp.array([[[1.0, 2.0]]])
LN2 = float(np.log(2))  # softplus(0)


@pytest.mark.parametrize(
    ("noise", "gamma", "expected"),
    [
        ("image", [2.0], [1 + 2 * LN2, 1 + 2 * LN2, -1 + 2 * LN2]),  # one γ for all
        ("candidate", [[2.0, -1.0, 0.0]], [1 + 2 * LN2, 1 - LN2, -1]),  # one γ each
        ("fixed", [[3.0, -6.0, 0.0]], [2, -1, -1]),  # γ/3
        ("none", [2.0], [1, 1, -1]),
    ],
)
def test_noise_by_hand(noise, gamma, expected):
    gate, variables = one_weight_gate(gate_noise=noise)
    logits = gate.apply(variables, FEATURES, train=True, gate_noise=jnp.array(gamma)).logits
    np.testing.assert_allclose(logits, [expected], rtol=1e-6)


def test_noise_that_is_not_learned_has_no_parameters():
    for noise in ("fixed", "none"):
        gate, _ = one_weight_gate(gate_noise=noise)
        assert set(gate.init(jax.random.key(0), FEATURES, train=False)["params"]) == {"kernel"}


def test_random_start_has_unit_logits():
    gate: Any = Gate(num_candidates=300, gate_widths=(), gate_order=1, gate_init="random")
    x = jnp.ones((1, 1, 400))
    params = gate.init(jax.random.key(0), x, train=False)["params"]
    assert abs(float(params["kernel"].std()) * 20 - 1) < 0.02  # 1/√400
    logits = gate.apply({"params": params}, x, train=False).logits
    assert abs(float(jnp.std(logits)) - 1) < 0.1


def gated(**options) -> Any:
    return GatedMixtureHead(5, **GATED, **options)


@pytest.mark.parametrize(("noise", "shape"), [("image", (3,)), ("candidate", (3, 4)), ("fixed", (3, 4))])
def test_noise_is_drawn_in_its_shape(noise, shape):
    head = gated(gate_noise=noise, gate_init="random")
    maps = jnp.asarray(feature_map(), jnp.float32)
    variables: Any = head.init(jax.random.key(0), maps, train=False)

    def run(gate_noise=None, seed=0):
        rngs = {"gating": jax.random.key(seed), "dropout": jax.random.key(1)}
        (_, aux), _ = head.apply(variables, maps, train=True, gate_noise=gate_noise, rngs=rngs, mutable=["batch_stats"])
        return np.asarray(aux["gate_weights"])

    assert (run(seed=0) != run(seed=1)).any()
    if noise == "image":
        assert (run(jnp.ones(shape)) != run(jnp.zeros(shape))).any()
    else:  # a candidate's own noise wins it every image
        assert (run(jnp.zeros(shape).at[:, 2].set(1e3))[:, 2] > 0.99).all()
    wrong = (3, 4) if shape == (3,) else (3,)
    with pytest.raises(ValueError, match="gate_noise must have shape"):
        run(jnp.ones(wrong))


def test_without_noise_training_draws_nothing():
    head = gated(gate_noise="none", gate_init="random")
    maps = jnp.asarray(feature_map(), jnp.float32)
    variables: Any = head.init(jax.random.key(0), maps, train=False)

    def run(**rngs):
        (_, aux), _ = head.apply(
            variables, maps, train=True, rngs={"dropout": jax.random.key(1), **rngs}, mutable=["batch_stats"]
        )
        return np.asarray(aux["gate_weights"])

    np.testing.assert_array_equal(run(gating=jax.random.key(2)), run(gating=jax.random.key(3)))
    np.testing.assert_array_equal(run(gating=jax.random.key(2)), run())


def test_balance_of_weights_and_of_the_softmax(x64):
    maps = jnp.asarray(feature_map())
    variables = varied(gated())
    losses = {}
    for on in ("weights", "softmax"):
        for ddof in (0, 1):
            _, aux = gated(balance_on=on, balance_ddof=ddof).apply(variables, maps, train=False)
            usage = np.asarray(aux["importance"]).sum(0)
            losses[on, ddof] = float(aux["balance_loss"])
            np.testing.assert_allclose(losses[on, ddof], usage.var(ddof=ddof) / usage.mean() ** 2, rtol=1e-12)
            if on == "weights":
                np.testing.assert_array_equal(aux["importance"], aux["gate_weights"])
            else:
                np.testing.assert_allclose(aux["importance"].sum(-1), 1, rtol=1e-12)
                assert (np.asarray(aux["importance"]) > 0).all()
    assert losses["weights", 0] == pytest.approx(losses["weights", 1] * 3 / 4)  # (n − 1)/n
    assert losses["softmax", 1] < losses["weights", 1]


def test_v_moe_importance_loss_by_hand():
    # h without noise is ln (4, 2, 1, 1) for one image and ln (1, 1, 1, 1) for the other, whose softmax are
    # (4, 2, 1, 1)/8 and (2, 2, 2, 2)/8: importance (6, 4, 3, 3)/8, mean ½, squares of deviations from 4/8:
    # (4 + 0 + 1 + 1)/64, over n = 4: 6/256; divided by the squared mean ¼: 6/64
    options: dict[str, Any] = {"gate_noise": "fixed", "balance_on": "softmax", "balance_ddof": 0}
    gate: Any = Gate(num_candidates=4, num_selected=1, gate_widths=(), gate_order=1, **options)
    variables = {"params": {"kernel": jnp.log(jnp.array([[4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))}}
    x = jnp.eye(2)[:, None]
    noise = jnp.array([[0.0, 0.0, 40.0, 0.0], [0.0, -8.0, 0.0, 9.0]])
    for given in (None, noise):
        out = gate.apply(variables, x, train=True, gate_noise=given, rngs={"gating": jax.random.key(0)})
        np.testing.assert_allclose(out.importance, jnp.array([[4, 2, 1, 1], [2, 2, 2, 2]]) / 8, rtol=1e-6)
        np.testing.assert_allclose(out.balance_loss, 6 / 64, rtol=1e-5)
    assert out.indices.tolist() == [[2], [3]]  # the noise, divided by n, still selects
