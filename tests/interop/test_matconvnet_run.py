"""Working directories from checkpoints, and the tool that makes them."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmsop_jax.analysis.published import ROWS
from gmsop_jax.commands import weights
from gmsop_jax.config import from_json
from gmsop_jax.config import load as load_config
from gmsop_jax.conversion.convert import convert
from gmsop_jax.errors import CheckpointError, ConfigError
from gmsop_jax.inference.evaluate import evaluate_checkpoint
from gmsop_jax.interop import matfile
from gmsop_jax.interop.matconvnet import Checkpoint, load_checkpoint, save
from gmsop_jax.interop.matconvnet_run import import_checkpoint, run_config
from gmsop_jax.main import main
from gmsop_jax.models import create_model
from gmsop_jax.training.checkpoint import Checkpoints
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.step import create_state


def run_import(*arguments) -> int:
    """Runs `gmsop import`; returns its exit status."""
    return main(["import", *map(str, arguments)])


def data_set(checkpoint_path, folder, mean_rgb):
    """Shards of the images that the authors' code evaluated, also as those for training."""
    with np.load(checkpoint_path.parent / "eval.npz") as values:
        images, labels = values["images"].transpose(1, 2, 3, 0), values["labels_1based"].astype(float)
    images = {
        "data": np.concatenate([images, images], axis=3),
        "labels": np.concatenate([[10.0], labels[1:], labels])[None],  # there are ten classes
        "set": np.repeat([1.0, 2.0], labels.size)[None],
    }
    matfile.write(folder / "imdb.mat", {"images": images})
    manifest = convert("imdb-mat", folder / "imdb.mat", folder / "data", workers=1, progress=False)
    assert manifest is not None
    dataclasses.replace(manifest, mean_rgb=mean_rgb).save(folder / "data")
    return folder / "data"


def test_options_of_training_are_taken(checkpoint_path):
    config = run_config(load_checkpoint(checkpoint_path))
    train = config.train
    assert train.learning_rates == ((0.02, 3), (0.002, 2))
    assert (train.num_epochs, train.batch_size, train.momentum) == (5, 256, 0.9)
    assert (train.weight_decay, train.drop_last) == (1e-4, False)
    assert (config.model.head, config.model.gate_gradient) == ("srsop", "masked")


def test_without_options_the_defaults_stand(small_model):
    config, variables = small_model("gmsop")
    meta = {"trainOpts": {"learningRate": "text", "batchSize": np.zeros((1, 1))}}
    train = run_config(Checkpoint(config, variables, balance_weight=7.0, meta=meta)).train
    assert (train.num_epochs, train.batch_size, train.balance_weight) == (60, 256, 7.0)


def test_state_and_files(checkpoint_path, tmp_path, assert_same):
    """The file counts 32 images in an epoch, one batch of 256: five epochs are five steps."""
    run = import_checkpoint(checkpoint_path, tmp_path)
    assert (run.step, run.epoch, run.mean_rgb_difference) == (5, 5, None)
    stored = from_json((tmp_path / "config.json").read_text())
    assert stored.to_dict() == run.config.to_dict() == load_config(tmp_path / "config.py").to_dict()
    inputs = Inputs.load(tmp_path)
    assert inputs.mean_rgb == pytest.approx((126.68550873, 115.34725189, 124.76429749))
    assert (inputs.image_size, len(inputs.classes)) == ((64, 64), 10)

    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.jit(create_model(run.config.model).init)(jax.random.key(0), images)
    like = create_state(variables, create_optimizer(run.config.train, optax.linear_schedule(1.0, 0.0, 9), 60.0))
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        state, progress = checkpoints.restore(like, 5)
    assert (progress.step, progress.epoch) == (5, 5)
    assert_same(jax.device_get(state.variables), run.checkpoint.variables)
    assert_same(jax.device_get(optax.tree.get(state.opt_state, "trace")), run.checkpoint.momentum)
    assert optax.tree.get(state.opt_state, "count") == 5


def test_another_optimiser_starts_without_the_files_momentum(checkpoint_path, tmp_path, assert_same):
    overrides = ["train.optimizer=adamw", "train.ema_decay=0.9"]
    run = import_checkpoint(checkpoint_path, tmp_path, overrides)
    variables = jax.tree.map(jnp.asarray, run.checkpoint.variables)
    like = create_state(
        variables, create_optimizer(run.config.train, optax.linear_schedule(1.0, 0.0, 9), 60.0), averaged=True
    )
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        state, _ = checkpoints.restore(like, 5)
    assert_same(jax.device_get(state.evaluated), run.checkpoint.variables)
    counts = optax.tree.get_all_with_path(state.opt_state, "count")
    assert [int(count) for _, count in counts] == [5, 5]  # Adam's and the schedule's
    assert not any(leaf.any() for leaf in jax.tree.leaves(optax.tree.get(state.opt_state, "mu")))


@pytest.mark.slow
def test_evaluation_gives_the_authors_errors(checkpoint_path, tmp_path):
    mean = tuple(np.asarray(load_checkpoint(checkpoint_path).mean_rgb).tolist())
    data = data_set(checkpoint_path, tmp_path, mean)
    overrides = [f"data.dir={data}", "eval.batch_size=12", "train.batch_size=5"]
    run = import_checkpoint(checkpoint_path, tmp_path / "run", overrides)
    assert (run.step, run.mean_rgb_difference) == (15, 0)  # an epoch is 12 images, at most 5 at once
    assert Inputs.load(tmp_path / "run").dataset != "unknown"
    result = evaluate_checkpoint(run.config, tmp_path / "run")
    with np.load(checkpoint_path.parent / "eval.npz") as values:
        assert result["top1_error"] == pytest.approx(100 * values["val_top1error_sum"] / 12)
        assert result["top5_error"] == pytest.approx(100 * values["val_top5error_sum"] / 12)
        assert result["loss"] == pytest.approx(values["val_loss_sum_f64"] / 12, rel=1e-5)


@pytest.mark.slow
def test_another_mean_colour_or_number_of_classes_is_reported(checkpoint_path, small_model, tmp_path, capsys):
    data = data_set(checkpoint_path, tmp_path, (126.0, 115.0, 120.0))
    assert run_import(checkpoint_path, "--output", tmp_path / "run", f"--config.data.dir={data}") == 0
    assert "differs by up to 4.76 of 255" in capsys.readouterr().out
    save(tmp_path / "x.mat", *small_model("gap"))
    with pytest.raises(CheckpointError, match=r"has 3 classes, but the data set .* has 10"):
        import_checkpoint(tmp_path / "x.mat", tmp_path / "other", [f"data.dir={data}"])


def test_a_folder_with_checkpoints_is_left_alone(checkpoint_path, tmp_path):
    import_checkpoint(checkpoint_path, tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="already contains checkpoints"):
        import_checkpoint(checkpoint_path, tmp_path, ["seed=1"])
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_wrong_override_is_refused_before_anything_is_written(checkpoint_path, tmp_path):
    with pytest.raises(ConfigError, match="batchsize"):
        import_checkpoint(checkpoint_path, tmp_path / "run", ["train.batchsize=1"])
    assert not (tmp_path / "run").exists()


def test_the_command_prints_what_it_imports(small_model, tmp_path, capsys, monkeypatch):
    save(
        tmp_path / "net-epoch-3.mat", *small_model("gmsop", stage_widths=(16, 32, 64, 128), stage_strides=(1, 2, 2, 1))
    )
    assert run_import(tmp_path / "net-epoch-3.mat", "--output", tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert "not one of the six released files" in printed
    params = json.loads((tmp_path / "a/config.json").read_text())["model"]
    assert params["candidate_widths"] == [5, 3]
    # candidates: 3 · (128 · 5 + 5 · 3); gate: 128 · 4 + 4 · 3, 2 · (4 + 3) in batch norm, 2 · 6 · 3; 6 · 3 + 3
    for part, count in (("candidates", "1,965"), ("gate", "574"), ("batch norm", "12"), ("classifier", "21")):
        assert [line.split()[-1] for line in printed.splitlines() if line.split()[:-1] == part.split()] == [count]

    digest = hashlib.md5((tmp_path / "net-epoch-3.mat").read_bytes()).hexdigest()
    monkeypatch.setitem(weights.RELEASED, digest, "GM-SOP-16-8 + ResNet-18")
    assert run_import(tmp_path / "net-epoch-3.mat", "--output", tmp_path / "b", "--config.seed=4") == 0
    assert f"the released GM-SOP-16-8 + ResNet-18 (md5 {digest})" in capsys.readouterr().out
    assert json.loads((tmp_path / "b/config.json").read_text())["seed"] == 4


def test_the_command_prints_the_published_count(checkpoint_path, tmp_path, capsys):
    assert run_import(checkpoint_path, "--output", tmp_path / "run") == 0
    lines = capsys.readouterr().out.splitlines()
    # 10 classes: 700,192 + 8256 · 10 + 10
    assert any("782,762" in line and "published: 9.0M for ResNet-18-SR-SOP" in line for line in lines)
    assert any("gmsop evaluate" in line for line in lines)


def test_the_commands_errors_are_one_line(tmp_path, capsys):
    assert run_import(tmp_path / "none.mat", "--output", tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path / 'none.mat'} does not exist or is not a file\n"
    assert not captured.out
    assert run_import(tmp_path / "none.mat", "--output", tmp_path / "run", "--unknown") == 2
    assert "unrecognized argument --unknown" in capsys.readouterr().err


def test_matlab_files_with_another_ending_are_recognised(tmp_path, capsys):
    (tmp_path / "net-epoch-60").write_bytes(b"MATLAB 5.0 MAT-file")
    assert run_import(tmp_path / "net-epoch-60", "--output", tmp_path / "run", "--triangle", "row") == 2
    assert "net-epoch-60 is a MatConvNet checkpoint" in capsys.readouterr().err


def test_the_md5_sums_are_the_published_six():
    released = weights.RELEASED
    assert len(released) == len(set(released.values())) == 6
    assert set(released.values()) <= {row.name for row in ROWS.values() if row.parameters}
