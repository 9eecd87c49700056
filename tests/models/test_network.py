from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.config import ConfigDict, model_defaults
from gmsop_jax.models import (
    GAPHead,
    GatedMixtureHead,
    Network,
    ResNet,
    SecondOrderHead,
    count_parameters,
    create_model,
)
from gmsop_jax.models.network import HEADS

KEY = jax.random.key(0)
MIXTURE = {"num_candidates": 4, "num_selected": 2, "candidate_widths": (6, 3), "gate_widths": (5, 4)}
RNGS = {"gating": jax.random.key(1), "dropout": jax.random.key(2)}


def tiny(head: str = "gmsop", **fields) -> ConfigDict:
    config = model_defaults()
    config.update(head=head, num_classes=5, blocks_per_stage=1, stem_width=4, **MIXTURE, **fields)
    config.stage_widths, config.stage_strides = (4, 8), (2, 1)
    return config


def images(b: int = 3, size: int = 8) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(0, 60, size=(b, size, size, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def gmsop():
    """Model and variables whose gate no longer ties."""
    model = create_model(tiny())
    variables = jax.jit(model.init)(KEY, images())
    gate = variables["params"]["head"]["mixture"]["gate"]
    gate["kernel"] = gate["kernel"] + jax.random.normal(KEY, gate["kernel"].shape)
    gate["noise_kernel"] = jax.random.normal(jax.random.key(9), gate["noise_kernel"].shape)
    return model, variables


# ---- parameters of the published networks


def published(head: str, **fields) -> int:
    config = model_defaults()
    config.update(head=head, num_classes=1000, **fields)
    if head in ("gap", "gmgap"):
        config.stage_strides = (1, 2, 2, 2)
    model = create_model(config)
    variables = jax.eval_shape(model.init, KEY, jnp.zeros((1, 64, 64, 3)))
    return count_parameters(variables["params"])


@pytest.mark.parametrize(
    ("head", "fields", "count"),
    [
        ("gap", {}, 829_192),
        ("srsop", {}, 8_957_192),
        ("gmgap", {"candidate_widths": (512,)}, 2_333_192),
        ("gmsop", {}, 10_352_776),
        (
            "gmgap",
            {"candidate_widths": (512,), "gate_widths": (512,), "blocks_per_stage": 4, "width_factor": 2},
            8_687_496,
        ),
        (
            "gmsop",
            {"candidate_widths": (512, 128), "gate_widths": (512, 128), "blocks_per_stage": 4, "width_factor": 2},
            17_809_160,
        ),
    ],
)
def test_published_parameter_counts(head, fields, count):
    assert published(head, **fields) == count


# ---- the one contract

DIMENSIONS = {
    "gap": 8,
    "sop": 36,
    "srsop": 36,
    "mpncov": 36,
    "dropcov": 36,
    "sot": 6144,  # 6 heads of 32 · 32
    "gmgap": 3,
    "gmsop": 6,
    "avegap": 3,
    "avesop": 6,
    "concatgap": 12,
    "concatsop": 24,
}


def test_every_head_is_tried():
    assert tuple(DIMENSIONS) == HEADS


@pytest.mark.parametrize(("head", "dimension"), list(DIMENSIONS.items()))
def test_contract_of_each_head(head, dimension):
    model = create_model(tiny(head))
    variables = jax.jit(model.init)(KEY, images())
    (logits, aux), updates = jax.jit(lambda v, x: model.apply(v, x, train=True, rngs=RNGS, mutable=["batch_stats"]))(
        variables, images()
    )
    assert logits.shape == (3, 5)
    assert set(aux) == {"balance_loss", "gate_weights", "importance", "features"}
    assert aux["features"].shape == (3, dimension)
    assert aux["balance_loss"].shape == ()
    gates = 4 if head.startswith("gm") else 1
    assert aux["gate_weights"].shape == (3, gates)
    np.testing.assert_allclose(aux["gate_weights"].sum(-1), 1, rtol=1e-6)
    assert (np.count_nonzero(aux["gate_weights"], axis=-1) == min(gates, 2)).all()
    assert (aux["balance_loss"] == 0) == (gates == 1)
    assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    logits, _ = model.apply(variables, images(2, 12))  # evaluation by default, without RNGs; another size
    assert logits.shape == (2, 5)


def test_features_are_the_vector_before_batch_norm(gmsop):
    model, variables = gmsop
    logits, aux = model.apply(variables, images())
    head = variables["params"]["head"]
    moments = variables["batch_stats"]["head"]["bn"]
    normal = (aux["features"] - moments["mean"]) / moments["sigma"] * head["bn"]["scale"] + head["bn"]["bias"]
    expected = normal @ head["classifier"]["kernel"] + head["classifier"]["bias"]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


def test_single_order_heads_have_neither_candidates_nor_batch_norm():
    for head in ("gap", "srsop"):
        variables = jax.eval_shape(create_model(tiny(head)).init, KEY, images())
        assert set(variables["params"]["head"]) == {"classifier"}


class OwnBackbone(nn.Module):
    """A user's own backbone."""

    @nn.compact
    def __call__(self, images, *, train: bool):
        return nn.relu(nn.Conv(7, (3, 3))(images))


@pytest.mark.parametrize(
    "head", [GAPHead(5), SecondOrderHead(5), GatedMixtureHead(5, **MIXTURE), GatedMixtureHead(5, **MIXTURE, order=1)]
)
def test_any_head_on_the_users_own_backbone(head):
    network: Any = Network(OwnBackbone(), head)
    variables = network.init(KEY, images(2, 6))
    logits, aux = network.apply(variables, images(2, 6))
    assert logits.shape == (2, 5)
    assert np.isfinite(logits).all()
    assert aux["features"].ndim == 2


def test_head_inside_the_users_own_module():
    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(8, (3, 3))(x))
            return GatedMixtureHead(5, **MIXTURE)(x, train=train)[0]

    model: Any = Classifier()
    assert model.apply(model.init(KEY, images(2, 7)), images(4, 9)).shape == (4, 5)


def test_backbone_under_another_head():
    network: Any = Network(
        ResNet(1, stage_widths=(4,), stage_strides=(2,), stem_width=4), SecondOrderHead(3, num_iters=5)
    )
    logits, aux = network.apply(network.init(KEY, images()), images())
    assert (logits.shape, aux["features"].shape) == ((3, 3), (3, 10))


# ---- precision


def cast(shapes, dtype):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)


@pytest.mark.parametrize("head", HEADS)
def test_float64_is_followed(x64, head):
    model = create_model(tiny(head))
    variables = cast(jax.eval_shape(model.init, KEY, images()), jnp.float64)

    def train_and_slope(variables, x):
        def loss(params):
            out, updates = model.apply(
                {**variables, "params": params}, x, train=True, rngs=RNGS, mutable=["batch_stats"]
            )
            return jnp.sum(out[0]), (out, updates)

        return jax.grad(loss, has_aux=True)(variables["params"])

    x = jax.ShapeDtypeStruct((3, 8, 8, 3), "float64")
    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(train_and_slope, variables, x))} == {
        np.dtype("float64")
    }
    # and nothing between is narrower
    assert "f64[3,8,8,4]" in (text := str(jax.make_jaxpr(train_and_slope)(variables, x)))
    assert "f32[" not in text
    assert "bf16[" not in text


def test_compute_dtype_bfloat16_keeps_the_square_root_in_float32():
    model = create_model(tiny(compute_dtype="bfloat16"))
    variables = jax.jit(model.init)(KEY, images())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def run(variables, x):
        return model.apply(variables, x, train=True, rngs=RNGS, mutable=["batch_stats"])

    shapes = jax.eval_shape(run, variables, images())
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    text = str(jax.make_jaxpr(run)(variables, images()))
    convolutions = [line for line in text.splitlines() if "conv_general_dilated" in line]
    assert convolutions
    assert all("bf16[" in line for line in convolutions)
    roots = [line for line in text.splitlines() if "sqrt" in line]
    assert roots
    assert not any("bf16" in line for line in roots)


def test_bfloat16_is_near_float32(gmsop):
    model, variables = gmsop
    exact, _ = model.apply(variables, images())
    rough, _ = create_model(tiny(compute_dtype="bfloat16")).apply(variables, images())
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, atol=0.1 * float(jnp.abs(exact).max()))
    assert (rough != exact).any()


# ---- RNG streams


def train_weights(model, variables, noise=None, **rngs):
    (_, aux), _ = model.apply(variables, images(), train=True, gate_noise=noise, rngs=rngs, mutable=["batch_stats"])
    return np.asarray(aux["gate_weights"])


def test_gate_noise_replaces_the_draw_and_repeats(gmsop):
    model, variables = gmsop
    noise = jnp.array([0.5, -1.0, 2.0])
    keys = [jax.random.key(i) for i in range(3)]
    given = [train_weights(model, variables, noise, gating=key, dropout=KEY) for key in keys]
    np.testing.assert_array_equal(given[0], given[1])
    np.testing.assert_array_equal(given[0], train_weights(model, variables, noise, dropout=KEY))  # no stream needed
    drawn = [train_weights(model, variables, gating=key, dropout=KEY) for key in keys]
    assert (drawn[0] != drawn[1]).any()
    np.testing.assert_array_equal(drawn[0], train_weights(model, variables, gating=keys[0], dropout=KEY))


def test_noise_is_one_number_an_image_times_softplus(gmsop):
    model, variables = gmsop

    def logits(noise):
        _, state = model.apply(variables, images(), gate_noise=noise, capture_intermediates=True, mutable=True)
        return np.asarray(state["intermediates"]["head"]["mixture"]["gate"]["__call__"][0].logits)

    noise = np.array([0.0, 1.0, -2.0], np.float32)
    still = logits(jnp.zeros(3))
    scale = logits(jnp.ones(3)) - still
    assert (scale > 0).all()  # softplus
    np.testing.assert_allclose(logits(jnp.asarray(noise)), still + noise[:, None] * scale, rtol=1e-4, atol=1e-5)


def test_no_noise_at_test_time(gmsop):
    model, variables = gmsop
    _, plain = model.apply(variables, images(), rngs=RNGS)
    _, zero = model.apply(variables, images(), gate_noise=jnp.zeros(3))
    np.testing.assert_array_equal(plain["gate_weights"], zero["gate_weights"])


def test_training_without_the_gating_stream_is_refused(gmsop):
    model, variables = gmsop
    with pytest.raises(ValueError, match=r"rngs=\{'gating': key\}"):
        train_weights(model, variables, dropout=KEY)


def test_gate_noise_of_another_shape_is_refused(gmsop):
    model, variables = gmsop
    with pytest.raises(ValueError, match=r"gate_noise must have shape \(3,\), got \(3, 1\)"):
        train_weights(model, variables, jnp.ones((3, 1)), dropout=KEY)


def test_constant_start_ties_and_is_drawn_at_random():
    model = create_model(tiny())
    variables = jax.jit(model.init)(KEY, images(40))
    gate = variables["params"]["head"]["mixture"]["gate"]
    np.testing.assert_allclose(gate["kernel"], np.full((10, 4), 0.1), rtol=1e-6)  # 1/F, F = 4 · 5/2
    np.testing.assert_array_equal(gate["noise_kernel"], gate["kernel"])
    (_, aux), _ = model.apply(variables, images(40), train=True, rngs=RNGS, mutable=["batch_stats"])
    weights = np.asarray(aux["gate_weights"])
    np.testing.assert_allclose(np.sort(weights), [[0, 0, 0.5, 0.5]] * 40, atol=1e-6)
    assert len(np.unique(weights > 0, axis=0)) > 3  # of 6 pairs


def test_dropout_only_in_training(gmsop):
    model, variables = gmsop
    noise = jnp.zeros(3)

    def logits(train, key):
        out, _ = model.apply(
            variables, images(), train=train, gate_noise=noise, rngs={"dropout": key}, mutable=["batch_stats"]
        )
        return np.asarray(out[0])

    assert (logits(True, jax.random.key(0)) != logits(True, jax.random.key(1))).any()
    np.testing.assert_array_equal(logits(False, jax.random.key(0)), logits(False, jax.random.key(1)))


# ---- gradients of the whole


def test_every_parameter_learns(gmsop):
    model, variables = gmsop

    @jax.jit
    def slope(params):
        def loss(params):
            (logits, aux), _ = model.apply(
                {**variables, "params": params}, images(8), train=True, rngs=RNGS, mutable=["batch_stats"]
            )
            return jnp.sum(logits**2) + aux["balance_loss"]

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(slope(variables["params"])):
        assert np.isfinite(leaf).all(), path
        assert np.any(leaf != 0), path


def test_balance_loss_flows_into_the_gate_only_past_the_backbone(gmsop):
    model, variables = gmsop

    @jax.jit
    def slope(params):
        return jax.grad(lambda p: model.apply({**variables, "params": p}, images())[1]["balance_loss"])(params)

    head = slope(variables["params"])["head"]
    assert not np.any(head["classifier"]["kernel"])
    assert not np.any(head["mixture"]["candidates1"])
    assert np.any(head["mixture"]["gate"]["kernel"])


# ---- refusals


def test_unknown_head_is_refused():
    with pytest.raises(ValueError, match=r"head must be one of gap, sop, .*, concatsop; got 'gmsopp'"):
        create_model(tiny("gmsopp"))


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"backbone must be one of narrow, resnet34, .*; got 'resnet51'"):
        create_model(tiny(backbone="resnet51"))


def test_number_of_classes_must_be_set():
    config = tiny()
    config.num_classes = 0
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        create_model(config)


def test_more_selected_than_candidates_is_refused():
    head = GatedMixtureHead(5, num_candidates=2, num_selected=3, candidate_widths=(3,), gate_widths=(3,))
    with pytest.raises(ValueError, match="between 1 and the number of candidates 2, got 3"):
        head.init(KEY, jnp.ones((1, 4, 4, 3)), train=False)


@pytest.mark.usefixtures("unchecked_types")
def test_uint8_images_are_refused(gmsop):
    model, variables = gmsop
    with pytest.raises(TypeError, match="mean subtracted, got uint8"):
        model.apply(variables, images().astype(jnp.uint8))
