"""Working directories from PyTorch's weights, and the tool that makes them."""

import contextlib
import io
import pathlib

import jax
import numpy as np
import pytest

import gmsop_jax
from gmsop_jax.config import default_config, from_json
from gmsop_jax.config import load as load_config
from gmsop_jax.errors import CheckpointError, ConfigError
from gmsop_jax.interop.torch_run import import_weights
from gmsop_jax.main import main
from gmsop_jax.models import create_model
from gmsop_jax.training.parallel import create_mesh, replicated
from gmsop_jax.training.step import normalize
from gmsop_jax.training.transfer import choose, read_source

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run_tool():
    """A function that runs `gmsop import` with some arguments: (exit status, output, errors)."""

    def run(*arguments):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(["import", *map(str, arguments)])
        return status, out.getvalue(), err.getvalue()

    return run


@pytest.fixture(scope="module")
def weights(tmp_path_factory, maker):
    """A file of ResNet-50's weights."""
    file = tmp_path_factory.mktemp("weights") / "resnet50.safetensors"
    pytest.importorskip("safetensors.numpy").save_file(maker.load("resnet50")[0], file)
    return file


@pytest.fixture(scope="module")
def imported(weights, run_tool):
    """A working directory that the tool made, and what it printed."""
    folder, classes = weights.parent / "run", weights.parent / "classes.txt"
    classes.write_text("".join(f"class {i}\n" for i in range(10)))
    status, printed, _ = run_tool(weights, "--output", folder, "--classes", classes, "--config.seed=4")
    assert status == 0
    return folder, printed


@pytest.mark.slow
def test_the_folder_holds_the_network_and_its_inputs(imported, maker):
    folder, _ = imported
    model, variables, info = gmsop_jax.load(folder)
    assert info.step == 0
    assert info.inputs.classes == tuple(f"class {i}" for i in range(10))
    assert info.inputs.mean_rgb == pytest.approx((123.675, 116.28, 103.53))
    assert info.inputs.image_size == (224, 224)
    logits, _ = jax.jit(model.apply)(variables, normalize(maker.images(), info.inputs.mean_rgb))
    expected = maker.load("resnet50")[1]["float32"]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.slow
def test_the_configuration(imported):
    folder, _ = imported
    config = from_json((folder / "config.json").read_text())
    assert config.to_dict() == load_config(folder / "config.py").to_dict()
    assert (config.data.image_size, config.eval.resize, config.seed) == (224, 256, 4)
    assert (config.model.backbone, config.model.batch_norm_rate, config.model.pixel_scale) == ("resnet50", 0.1, 60)
    assert config.train.to_dict() == default_config().train.to_dict()


@pytest.mark.slow
def test_a_second_order_head_starts_from_it(imported):
    folder, _ = imported
    overrides = ["model.num_classes=7", f"train.init_from={folder}"]
    config = load_config(f"{ROOT}/configs/imagenet.py:resnet50,srsop", overrides)
    source = read_source(config.train.init_from, config.model.pixel_scale, replicated(create_mesh()))
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), "float32")
    like = jax.eval_shape(create_model(config.model).init, jax.random.key(0), images)
    taken, line = choose(like, source)
    assert {path[1] for path in taken} == {"backbone"}
    assert len(taken) == len([path for path in jax.tree.leaves(like) if path.shape]) - 7
    assert line.endswith("new: head")


@pytest.mark.slow
def test_the_tool_prints_what_it_imported_and_the_next_steps(imported, weights, run_tool):
    folder, printed = imported
    # 23,508,032 parameters of the backbone, 2048 · 10 + 10
    assert "resnet50, head gap, 10 classes, 23,528,522 parameters" in printed
    assert f"gmsop evaluate --workdir {folder}" in printed
    assert f"gmsop train --config imagenet:resnet50,srsop --config.train.init_from={folder}" in printed
    status, _, errors = run_tool(weights, "--output", folder)
    assert status == 2
    assert errors.startswith(f"error: {folder} already contains checkpoints")


@pytest.mark.slow
def test_the_fine_tuning_of_a_second_order_network_keeps_its_head(tmp_path, maker, run_tool):
    file = tmp_path / "resnet34_ACD.safetensors"
    pytest.importorskip("safetensors.numpy").save_file(maker.load("dropcov_resnet34")[0], file)
    status, printed, _ = run_tool(file, "--output", tmp_path / "run")
    assert status == 0
    assert "gmsop train --config imagenet:resnet34,dropcov --config.train.init_from=" in printed


def test_the_tools_errors_are_one_line(tmp_path, run_tool):
    status, printed, errors = run_tool(tmp_path / "none.pth", "--output", tmp_path / "run")
    assert (status, printed, errors) == (2, "", f"error: {tmp_path / 'none.pth'} does not exist or is not a file\n")
    status, _, errors = run_tool("x.pth", "--output", tmp_path / "run", "--trangle=row")
    assert status == 2
    assert errors.startswith("error: unrecognized argument --trangle=row; did you mean --triangle?")


def test_nothing_is_written_where_something_is_wrong(weights, tmp_path):
    few = tmp_path / "few.txt"
    few.write_text("one\ntwo\n")
    with pytest.raises(CheckpointError, match=r"few\.txt lists 2 classes, but the network has 10"):
        import_weights(weights, tmp_path / "run", classes=few)
    with pytest.raises(CheckpointError, match=r"can't be read from .*none\.txt"):
        import_weights(weights, tmp_path / "run", classes=tmp_path / "none.txt")
    with pytest.raises(ConfigError, match="batchsize"):
        import_weights(weights, tmp_path / "run", ["train.batchsize=1"])
    with pytest.raises(ConfigError, match=r"changes the shapes of the network.*init_from"):
        import_weights(weights, tmp_path / "run", ["model.head=srsop"])
    assert not (tmp_path / "run").exists()


def test_errors_about_arrays_name_the_file(tmp_path):
    pytest.importorskip("safetensors.numpy").save_file({"a": np.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no array is named layer1"):
        import_weights(tmp_path / "x.safetensors", tmp_path / "run")
