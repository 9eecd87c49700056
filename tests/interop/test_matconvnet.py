"""Checkpoints of the authors' script: reading, writing, resuming, and rejecting damaged files."""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.io

from gmsop_jax.config import default_config
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop import matconvnet, matfile
from gmsop_jax.interop.matconvnet import Checkpoint, load, load_checkpoint, save
from gmsop_jax.interop.parameters import to_trained
from gmsop_jax.models import create_model
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.step import create_state, make_train_step

VARIABLES = ("net", "state", "stats", "epoch")


def save_again(path, checkpoint: Checkpoint, *, v73=False):
    save(
        path,
        checkpoint.model_config,
        checkpoint.variables,
        momentum=checkpoint.momentum,
        epoch=checkpoint.epoch,
        balance_weight=checkpoint.balance_weight,
        meta=checkpoint.meta,
        stats=checkpoint.stats,
        v73=v73,
    )


def test_contents_of_a_checkpoint(checkpoint_path):
    checkpoint = load_checkpoint(checkpoint_path)
    config = checkpoint.model_config
    assert (config.head, config.num_classes, config.blocks_per_stage) == ("srsop", 10, 2)
    assert (config.num_iters, config.pixel_scale, config.stage_strides) == (3, 60.0, (1, 2, 2, 1))
    assert checkpoint.epoch == 5
    assert len(checkpoint.stats["train"]) == 5
    assert checkpoint.mean_rgb == pytest.approx([126.68550873, 115.34725189, 124.76429749])
    assert checkpoint.class_names is None
    stored = scipy.io.loadmat(checkpoint_path)["net"][0, 0]["params"][0, 0]["value"]
    np.testing.assert_array_equal(checkpoint.variables["params"]["backbone"]["stem"]["kernel"], stored)


def test_the_example_of_the_docstring_runs(checkpoint_path, monkeypatch):
    """NumPy variables, as `load` returns them, are as good as JAX arrays."""
    assert matconvnet.__doc__
    example = [line.strip() for line in matconvnet.__doc__.splitlines() if line.startswith("    ")]
    assert len(example) == 2
    example[0] = example[0].replace("net-epoch-60.mat", str(checkpoint_path))
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32) * 50
    names: dict[str, Any] = {"load": load, "create_model": create_model, "images": images}
    exec("\n".join(example), names)
    assert names["logits"].shape == (2, 10)


@pytest.mark.parametrize("dispatch", ["loop", "gather", "auto"])
def test_numpy_and_jax_variables_of_an_imported_network_are_equal(small_model, tmp_path, dispatch):
    config, random = small_model("gmsop")
    save(tmp_path / "net-epoch-1.mat", config, random)
    config, variables = load(tmp_path / "net-epoch-1.mat")
    config.num_selected, config.dispatch = 2, dispatch
    model = create_model(config)
    images = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
    expected = jax.jit(model.apply)(jax.tree.map(jnp.asarray, variables), images)[0]
    eager = model.apply(variables, images)[0]
    closure = jax.jit(lambda x: model.apply(variables, x)[0])(images)
    for logits in (eager, closure, jax.jit(model.apply)(variables, images)[0]):
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    def loss(params):
        return model.apply({**variables, "params": params}, images)[0].sum()

    gradient = jax.grad(loss)(variables["params"])
    other = jax.grad(loss)(jax.tree.map(jnp.asarray, variables["params"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), gradient, other)


@pytest.mark.parametrize(("dtype", "bound"), [(np.float32, 1e-4), (np.float64, 1e-9)])
def test_logits_of_an_imported_network(checkpoint_path, dtype, bound):
    """Measured: 1.5e-6 in single, 1.9e-15 in double precision."""
    checkpoint = load_checkpoint(checkpoint_path)
    with np.load(checkpoint_path.parent / "eval.npz") as values:
        images = values["images"].astype(np.float32) - np.float32(checkpoint.mean_rgb)
        theirs = values["val_logits_f64" if dtype == np.float64 else "val_logits_f32"]
    with jax.enable_x64(dtype == np.float64):
        variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), checkpoint.variables)
        model = create_model(checkpoint.model_config)
        logits = np.asarray(jax.jit(model.apply)(variables, jnp.asarray(images, dtype))[0])
    assert logits.dtype == dtype
    assert np.abs(logits - theirs).max() <= bound * np.abs(theirs).max()


@pytest.mark.parametrize("v73", [False, True], ids=["v7", "v7.3"])
def test_load_save_load_keeps_every_bit(checkpoint_path, tmp_path, assert_same, v73):
    first = load_checkpoint(checkpoint_path)
    save_again(tmp_path / "net-epoch-5.mat", first, v73=v73)
    second = load_checkpoint(tmp_path / "net-epoch-5.mat")
    assert_same(second.variables, first.variables)
    assert_same(second.momentum, first.momentum)
    assert second.model_config.to_dict() == first.model_config.to_dict()
    assert (second.epoch, second.balance_weight) == (first.epoch, first.balance_weight)
    assert_equal(second.meta, first.meta)
    assert_equal(second.stats, first.stats)


@pytest.mark.parametrize("v73", [False, True], ids=["v7", "v7.3"])
def test_what_is_written_is_what_the_authors_script_wrote(checkpoint_path, tmp_path, v73):
    """Every variable, field, class and shape of the file, so that their code reads the one as the other."""
    save_again(tmp_path / "again.mat", load_checkpoint(checkpoint_path), v73=v73)
    ours, theirs = (matfile.read(p, VARIABLES) for p in (tmp_path / "again.mat", checkpoint_path))
    assert ours.pop("epoch").item() == 5
    assert_equal(ours, theirs)


def test_scipy_reads_what_is_written(checkpoint_path, tmp_path):
    save_again(tmp_path / "again.mat", load_checkpoint(checkpoint_path))
    ours, theirs = (scipy.io.loadmat(path, simplify_cells=True) for path in (tmp_path / "again.mat", checkpoint_path))
    for a, b in zip(ours["net"]["params"], theirs["net"]["params"], strict=True):
        assert a["name"] == b["name"]
        np.testing.assert_array_equal(a["value"], b["value"])


def assert_equal(actual, expected, where=""):
    """Asserts that two values of `matfile` have the same types, shapes and bits."""
    assert type(actual) is type(expected), where
    if isinstance(actual, dict):
        assert list(actual) == list(expected), where
        for key in actual:
            assert_equal(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(actual, list) or (isinstance(actual, np.ndarray) and actual.dtype == object):
        assert np.shape(actual) == np.shape(expected), where
        for i, (a, b) in enumerate(zip(np.ravel(actual), np.ravel(expected), strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    elif isinstance(actual, np.ndarray):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), where
        assert actual.tobytes() == expected.tobytes(), where
    else:
        assert actual == expected, where


@pytest.mark.parametrize("v73", [False, True], ids=["v7", "v7.3"])
@pytest.mark.parametrize("head", ["gap", "srsop", "gmgap", "gmsop"])
def test_every_head_is_written_and_read(small_model, tmp_path, assert_same, head, v73):
    config, variables = small_model(head, num_iters=5, dropout_rate=0.3)
    meta = {"classes": {"name": np.array([["ant", "bee", "cat"]], object)}}
    save(tmp_path / "x.mat", config, variables, epoch=7, balance_weight=3.0, meta=meta, v73=v73)
    checkpoint = load_checkpoint(tmp_path / "x.mat")
    assert_same(checkpoint.variables, variables)
    assert checkpoint.epoch == 7
    assert checkpoint.class_names == ["ant", "bee", "cat"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(checkpoint.momentum))
    ours, read = config.to_dict(), checkpoint.model_config.to_dict()
    if head in ("gmgap", "gmsop"):
        assert checkpoint.balance_weight == 3.0
        keys = set(ours) - ({"num_iters"} if head == "gmgap" else set())
    else:
        keys = {"head", "num_classes", "blocks_per_stage", "stage_widths", "stage_strides", "stem_width"}
    assert {k: read[k] for k in keys} == {k: ours[k] for k in keys}
    assert load(tmp_path / "x.mat")[0].to_dict() == read


def test_double_precision_is_kept(small_model, tmp_path, assert_same):
    config, variables = small_model("gmsop")
    variables = jax.tree.map(lambda leaf: leaf + np.float64(1e-12), variables)
    save(tmp_path / "x.mat", config, variables, momentum=variables["params"])
    checkpoint = load_checkpoint(tmp_path / "x.mat")
    assert_same(checkpoint.variables, variables)
    assert_same(checkpoint.momentum, variables["params"])


def test_the_epoch_without_statistics_is_the_files(small_model, tmp_path):
    path = tmp_path / "net-epoch-42.mat"
    save(path, *small_model("gap"))
    contents = matfile.read(path, VARIABLES)
    del contents["epoch"]
    matfile.write(path, contents)
    assert load_checkpoint(path).epoch == 42


@pytest.mark.slow
def test_a_step_continues_from_imported_momentum(checkpoint_path, x64):
    """Against m ← 0.9 m − (g + 1e-4 p), p ← p + lr·m on the file's own arrays."""
    checkpoint = load_checkpoint(checkpoint_path)
    config = checkpoint.model_config
    variables, momentum = jax.tree.map(jnp.float64, (checkpoint.variables, checkpoint.momentum))
    inner = create_optimizer(default_config().train, optax.constant_schedule(0.002), config.pixel_scale)
    optimizer = optax.chain(optax.trace(0.0), inner)  # the first keeps the gradient
    state = create_state(variables, optimizer)
    opt_state: Any = state.opt_state
    gradient, inner_state = opt_state
    state = state.replace(opt_state=(gradient, optax.tree.set(inner_state, trace=momentum)))
    with np.load(checkpoint_path.parent / "eval.npz") as values:
        batch = {"image": jnp.asarray(values["images"][:4]), "label": jnp.arange(4)}
    mean_rgb = np.asarray(checkpoint.mean_rgb)
    train = default_config().train
    step = make_train_step(create_model(config), optimizer, train, mean_rgb=mean_rgb, seed=0, balance_ddof=1)
    after, _ = jax.jit(step)(state, batch)

    stored = matfile.read(checkpoint_path, ("net", "state"))
    names = [p["name"] for p in stored["net"]["params"]]
    theirs = dict(zip(names, stored["state"]["momentum"].ravel(), strict=True))
    start = {p["name"]: p["value"] for p in stored["net"]["params"]}
    ours = to_trained(config, after.params)
    for name, g in to_trained(config, after.opt_state[0].trace).items():
        p, m = (values[name].astype(np.float64).reshape(g.shape) for values in (start, theirs))
        rate = 0.002 / (3600 if name == "conv1_f" else 1)
        expected = p + rate * (0.9 * m - (g + 1e-4 * p))
        np.testing.assert_allclose(ours[name], expected, rtol=1e-12, atol=1e-15)


def _set(contents, path, value):
    """Replaces, or with the value None removes, what lies at a path of keys."""
    *parents, last = path
    for key in parents:
        contents = contents[key]
    if value is None:
        del contents[last]
    else:
        contents[last] = value


def _text_cell(*texts):
    return np.array([list(texts)], object)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["net"], None, "no struct 'net'"),
        (["net"], np.zeros((2, 2)), "no struct 'net'"),
        (["net", "params"], None, "net has no field 'params'"),
        (["net", "layers"], np.zeros((0, 0)), "net.layers is not a struct array"),
        (["net", "params", 0, "value"], "text", "'conv1_f' is not an array"),
        (["net", "params", 0, "value"], np.zeros((3, 3, 3, 6)), r"'conv1_f' has shape \(3, 3, 3, 6\).*\(3, 3, 3, 5\)"),
        (["net", "params", 1, "value"], np.zeros((6, 1)), r"'conv1_b' has shape \(6, 1\).*\(5,\)"),
        (["net", "params", 4, "value"], np.zeros((6, 2)), r"'conv1_bn_m' has shape \(6, 2\).*\(5,\)"),
        (["net", "params", 4, "value"], np.zeros((5, 1)), r"'conv1_bn_m' has shape \(5, 1\)"),
        (["net", "params", 9, "value"], np.zeros((3, 3, 5, 7)), r"'conv2_1a_f' has shape \(3, 3, 5, 7\)"),
        (["net", "layers", 5, "block"], np.zeros((0, 0)), "'conv2_1a_conv' has no field 'stride'"),
        (["net", "params", 1, "name"], "conv1_f", "same name"),
        (["net", "params", 1, "name"], np.zeros((1, 1)), "'name' is not text"),
        (["net", "params", 0, "learningRate"], np.zeros((1, 1)), "'conv1_f': learningRate"),
        (["net", "layers", 0, "type"], "dagnn.ConvTranspose", "'conv1_conv' is of type 'dagnn.ConvTranspose'"),
        (["net", "layers", 0], None, "layer 'conv1_conv' .* is missing"),
        (["net", "layers", 1, "name"], "conv1_conv", "two layers 'conv1_conv'"),
        (["net", "layers", 2, "name"], "other", "'other' .* is not part of the network"),
        (["net", "layers", 3, "inputs"], _text_cell("input"), "'conv2_1_adapt_conv_conv': inputs is"),
        (["net", "layers", 3, "params"], _text_cell("other"), "'conv2_1_adapt_conv_conv': params is"),
        (
            ["net", "layers", 0, "inputs"],
            _text_cell(np.zeros((1, 1))),
            "'conv1_conv': inputs is not a cell array of text",
        ),
        (["net", "layers", 0, "block", "pad"], np.zeros((1, 4)), "'conv1_conv': pad is"),
        (["net", "layers", 0, "block", "stride"], np.full((1, 2), 2.0), "'conv1_conv': stride is"),
        (["net", "layers", 1, "block", "epsilon"], np.full((1, 1), 1e-3), "'conv1_bn': epsilon is"),
        (["state", "momentum"], None, "state.momentum is not a cell array"),
        (["state", "momentum"], np.zeros((1, 3)), "state.momentum is not a cell array of"),
        (["epoch"], np.full((1, 1), -1.0), "epoch is -1"),
    ],
)
def test_errors_name_the_field_or_layer(small_model, tmp_path, path, value, message):
    save(tmp_path / "x.mat", *small_model("gmsop"))
    contents = matfile.read(tmp_path / "x.mat", VARIABLES)
    _set(contents, path, value)
    matfile.write(tmp_path / "x.mat", contents)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "x.mat")
    assert str(caught.value).startswith(str(tmp_path / "x.mat"))


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("CM_2_Cov_Sqrtm", "iterNum", 5.0, "'CM_2_Cov_Sqrtm': iterNum is"),
        ("gating_Cov_Sqrtm", "iterNum", 0.0, "'gating_Cov_Sqrtm': iterNum is 0"),
        ("gating_Cov_Sqrtm", "coef", 30.0, "'gating_Cov_Sqrtm': coef is"),
        ("gating", "topk", 9.0, "K = 9"),
        ("gating", "topk", 1.5, "'gating': topk is 1.5"),
        ("H_x", "topk", 1.0, "'H_x': topk is"),
        ("dropout", "rate", 1.0, "'dropout': rate is 1"),
        ("conv1_relu", "leak", 0.1, "'conv1_relu': leak is"),
        ("conv2_1a_conv", "stride", np.nan, "'conv2_1a_conv': stride is"),
        ("Balance_loss", "loss_weight", np.inf, "'Balance_loss': loss_weight"),
    ],
)
def test_errors_name_the_hyperparameter(small_model, tmp_path, name, key, value, message):
    save(tmp_path / "x.mat", *small_model("gmsop"))
    contents = matfile.read(tmp_path / "x.mat", VARIABLES)
    (layer,) = (layer for layer in contents["net"]["layers"] if layer["name"] == name)
    layer["block"][key] = np.full((1, 1), value)
    matfile.write(tmp_path / "x.mat", contents)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x.mat")


def test_momentum_of_another_shape_is_refused(small_model, tmp_path):
    save(tmp_path / "x.mat", *small_model("gmsop"))
    contents = matfile.read(tmp_path / "x.mat", VARIABLES)
    contents["state"]["momentum"][0, 0] = np.ones((3, 3, 3, 4), np.float32)
    matfile.write(tmp_path / "x.mat", contents)
    with pytest.raises(CheckpointError, match=r"state.momentum: 'conv1_f' has shape \(3, 3, 3, 4\)"):
        load(tmp_path / "x.mat")


def test_variables_are_renamed_without_harm(small_model, tmp_path, assert_same):
    """The names of a layer's outputs are arbitrary; only the connections between layers matter."""
    config, variables = small_model("gmsop")
    save(tmp_path / "x.mat", config, variables)
    contents = matfile.read(tmp_path / "x.mat", VARIABLES)
    for layer in contents["net"]["layers"]:
        for key in ("inputs", "outputs"):
            layer[key] = _text_cell(*(f"x_{name}" for name in layer[key].ravel()))
    matfile.write(tmp_path / "x.mat", contents)
    assert_same(load(tmp_path / "x.mat")[1], variables)


ODD_VALUES = [
    np.zeros((0, 0)),
    np.full((1, 1), np.nan),
    np.full((1, 1), 1e300),
    np.full((1, 1), -1.0),
    np.full((2, 3), 7.0),
    np.full((1, 1), 2**63, np.uint64),
    np.array([[True]]),
    "text",
    "",
    {},
    [],
    [{"a": "b"}, {"a": np.eye(2)}],
    _text_cell("a", np.eye(2), {"a": "b"}),
    np.empty((0, 0), object),
]


def _mutate(draw: random.Random, value):
    """A copy of MATLAB's values in which one, at any depth, is odd or missing."""
    if isinstance(value, dict) and value and draw.random() < 0.95:
        key = draw.choice(list(value))
        if draw.random() < 0.1:
            return {name: item for name, item in value.items() if name != key}
        return value | {key: _mutate(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.95:
        at = draw.randrange(len(value))
        return [*value[:at], _mutate(draw, value[at]), *value[at + 1 :]]
    return draw.choice(ODD_VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["gap", "gmsop"])
def test_fuzzed_contents_raise_one_error(small_model, tmp_path, monkeypatch, head):
    """1,500 files of each network with an odd value in a sound file: a network, or a CheckpointError."""
    path = tmp_path / "net-epoch-1.mat"
    save(path, *small_model(head), meta={"classes": {"name": _text_cell("a", "b", "c")}, "normalization": {"x": "y"}})
    contents, draw, refused = matfile.read(path, VARIABLES), random.Random(0), 0
    for _ in range(1500):
        damaged = contents | {(key := draw.choice(VARIABLES)): _mutate(draw, contents[key])}
        monkeypatch.setattr(matfile, "read", lambda *_, damaged=damaged: damaged)
        try:
            checkpoint = load_checkpoint(path)
            assert isinstance(checkpoint.class_names, list | None)
            assert isinstance(checkpoint.mean_rgb, np.ndarray | None)
        except CheckpointError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file", b"PK\x03\x04", b"\x80\x04K\x01.", bytes(5000)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "net-epoch-1.mat"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"net-epoch-1\.mat is (not a MATLAB file|damaged)"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"net-epoch-1\.mat does not exist"):
        load(tmp_path / "net-epoch-1.mat")
