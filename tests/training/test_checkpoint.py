import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gmsop_jax.errors import CheckpointError
from gmsop_jax.training.checkpoint import Checkpoints, Progress
from gmsop_jax.training.layout import locate, read_file
from gmsop_jax.training.step import TrainState

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def state(value: float = 0.0, width: int = 3) -> TrainState:
    params = {"dense": {"kernel": jnp.full((2, width), value), "bias": jnp.full(width, value)}}
    moments = {"bn": {"mean": jnp.full(width, 2 * value)}}
    momentum = jax.tree.map(lambda leaf: leaf + 7, OPTIMIZER.init(params))
    return TrainState(jnp.int32(0), params, moments, momentum)


def progress(step: int) -> Progress:
    return Progress(step, step // 10, 1.5 * step)


def save_all(folder: Path, errors: dict[int, float | None], keep: int = 2) -> None:
    with Checkpoints(folder, keep=keep) as checkpoints:
        for step, error in errors.items():
            metrics = None if error is None else {"top1_error": error, "loss": 1.0}
            checkpoints.save(state(step), progress(step), metrics)
            checkpoints.wait()


def steps(folder: Path) -> set[int]:
    return {int(path.name) for path in folder.iterdir() if path.name.isdigit()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with steps 10 (the best), 30 and 35 (not evaluated); tests only read it."""
    workdir = tmp_path_factory.mktemp("saved")
    save_all(workdir / "checkpoints", {10: 20.0, 20: 40.0, 30: 30.0, 35: None})
    (workdir / "config.json").write_text('{"seed": 3}')
    return workdir


def test_the_last_n_and_the_best_are_kept(saved, tmp_path):
    assert steps(saved / "checkpoints") == {10, 30, 35}
    # of equally good ones the latest is the best
    save_all(tmp_path / "c", {1: 50.0, 2: 30.0, 3: 30.0, 4: 60.0, 5: None, 6: None})
    assert steps(tmp_path / "c") == {3, 5, 6}


def test_best_and_latest(saved):
    with Checkpoints(saved / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (10, 35)
        metrics = checkpoints.metrics(10)
        assert metrics is not None
        assert metrics["top1_error"] == 20
        assert checkpoints.metrics(35) is None


def test_nothing_saved_yet(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert (checkpoints.best_step, checkpoints.latest_step) == (None, None)


def test_restore(saved):
    with Checkpoints(saved / "checkpoints", read_only=True) as checkpoints:
        restored, where = checkpoints.restore(state(), 30)
    assert where == progress(30)
    assert int(restored.step) == 30
    expected = state(30)
    assert jax.tree.structure(restored) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(restored.variables), jax.tree.leaves(expected.variables), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(jax.tree.leaves(restored.opt_state)[0], np.full(3, 7.0))


def test_restore_variables_needs_no_optimiser(saved):
    with Checkpoints(saved / "checkpoints", read_only=True) as checkpoints:
        variables, where = checkpoints.restore_variables(state().variables, 10)
    np.testing.assert_array_equal(variables["params"]["dense"]["kernel"], np.full((2, 3), 10.0))
    assert where.step == 10


def test_saving_returns_before_it_is_on_disk_and_keeps_what_was_saved(tmp_path):
    # the caller may give the arrays' memory away at once, as the training step does
    with Checkpoints(tmp_path / "c") as checkpoints:
        arrays = state(5.0)
        checkpoints.save(arrays, progress(1))
        jax.tree.map(lambda leaf: leaf.delete(), arrays)
        checkpoints.wait()
        restored, _ = checkpoints.restore(state(), 1)
    np.testing.assert_array_equal(restored.params["dense"]["bias"], np.full(3, 5.0))


def test_a_step_that_is_there_is_kept(tmp_path):
    save_all(tmp_path / "c", {1: 50.0})
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(state(9.0), progress(1), {"top1_error": 1.0})
        checkpoints.wait()
        restored, _ = checkpoints.restore(state(), 1)
        assert (checkpoints.metrics(1) or {})["top1_error"] == 50
    np.testing.assert_array_equal(restored.params["dense"]["bias"], np.full(3, 1.0))


def test_another_model_is_refused_with_the_shapes(saved):
    other = state(width=4)
    del other.params["dense"]["bias"]
    other.params["extra"] = {"bias": jnp.zeros(5)}
    with Checkpoints(saved / "checkpoints", read_only=True) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore_variables(other.variables, 30)
    message = str(caught.value)
    assert f"checkpoint {saved / 'checkpoints' / '30'} does not fit the model" in message
    assert "params/dense/kernel: checkpoint (2, 3), model (2, 4)" in message
    assert "params/dense/bias: checkpoint (3,), model absent" in message
    assert "params/extra/bias: checkpoint absent, model (5,)" in message
    assert "batch_stats/bn/mean: checkpoint (3,), model (4,)" in message


def test_damaged_checkpoint_is_refused(saved, tmp_path):
    save_all(tmp_path / "c", {1: 50.0})
    data = max((tmp_path / "c" / "1" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 255
    data.write_bytes(content)
    with (
        Checkpoints(tmp_path / "c", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=f"checkpoint {tmp_path / 'c' / '1'} is damaged"),
    ):
        checkpoints.restore(state(), 1)


# ---- paths


def test_locate(saved, tmp_path):
    folder = saved / "checkpoints"
    assert locate(saved) == (folder, None)
    assert locate(folder) == (folder, None)
    assert locate(folder / "30") == (folder, 30)
    assert locate(saved / "30") == (folder, 30)
    (tmp_path / "2024").symlink_to(saved)
    assert locate(tmp_path / "2024") == (tmp_path / "2024" / "checkpoints", None)


def test_nothing_to_locate(saved, tmp_path):
    for path in (tmp_path, tmp_path / "none", saved / "config.json"):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {path}; give the working directory"):
            locate(path)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*20; there are steps 10, 30, 35"):
        locate(saved / "checkpoints" / "20")


def test_read_file(saved, tmp_path):
    for path in (saved, saved / "checkpoints", saved / "checkpoints" / "30"):
        assert json.loads(read_file(locate(path)[0].parent, "config.json")) == {"seed": 3}
    save_all(tmp_path / "checkpoints", {1: 50.0})
    with pytest.raises(CheckpointError, match=r"config\.json is missing, and no checkpoint contains a copy of it"):
        read_file(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json can't be read .*copy it back, or delete it to use"):
        read_file(tmp_path, "config.json")


# ---- averages


def averaged(value: float) -> TrainState:
    plain = state(value)
    return plain.replace(ema=jax.tree.map(lambda leaf: leaf + 100, plain.variables))


def test_averages_are_restored_and_are_what_is_evaluated(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(averaged(3.0), progress(1))
        checkpoints.wait()
        restored, _ = checkpoints.restore(averaged(0.0), 1)
        jax.tree.map(np.testing.assert_array_equal, restored, averaged(3.0).replace(step=jnp.int32(1)))
        variables, where = checkpoints.restore_variables(state().variables, 1)
        jax.tree.map(np.testing.assert_array_equal, variables, averaged(3.0).ema)
        assert where.step == 1
        with pytest.raises(CheckpointError, match=r"ema/params/dense/kernel: checkpoint \(2, 3\), model \(2, 4\)"):
            checkpoints.restore_variables(state(width=4).variables, 1)


def test_averages_that_are_not_there(saved):
    with (
        Checkpoints(saved / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="has no ema"),
    ):
        checkpoints.restore(averaged(0.0), 30)


# ---- removal


def test_old_checkpoints_are_renamed_before_they_are_deleted(tmp_path, monkeypatch):
    """So a kill in between leaves no half of a checkpoint; what it leaves is deleted at the next start."""
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, *_, **__: removed.append(path))
    save_all(tmp_path / "c", dict.fromkeys(range(1, 6)))
    assert steps(tmp_path / "c") == {4, 5}
    assert removed == [tmp_path / "c" / "discarded"]
    assert steps(tmp_path / "c" / "discarded") == {1, 2, 3}
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "c" / "discarded" / "2" / "params")
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step == 5
        assert not checkpoints.set_aside
        assert not (tmp_path / "c" / "discarded").exists()


def test_a_save_in_flight_does_not_bring_back_a_removed_workdir(tmp_path):
    def save_and_remove():
        with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
            checkpoints.save(state(1.0), progress(1))
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            checkpoints.wait()

    with pytest.raises(CheckpointError, match=r"can't write a checkpoint to .*run"):
        save_and_remove()
    assert not (tmp_path / "run").exists()


def test_a_save_in_flight_leaves_the_files_of_a_new_run_alone(tmp_path):
    unfinished = tmp_path / "run" / "checkpoints" / "5.orbax-checkpoint-tmp"

    def replace_the_workdir():
        with Checkpoints(tmp_path / "run" / "checkpoints"):
            (tmp_path / "run").rename(tmp_path / "elsewhere")
            unfinished.mkdir(parents=True)
            (tmp_path / "run" / "config.json").write_text("{}")

    with pytest.raises(CheckpointError, match="was removed"):
        replace_the_workdir()
    assert unfinished.exists()


def test_unverifiable_checkpoint_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved / "checkpoints", tmp_path / "c")
    (folder / "30" / "checksums.json").unlink()
    with (
        Checkpoints(folder, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=r"30 is damaged \(checksums.json is missing"),
    ):
        checkpoints.restore(state(), 30)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "metrics/metrics", "params/_METADATA"])
def test_a_pipe_in_a_checkpoint_is_refused_and_not_waited_for(saved, tmp_path, name):
    folder = shutil.copytree(saved / "checkpoints", tmp_path / "c")
    (folder / "30" / name).unlink()
    os.mkfifo(folder / "30" / name)
    with pytest.raises(CheckpointError, match=f"{name} is not a regular file"):
        Checkpoints(folder, read_only=True)


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_a_pipe_in_a_working_directory_is_refused_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} can't be read .*not a regular file"):
        read_file(tmp_path, name)


# ---- files of the working directory


def test_missing_files_are_read_from_the_last_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": 5}')
    save_all(tmp_path / "checkpoints", {1: None, 2: None})
    (tmp_path / "config.json").unlink()
    assert json.loads(read_file(tmp_path, "config.json")) == {"seed": 5}
    copy = tmp_path / "checkpoints" / "2" / "files" / "metadata"
    copy.write_text(copy.read_text().replace("5", "6"))  # damaged: the one before is read
    assert json.loads(read_file(tmp_path, "config.json")) == {"seed": 5}
