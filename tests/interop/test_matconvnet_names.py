"""Parameters and layers by the authors' names."""

import json
import pathlib

import numpy as np
import pytest

from gmsop_jax import config as configuration
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop import layer_checks, layers
from gmsop_jax.interop.matconvnet import from_params, to_params

ARCHITECTURES = sorted((pathlib.Path(__file__).parents[1] / "goldens/arch").glob("*.json"))

# what the authors' builders make, from their scripts
EXPECTED = {
    "ResNet18-GAP": {"head": "gap"},
    "ResNet18-SR-SOP": {"head": "srsop"},
    "ResNet18-GM-GAP": {"head": "gmgap", "candidate_widths": (512,)},
    "ResNet18-GM-SOP": {"head": "gmsop"},
    "WRN-36-2-GM-GAP": {"head": "gmgap", "gate_widths": (512,), "candidate_widths": (512,)},
    "WRN-36-2-GM-SOP": {
        "head": "gmsop",
        "gate_widths": (512, 128),
        "candidate_widths": (512, 128),
        "dropout_rate": 0.4,
    },
}


def read(path):
    stored = json.loads(path.read_text())
    params = {p["name"]: np.zeros(p["shape"], np.float32) for p in stored["params"]}
    fields = ("name", "type", "inputs", "outputs", "params", "block")
    return params, [layers.Layer(*(layer[key] for key in fields)) for layer in stored["layers"]]


def expected_config(name):
    config = configuration.model_defaults()
    config.num_classes = 1000
    config.gate_gradient = "masked"
    if name.startswith("WRN"):
        config.blocks_per_stage, config.width_factor = 4, 2
    config.stage_strides = (1, 2, 2, 2 if name.endswith("GAP") else 1)
    config.update(EXPECTED[name])
    return config


def with_floats(value):
    """JSON doesn't tell 1 from 1.0."""
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    return float(value) if type(value) is int else value


@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda path: path.stem)
def test_the_six_networks(path):
    params, theirs = read(path)
    config, variables = from_params(params)
    layer_checks.read_hyperparameters(config, {layer.name: layer for layer in theirs})
    assert config.to_dict() == expected_config(path.stem).to_dict()
    assert list(to_params(config, variables)) == list(params)

    ours = layers.network(config)
    assert [layer.name for layer in ours] == [layer.name for layer in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert (a.type, list(a.inputs), list(a.outputs), list(a.params)) == (*(b.type, b.inputs, b.outputs, b.params),)
        assert {k: with_floats(v) for k, v in a.block.items()} == {k: with_floats(v) for k, v in b.block.items()}


def test_the_six_networks_are_all_here():
    assert {path.stem for path in ARCHITECTURES} == set(EXPECTED)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("head", "fields"),
    [
        ("gap", {}),
        ("srsop", {"blocks_per_stage": 3}),
        ("gmgap", {"num_candidates": 11, "num_selected": 4, "candidate_widths": (7,)}),
        ("gmsop", {"gate_widths": (4,), "candidate_widths": (6, 5, 4), "num_classes": 1}),
        ("gmsop", {"stage_widths": (16, 32, 64, 128), "stage_strides": (1, 2, 2, 1), "width_factor": 2}),
        ("gmsop", {"num_candidates": 1, "num_selected": 1, "candidate_widths": (2, 1)}),
    ],
)
def test_round_trip(small_model, assert_same, head, fields, dtype):
    config, variables = small_model(head, **fields)
    expected = {c: _cast(tree, dtype) for c, tree in variables.items()}
    params = to_params(config, expected)
    assert {value.dtype for value in params.values()} == {np.dtype(dtype)}
    read_config, read_variables = from_params(params, num_selected=config.num_selected)
    assert_same(read_variables, expected)
    assert read_config.head == head
    if head in ("gmgap", "gmsop"):
        assert read_config.num_candidates == config.num_candidates
        assert read_config.candidate_widths == config.candidate_widths
    assert read_config.gate_gradient == "masked"
    assert read_config.num_classes == config.num_classes


def _cast(tree, dtype):
    return {k: _cast(v, dtype) if isinstance(v, dict) else v.astype(dtype) for k, v in tree.items()}


def test_classifier_rows_are_permuted_from_columns_to_rows_of_the_triangle(small_model):
    """A triangle of 3: MATLAB's (0,0) (0,1) (1,1) (0,2) (1,2) (2,2) is ours at 0, 1, 3, 2, 4, 5."""
    config, variables = small_model("gmsop")
    params = to_params(config, variables)
    params["prediction_f"] = np.arange(6, dtype=np.float32)[None, None, :, None] * np.ones(3, np.float32)
    params["gating_w"] = np.arange(6, dtype=np.float32)[:, None] * np.ones(3, np.float32)
    params["fusion_bn_bn_m"] = np.arange(12, dtype=np.float32).reshape(6, 2)
    _, read = from_params(params, num_selected=2)
    head, order = read["params"]["head"], [0, 1, 3, 2, 4, 5]
    assert head["classifier"]["kernel"][:, 0].tolist() == order
    assert head["mixture"]["gate"]["kernel"][:, 0].tolist() == order
    assert read["batch_stats"]["head"]["bn"]["mean"].tolist() == [2 * i for i in order]
    assert read["batch_stats"]["head"]["bn"]["sigma"].tolist() == [2 * i + 1 for i in order]


def test_the_stem_is_kept_and_candidates_are_stacked(small_model):
    config, variables = small_model("gmgap")
    params = to_params(config, variables)
    tree = variables["params"]
    np.testing.assert_array_equal(params["conv1_f"], tree["backbone"]["stem"]["kernel"])
    stack = tree["head"]["mixture"]["candidates2"]
    np.testing.assert_array_equal(params["CM_3_b_f"][0, 0], stack[2])
    moments = variables["batch_stats"]["backbone"]["stage2_block1"]["shortcut_bn"]
    np.testing.assert_array_equal(params["conv3_1_adapt_conv_bn_m"].T, [moments["mean"], moments["sigma"]])


def test_columns_and_dropped_axes_are_taken(small_model, assert_same):
    config, variables = small_model("gmsop", num_classes=1)
    params = to_params(config, variables)
    columns = {k: v[:, None] if v.ndim == 1 else v for k, v in params.items()}
    columns["prediction_f"] = columns["prediction_f"][..., 0]  # as MATLAB stores one class
    assert_same(from_params(columns, num_selected=2)[1], variables)


def _without(name):
    return lambda params: params.pop(name)


def _with(name, value):
    return lambda params: params.update({name: value})


ZEROS = np.zeros((1, 1, 6, 5), np.float32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("CM_2_a_f"), "'CM_2_a_f' is missing"),
        (_without("conv2_1a_f"), "'conv2_1a_f' is missing"),
        (_without("conv1_f"), "'conv1_f' is missing"),
        (_without("prediction_f"), "'prediction_f' is missing"),
        (_without("conv3_1b_bn_m"), "'conv3_1b_bn_m' is missing"),
        (_without("gating_noise_w"), "'gating_noise_w' is missing"),
        (_with("CM_4_a_f", ZEROS), "'CM_4_a_f' is not part"),
        (_with("conv99999999_1a_f", ZEROS), "conv"),
        (_with("CM_2_a_f", np.zeros((1, 1, 6, 4), np.float32)), r"'CM_2_a_f' has shape \(1, 1, 6, 4\).*\(1, 1, 6, 5\)"),
        (_with("conv1_b", np.zeros(7, np.float32)), r"'conv1_b' has shape \(7,\)"),
        (_with("conv1_bn_m", np.zeros(5, np.float32)), "'conv1_bn_m' has shape"),
        (_with("gating_w", np.zeros((7, 3), np.float32)), r"'gating_w' has 7 rows, but 3 channels give 3.*6"),
        (
            _with("prediction_f", np.zeros((1, 1, 7, 3), np.float32)),
            r"'prediction_f' has 7 rows, but 3 channels give 3.*6",
        ),
        (_with("conv1_b", np.zeros(5, np.int32)), "'conv1_b' is of type int32"),
        (lambda params: params.clear(), "conv2_1a_f"),
    ],
)
def test_errors_name_the_parameter(small_model, damage, message):
    params = to_params(*small_model("gmsop"))
    damage(params)
    with pytest.raises(CheckpointError, match=message):
        from_params(params, num_selected=2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("conv1_b", np.nan, "'conv1_b' has 5 of 5 values that are NaN"),
        ("prediction_f", -np.inf, "values that are NaN, infinite"),
        ("conv1_bn_m", -0.5, "'conv1_bn_m' has 5 of 5 standard deviations below 0"),
    ],
)
def test_nan_weights_and_negative_deviations_are_refused(small_model, name, value, message):
    params = to_params(*small_model("gmsop"))
    params[name] = np.full_like(params[name], value)
    with pytest.raises(CheckpointError, match=message):
        from_params(params, num_selected=2)


def test_k_is_compared_with_n(small_model):
    with pytest.raises(CheckpointError, match=r"K = 8.*3 candidates"):
        from_params(to_params(*small_model("gmsop")))


def test_variables_of_another_model_are_refused(small_model):
    config, variables = small_model("gmsop")
    with pytest.raises(CheckpointError, match=r"/gate/kernel' has shape \(6, 3\).*\(3, 3\)"):
        to_params(small_model("gmgap")[0], small_model("gmsop")[1])
    with pytest.raises(CheckpointError, match=r"params/head/mixture/.*missing"):
        to_params(config, small_model("srsop")[1])
    with pytest.raises(CheckpointError, match=r"gate/kernel' has shape \(6, 3\).*\(6, 4\)"):
        to_params(small_model("gmsop", num_candidates=4)[0], variables)
    kernel = variables["params"]["head"]["mixture"]["candidates1"][:2]
    mixture = variables["params"]["head"]["mixture"] | {"candidates1": kernel}
    params = variables["params"] | {"head": variables["params"]["head"] | {"mixture": mixture}}
    with pytest.raises(CheckpointError, match=r"candidates1' has shape \(2, 6, 5\).*\(3, 6, 5\)"):
        to_params(config, {**variables, "params": params})


@pytest.mark.parametrize(
    ("head", "field", "value"),
    [
        ("gmsop", "gate_noise", "none"),
        ("srsop", "coefficients", "minimax"),
        ("gmgap", "gate_order", 2),
        ("gap", "projection_widths", (7,)),
    ],
)
def test_what_the_authors_code_has_no_layer_for_is_refused(small_model, head, field, value):
    shared, variables = small_model(head)
    config = ConfigDict(shared.to_dict())
    config[field] = value
    with pytest.raises(CheckpointError, match=rf"config\.model\.{field} = .* has no layer"):
        to_params(config, variables)
