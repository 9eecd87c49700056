"""The training options together, through whole runs on tiny networks."""

import functools
import json
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from gmsop_jax import load
from gmsop_jax.config import ConfigDict, default_config, override, validate
from gmsop_jax.config import load as load_config
from gmsop_jax.errors import ConfigError
from gmsop_jax.inference.evaluate import evaluate_checkpoint
from gmsop_jax.models import create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.history import read_metrics
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.interrupt import Interrupted
from gmsop_jax.training.loop import train_and_evaluate
from gmsop_jax.training.setup import prepare
from gmsop_jax.training.step import make_train_step

OPTIONS = (
    "model.head=srsop",
    "model.projection_widths=(4,)",
    "train.num_epochs=2",
    "train.optimizer=adamw",
    "train.learning_rates=((0.02, 2),)",
    "train.schedule=cosine",
    "train.warmup_epochs=0.5",
    "train.rate_factors=(('backbone/stem', 0), ('head', 2.0))",
    "train.label_smoothing=0.1",
    "train.mixup_alpha=0.4",
    "train.ema_decay=0.9",
    "train.sub_batches=2",
    "eval.flip_average=True",
)


def with_options(config: ConfigDict, *more: str) -> ConfigDict:
    for item in (*OPTIONS, *more):
        override(config, item)
    validate(config)
    return config


def saved(workdir: Path, step: int, name: str) -> dict[str, np.ndarray]:
    tree = ocp.StandardCheckpointer().restore(workdir / "checkpoints" / str(step) / name)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with all options; tests only read it."""
    workdir = tmp_path_factory.mktemp("options") / "run"
    train_and_evaluate(with_options(load_config(config_file)), workdir)
    return workdir


def test_rates_are_those_of_the_schedule(finished):
    # 8 steps, logged at 3, 4, 6 and 8: half a cosine; the warm-up of two steps is over
    logged = [r["learning_rate"] for r in read_metrics(finished) if r["kind"] == "train"]
    expected = [0.01 * (1 + np.cos(np.pi * step / 8)) for step in (2, 3, 5, 7)]
    assert logged == pytest.approx(expected, rel=1e-5)


def test_a_frozen_part_is_as_it_was(finished, tiny, tmp_path):
    params = saved(finished, 8, "params")
    fresh = prepare(with_options(tiny), tmp_path).initial_state().params
    for path, leaf in jax.tree_util.tree_leaves_with_path(fresh):
        name = jax.tree_util.keystr(path)
        same = np.array_equal(params[name], leaf)
        assert same == name.startswith("['backbone']['stem']["), name


def test_the_first_weights_are_those_of_the_seed(tiny, tmp_path):
    run = prepare(with_options(tiny), tmp_path)
    model, images = create_model(run.config.model), jax.numpy.zeros((1, *run.inputs.image_size, 3))
    expected = jax.jit(lambda: model.init(jax.random.key(run.config.seed), images))()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, run.initial_state().params, expected["params"])


def test_the_step_is_the_configured_one(tiny, tmp_path):
    run = prepare(with_options(tiny), tmp_path)
    state, batch = run.initial_state(), next(run.batches(0))
    train = default_config().train
    train.update(label_smoothing=0.1, mixup_alpha=0.4, sub_batches=2)
    options = {"seed": 0, "mean_rgb": run.inputs.mean_rgb, "balance_ddof": 1}
    model = create_model(run.config.model)
    by_hand = jax.jit(make_train_step(model, optax.sgd(0.1), train, **options))
    _, expected = by_hand(state.replace(opt_state=optax.sgd(0.1).init(state.params)), batch)
    _, logged = run.train_step(state, batch)
    for name in ("loss_sum", "top1_errors", "grad_norm"):
        np.testing.assert_allclose(logged[name], expected[name], rtol=1e-5, err_msg=name)


def test_averages_are_evaluated_and_loaded(finished, tiny):
    averages, params = saved(finished, 8, "ema"), saved(finished, 8, "params")
    _, variables, _ = load(finished / "checkpoints" / "8")
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        np.testing.assert_array_equal(leaf, averages[jax.tree_util.keystr(path)])
    kernel = "['head']['classifier']['kernel']"
    assert np.abs(averages[f"['params']{kernel}"] - params[kernel]).max() > 1e-4
    # evaluated again, it is what the run itself logged
    config = with_options(tiny)
    logged = [r for r in read_metrics(finished) if r["kind"] == "eval"][-1]
    again = evaluate_checkpoint(config, finished / "checkpoints" / "8")
    assert again["loss"] == pytest.approx(logged["loss"], rel=1e-5)
    config.eval.flip_average = False
    assert evaluate_checkpoint(config, finished / "checkpoints" / "8")["loss"] != pytest.approx(
        logged["loss"], rel=1e-5
    )


def test_an_interrupted_run_ends_in_the_same_bits(finished, tiny, tmp_path, monkeypatch):
    place, seen = parallel.place_batch, [0]

    def place_and_raise(batch, mesh):
        if "mask" not in batch:
            seen[0] += 1
            if seen[0] == 3:
                signal.raise_signal(signal.SIGINT)
        return place(batch, mesh)

    monkeypatch.setattr(parallel, "place_batch", place_and_raise)
    config = with_options(tiny)
    with pytest.raises(Interrupted, match="at step 3"):
        train_and_evaluate(config, tmp_path / "run")
    train_and_evaluate(config, tmp_path / "run")
    for item in ("params", "batch_stats", "opt_state", "ema"):
        expected = saved(finished, 8, item)
        got = saved(tmp_path / "run", 8, item)
        assert expected.keys() == got.keys()
        for name, leaf in got.items():
            np.testing.assert_array_equal(leaf, expected[name], err_msg=f"{item}{name}")


def test_a_last_batch_of_one_image_is_refused(tiny):
    """Batch norm would put the spread of a single image, 0, into its running moments."""
    train, mesh = tiny.copy_and_resolve_references().train, parallel.create_mesh(jax.devices()[:1])
    train.update(batch_size=8, drop_last=False)
    with pytest.raises(ConfigError, match="leaves a last batch of 1 of 17 images, which makes batch norm compute"):
        parallel.check_train_batches(train, "global", 17, mesh)
    parallel.check_train_batches(train, "global", 18, mesh)
    train.drop_last = True
    parallel.check_train_batches(train, "global", 17, mesh)


def test_an_unknown_part_is_refused_before_anything_is_written(tiny, tmp_path):
    with_options(tiny, "train.rate_factors=(('backbone/stage3', 0),)")
    with pytest.raises(ConfigError, match=r"names 'backbone/stage3', which .*; did you mean backbone/st"):
        train_and_evaluate(tiny, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- starting from another run


@pytest.fixture(scope="module")
def more_classes(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set with an eleventh class that no image is of, and another mean colour."""
    folder = shutil.copytree(dataset, tmp_path_factory.mktemp("classes") / "data")
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["classes"].append("none")
    manifest["mean_rgb"] = [1.0, 2.0, 3.0]
    for split in manifest["splits"].values():
        split["class_counts"].append(0)
    (folder / "dataset.json").write_text(json.dumps(manifest))
    return folder


def start_from(config: ConfigDict, source: Path, *more: str) -> ConfigDict:
    for item in (*OPTIONS[:2], "train.num_epochs=1", "train.learning_rates=((0.001, 1),)", *more):
        override(config, item)
    config.train.init_from = str(source)
    validate(config)
    return config


def test_with_other_classes_all_but_the_classifier_is_taken(finished, tiny, more_classes, tmp_path, capsys):
    config = start_from(tiny, finished / "checkpoints" / "8", "train.rate_factors=(('backbone', 0), ('head', 0))")
    config.data.dir = str(more_classes)
    train_and_evaluate(config, tmp_path / "run")
    source, got = saved(finished, 8, "ema"), saved(tmp_path / "run", 4, "params")
    taken = [name for name in got if "classifier" not in name]
    assert len(taken) == len(got) - 2
    for name in taken:
        np.testing.assert_array_equal(got[name], source[f"['params']{name}"], err_msg=name)
    assert got["['head']['classifier']['kernel']"].shape[-1] == 11
    count = len(source)
    line = f"{count - 2} of {count} arrays are copied from {finished}/checkpoints/8 (step 8); new: head/classifier"
    assert capsys.readouterr().err.count(line) == 1

    # what it knows is pixels less the first run's mean colour
    assert Inputs.load(tmp_path / "run").mean_rgb == Inputs.load(finished).mean_rgb != (1.0, 2.0, 3.0)
    assert len(Inputs.load(tmp_path / "run").classes) == 11
    logged = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "eval"][-1]
    again = evaluate_checkpoint(config, tmp_path / "run")
    assert again["loss"] == pytest.approx(logged["loss"], rel=1e-5)

    # once there is a checkpoint the other run may go
    config.train.num_epochs = 2
    (tmp_path / "run" / "inputs.json").rename(tmp_path / "inputs.json")
    train_and_evaluate(config, tmp_path / "run")
    assert Inputs.load(tmp_path / "run") == Inputs.load(tmp_path)
    assert "arrays are copied from" not in capsys.readouterr().err


def test_a_resumed_run_without_inputs_reads_only_the_description_of_its_source(finished, tiny, more_classes, tmp_path):
    source = shutil.copytree(finished, tmp_path / "source")
    for item in ("params", "batch_stats", "opt_state", "ema"):
        shutil.rmtree(source / "checkpoints" / "8" / item)
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)  # by an older version, which stored no copies
    config = start_from(tiny, source)
    config.data.dir = str(more_classes)
    assert prepare(config, tmp_path / "run").inputs.mean_rgb == Inputs.load(finished).mean_rgb != (1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "model.stem_width=5",
            r"params/backbone/stage1_block1/conv1/kernel is \(3, 3, 4, 4\) there and \(3, 3, 5, 4\)",
        ),
        (
            "model.blocks_per_stage=2",
            "params/backbone/stage1_block2/conv1/kernel is absent there and .* here; set the fields",
        ),
        (
            "model.pixel_scale=1.0",
            r"pixel_scale = 1\.0, but .* trained with 60\.0; set --config.model.pixel_scale=60.0",
        ),
        ("train.init_from=nowhere", "config.train.init_from = 'nowhere': there is no checkpoint at nowhere; give the"),
    ],
)
def test_networks_that_a_run_cannot_start_from(finished, tiny, tmp_path, assignment, message):
    config = start_from(tiny, finished)
    override(config, assignment)
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
