"""Faults that occur during a run, one at a time."""

import collections
import contextlib
import errno
import functools
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.config import to_json
from gmsop_jax.conversion.convert import convert
from gmsop_jax.data import manifest
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import CheckpointError, DataError
from gmsop_jax.files import write_checksums
from gmsop_jax.inference import evaluate
from gmsop_jax.main import main
from gmsop_jax.training import parallel, setup
from gmsop_jax.training.checkpoint import Checkpoints
from gmsop_jax.training.evaluation import COMPILING
from gmsop_jax.training.history import read_metrics
from gmsop_jax.training.layout import locate
from gmsop_jax.training.loop import train_and_evaluate
from gmsop_jax.training.metrics import NonFiniteError
from gmsop_jax.training.restore import load
from gmsop_jax.training.workdir import Workdir


@pytest.fixture(autouse=True, scope="module")
def keep_programs(compile_once: None) -> None:
    """Applies `compile_once` to all tests of this file."""


@pytest.fixture(scope="module")
def finished(fault_config: Path, tmp_path_factory, compile_once) -> Path:
    from gmsop_jax.config import load as load_config

    workdir = tmp_path_factory.mktemp("finished") / "run"
    train_and_evaluate(load_config(fault_config), workdir)
    return workdir


def classifier(workdir: Path) -> np.ndarray:
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    _, variables, _ = load(workdir / "checkpoints" / str(max(steps)))
    return np.asarray(variables["params"]["head"]["classifier"]["kernel"])


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


# ---- checkpoints


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "metrics", "checksums", "no_checksums"])
def test_damaged_last_checkpoint(finished, config, tmp_path, capsys, damage):
    """The run goes back to the one before, says so, and ends in the same bits."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    last = workdir / "checkpoints" / "9"
    arrays = max((path for path in last.glob("params/**/*") if path.is_file()), key=lambda path: path.stat().st_size)
    if damage == "flip":
        data = bytearray(arrays.read_bytes())
        data[len(data) // 2] ^= 1
        arrays.write_bytes(data)
    elif damage == "truncate":
        os.truncate(arrays, arrays.stat().st_size // 2)
    elif damage == "delete":
        arrays.unlink()
    elif damage == "metrics":
        (last / "metrics" / "metrics").write_text("{")
    elif damage == "checksums":
        (last / "checksums.json").write_text("[]")
    else:
        (last / "checksums.json").unlink()
    train_and_evaluate(config, workdir)
    logged = capsys.readouterr().err
    assert f"checkpoint {last} is damaged" in logged
    assert "resuming from step 6" in logged
    np.testing.assert_array_equal(classifier(workdir), classifier(finished))
    assert steps_in(workdir / "checkpoints") == steps_in(finished / "checkpoints")
    assert (workdir / "damaged-checkpoints" / "9").is_dir()


def test_all_checkpoints_damaged(finished, config, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = steps_in(workdir / "checkpoints")
    for step in before:
        (workdir / "checkpoints" / str(step) / "progress" / "metadata").write_text("")
    with pytest.raises(CheckpointError, match="there is no intact checkpoint to resume from"):
        train_and_evaluate(config, workdir)
    assert steps_in(workdir / "checkpoints") == before  # nothing is thrown away


def test_damaged_checkpoint_is_not_evaluated(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "checkpoints" / "9" / "progress" / "metadata").unlink()
    with pytest.raises(CheckpointError, match=r"9 is damaged .progress/metadata is missing"):
        load(workdir / "checkpoints" / "9")


def test_half_written_checkpoint_is_cleaned_up(finished, config, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    half = workdir / "checkpoints" / "12.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "9" / "params", half / "params")
    train_and_evaluate(config, workdir)
    assert not half.exists()


def test_a_run_of_an_older_version_is_resumed_and_evaluated(config, tmp_path, capsys):
    """One epoch by the version that stored no copy of the configuration, and named no data or order of images."""
    with tarfile.open(Path(__file__).parent / "old_run.tar.xz") as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # lacking before Python 3.11.4
        archive.extractall(tmp_path)
    workdir, data = tmp_path / "run", config.data.dir
    assert main(["--mode", "evaluate", "--checkpoint", str(workdir), f"--config.data.dir={data}"]) == 0
    (stored,) = (record for record in read_metrics(workdir) if record["kind"] == "eval")
    assert (
        f"top-1 error {stored['top1_error']:.2f} %, top-5 error {stored['top5_error']:.2f} %" in capsys.readouterr().out
    )
    evaluated = json.loads((workdir / "evaluation-val.json").read_text())
    assert evaluated["loss"] == pytest.approx(stored["loss"], rel=1e-5)

    run = setup.prepare(config, workdir)
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, progress = checkpoints.restore(run.abstract_state, 3)
    assert (int(state.step), progress.step, progress.epoch, progress.skipped) == (3, 3, 1, ())
    floats = [x for x in jax.tree.leaves(state.opt_state) if jnp.issubdtype(x.dtype, jnp.floating)]
    momentum = sum(float(jnp.sum(jnp.square(x))) for x in floats) ** 0.5
    assert momentum == pytest.approx(214.8180, rel=1e-5)  # as the older version read it

    config.train.num_epochs = 2
    assert train_and_evaluate(config, workdir)["step"] == 6
    errors = capsys.readouterr().err
    assert "resuming from step 3" in errors
    assert np.isfinite(training_losses := [r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"]).all()
    assert len(training_losses) == 6


@pytest.mark.parametrize("name", ["²", "٣", "006", "9x"])
def test_folders_that_are_not_steps_are_left_alone(finished, tmp_path, name):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "checkpoints" / name).mkdir()
    assert load(workdir)[2].step == load(finished)[2].step
    assert locate(workdir) == (workdir / "checkpoints", None)


def test_a_checkpoint_with_damaged_metrics_does_not_change_the_best_step(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        best = checkpoints.best_step
    (workdir / "checkpoints" / str(best) / "metrics" / "metrics").write_text("{}")
    message = rf"{best} is damaged .metrics/metrics was changed.; give another step"
    with (
        Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match=message),
    ):
        checkpoints.best_step  # noqa: B018


def test_damaged_lines_of_metrics_jsonl_are_left_out(finished, config, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = read_metrics(workdir)
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n3\n{}\n[1]\n"kind step"\n' + b"[" * 5000 + b"\n")
        for step in ('"3"', "null", "true", "1.5", '3, "loss": "x"', '3, "loss": [1]', '3, "candidate_use": 1'):
            file.write(f'{{"kind": "train", "epoch": 1, "step": {step}}}\n'.encode())
        file.write(b'{"kind": "train", "step": 3}\n{"kind": 1, "step": 3, "epoch": 1}\n{"kind": "tra')
    assert read_metrics(workdir) == before
    assert train_and_evaluate(config, workdir)["step"] == 9


# ---- evaluation


def test_files_of_the_data_set_are_checked_once_a_start(config, tmp_path, monkeypatch, capsys):
    """Not again at each of the three evaluations, before the first of which the wait is explained."""
    opened, read = collections.Counter(), collections.Counter()

    def count(counter, function, *arguments):
        counter[str(getattr(arguments[-1], "file", arguments[-1])).rpartition("/")[2]] += 1
        return function(*arguments)

    for name, counter in (("shard_size", opened), ("sha256", read)):
        monkeypatch.setattr(manifest, name, functools.partial(count, counter, getattr(manifest, name)))
    train_and_evaluate(config, tmp_path / "run")
    shards = {
        shard.file for split in Manifest.load(config.data.dir, splits=()).splits.values() for shard in split.shards
    }
    assert opened == dict.fromkeys(shards, 2)  # its size is compared first, its checksum later
    assert read == dict.fromkeys(shards, 1)
    assert capsys.readouterr().err.count(COMPILING) == 1

    opened.clear()
    read.clear()
    evaluate.run(config, tmp_path / "run")
    assert read == dict.fromkeys((file for file in shards if file.startswith("val")), 1)
    assert capsys.readouterr().err.count(COMPILING) == 1


def test_a_result_is_printed_before_it_is_written(finished, config, tmp_path, monkeypatch, capsys):
    def refuse(file, value):
        printed.append(capsys.readouterr().out)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))

    printed: list[str] = []
    monkeypatch.setattr(evaluate, "write_json", refuse)  # a read-only directory would not stop root
    evaluate.run(config, finished)
    assert "top-1 error" in printed[0]
    assert "warning: the result can't be written to " in capsys.readouterr().err


# ---- the working directory


def test_second_run_in_a_workdir_is_refused(config, tmp_path):
    with (
        Workdir(tmp_path / "run", config),
        pytest.raises(CheckpointError, match=rf"another run uses .* .process {os.getpid()} on"),
    ):
        train_and_evaluate(config, tmp_path / "run")
    with Workdir(tmp_path / "run", config):
        pass  # the lock is gone


def test_lock_ends_with_its_process(start: Callable[..., subprocess.Popen[str]], config, tmp_path):
    process = start("--workdir", tmp_path / "run", "--config.train.num_epochs=500")
    assert process.stderr is not None
    next(line for line in process.stderr if "epoch   1/" in line)
    config.train.num_epochs, config.model.num_classes = 500, 10
    with pytest.raises(CheckpointError, match=f"process {process.pid} on"), Workdir(tmp_path / "run", config):
        pass
    process.kill()
    process.communicate()
    with Workdir(tmp_path / "run", config):
        pass


def test_vanished_workdir(config, tmp_path, monkeypatch):
    create_evaluation = setup.create_evaluation

    def create_vanishing(*arguments):
        evaluate = create_evaluation(*arguments)

        def vanish(variables):
            shutil.rmtree(tmp_path / "run")
            return evaluate(variables)

        return vanish

    monkeypatch.setattr(setup, "create_evaluation", create_vanishing)
    with pytest.raises(CheckpointError, match=r"the folder was removed or replaced.*no step has been saved"):
        train_and_evaluate(config, tmp_path / "run")


@pytest.mark.parametrize("make", ["file", "missing_parent"])
def test_unwritable_workdir(config, tmp_path, make):
    (tmp_path / "file").write_text("")
    workdir = tmp_path / "file" / ("run" if make == "missing_parent" else "")
    with pytest.raises(CheckpointError, match=r"can't write to the working directory .* give another --workdir"):
        train_and_evaluate(config, workdir)


FULL_DISK = """
import os, resource, signal
import gmsop_jax.training.loop as train
save = train.Checkpoints.save
def save_then_fill(self, state, progress, *more):
    if progress.step == {step}:
        self.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails from here on, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    return save(self, state, progress, *more)
train.Checkpoints.save = save_then_fill
"""


@pytest.mark.parametrize("limit", [0, 300])
def test_full_disk(start: Callable[..., subprocess.Popen[str]], finished, tmp_path, limit):
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    process = start("--workdir", tmp_path / "run", prologue=FULL_DISK.format(step=6, limit=limit))
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 2, output + errors
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    assert "Event loop" not in errors
    assert re.search("error: can't write .*latest saved step is 3. Free", errors), errors
    assert 3 in steps_in(tmp_path / "run" / "checkpoints")
    process = start("--workdir", tmp_path / "run")  # there is room again
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert "resuming from step 3" in errors
    np.testing.assert_array_equal(classifier(tmp_path / "run"), classifier(finished))


def test_missing_configuration_is_restored_from_the_checkpoint(finished, config, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = {name: (workdir / name).read_text() for name in ("config.json", "inputs.json")}
    for name in before:
        (workdir / name).unlink()
    config.seed = 5
    with pytest.raises(CheckpointError, match=r"created with another configuration.*\n.*config\.seed: 0 → 5"):
        train_and_evaluate(config, workdir)
    config.seed = 0
    train_and_evaluate(config, workdir)
    assert {name: (workdir / name).read_text() for name in before} == before


def test_a_configuration_that_is_no_text_is_one_error(config, tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"seed": "\xff"}')
    with pytest.raises(CheckpointError, match=r"config\.json has a damaged configuration .*; copy it back, or give"):
        Workdir(tmp_path, config).__enter__()


def test_a_damaged_configuration_can_be_deleted_if_a_checkpoint_has_a_copy(config, tmp_path):
    folder = tmp_path / "checkpoints" / "1"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "metadata").write_text(json.dumps({"config.json": to_json(config)}))
    write_checksums(folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json has a damaged configuration .*; if you delete"):
        Workdir(tmp_path, config).__enter__()


def test_an_unreadable_copy_of_the_configuration_has_its_own_remedy(config, tmp_path):
    (tmp_path / "config.json").write_text(to_json(config))
    folder = tmp_path / "checkpoints" / "1"
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "metadata").write_text(json.dumps({"config.json": '{"unknown": 1}'}))
    write_checksums(folder)
    with pytest.raises(CheckpointError, match=r"last checkpoint has a damaged .*config\.unknown.*; give another"):
        Workdir(tmp_path, config).__enter__()


def test_edited_configuration_is_compared_with_the_checkpoint(finished, config, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    file = workdir / "config.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 5'))
    config.seed = 5
    with pytest.raises(CheckpointError, match="which is stored in the last checkpoint"):
        train_and_evaluate(config, workdir)


def test_other_data_under_the_same_name_is_refused(finished, fault_data, config, tmp_path):
    """Fewer images, or another order; the same data may move."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    config.train.num_epochs = 4
    for name, limit, seed in (("fewer", 32, 0), ("order", 48, 1)):
        convert("fashion-mnist", None, tmp_path / name, shards=2, progress=False, limit=limit, seed=seed)
        config.data.dir = str(tmp_path / name)
        with pytest.raises(CheckpointError, match=r"trained on data other than.*\n.*split train: 48 images.* → "):
            train_and_evaluate(config, workdir)
    config.data.dir = str(shutil.copytree(fault_data, tmp_path / "moved"))
    assert train_and_evaluate(config, workdir)["step"] == 12


# ---- the loss


@pytest.fixture
def poisoned(monkeypatch) -> Callable[[set[int]], None]:
    """Makes the network's numbers infinite in the update of some steps."""

    def poison(steps: set[int]) -> None:
        compile_step = parallel.compile_train_step

        def compile_poisoned(*arguments, **options):
            step, place = compile_step(*arguments, **options)

            def run(state, batch):
                if int(state.step) + 1 in steps:
                    state = state.replace(params=jax.tree.map(lambda x: x * np.inf, state.params))
                return step(state, batch)

            return run, place

        monkeypatch.setattr(parallel, "compile_train_step", compile_poisoned)

    return poison


def test_stops_at_a_loss_that_is_not_finite(config, tmp_path, poisoned):
    poisoned({5})
    with pytest.raises(NonFiniteError, match=r"not finite at step 5 \(the last good checkpoint is step 3\)") as caught:
        train_and_evaluate(config, tmp_path / "run")
    assert caught.value.step == 5
    assert steps_in(tmp_path / "run" / "checkpoints") == [3]


@pytest.mark.parametrize("steps", [{2}, {5, 6}])
def test_rolls_back(config, tmp_path, poisoned, capsys, steps):
    config.train.on_nonfinite = "rollback"
    poisoned(steps)
    result = train_and_evaluate(config, tmp_path / "run")
    assert result["step"] == 9
    logged = capsys.readouterr().err
    assert f"whose loss was not finite: {', '.join(map(str, sorted(steps)))}" in logged
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best_step in {3, 6, 9}
    progress = json.loads((tmp_path / "run" / "checkpoints" / "9" / "progress" / "metadata").read_text())
    assert progress["skipped"] == sorted(steps)
    records = [r["step"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert records == [step for step in range(1, 10) if step not in steps]
    assert np.isfinite(classifier(tmp_path / "run")).all()


def test_rates_after_a_rollback_are_those_of_an_undisturbed_run(config, tmp_path, poisoned, monkeypatch):
    """The rates that are applied as well as those that are logged."""
    config.train.on_nonfinite = "rollback"
    config.train.optimizer, config.train.momentum = "adamw", 0.9
    config.train.schedule, config.train.learning_rates = "cosine", ((0.001, 3),)
    create_schedule, applied = setup.create_schedule, []

    def create_recorded(*arguments):
        schedule = create_schedule(*arguments)

        def recorded(step):
            rate = schedule(step)
            if isinstance(step, jax.Array):  # inside the training step
                jax.debug.callback(lambda value: applied.append(float(value)), rate)
            return rate

        return recorded

    monkeypatch.setattr(setup, "create_schedule", create_recorded)
    poisoned({5, 6})
    train_and_evaluate(config, tmp_path / "run")
    jax.effects_barrier()
    undisturbed = [0.001 * (1 + np.cos(np.pi * step / 9)) / 2 for step in range(9)]
    logged = {r["step"]: r["learning_rate"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"}
    assert logged == {step: pytest.approx(undisturbed[step - 1], rel=1e-5) for step in (1, 2, 3, 4, 7, 8, 9)}
    assert sorted(set(applied), reverse=True) == pytest.approx(undisturbed, rel=1e-5)


def test_rolling_back_gives_up(config, tmp_path, poisoned):
    config.train.on_nonfinite = "rollback"
    config.train.num_epochs = 10
    poisoned(set(range(5, 31)))
    with pytest.raises(NonFiniteError, match="not finite at step 15"):
        train_and_evaluate(config, tmp_path / "run")


# ---- data


def damage_record(data_dir: Path, split: str) -> Path:
    """Flips a bit in the sixth record of a split's first shard."""
    shard = Manifest.load(data_dir).split(split).shards[0]
    record = ShardReader(data_dir, [shard]).read(np.array([5]))[0]
    data = bytearray((data_dir / shard.file).read_bytes())
    data[data.index(record) + 100] ^= 1
    (data_dir / shard.file).write_bytes(data)
    return data_dir / shard.file


def test_damaged_record(fault_data, config, tmp_path, caplog):
    config.data.dir = str(shutil.copytree(fault_data, tmp_path / "data"))
    config.data.verify = False
    shard = damage_record(tmp_path / "data", "train")
    with pytest.raises(DataError, match=rf"record 5 of shard {shard}.*on_corrupt=skip"):
        train_and_evaluate(config, tmp_path / "stop")
    config.data.on_corrupt = "skip"
    with caplog.at_level(logging.WARNING):
        first = train_and_evaluate(config, tmp_path / "first")
    assert f"skipping record 5 of shard {shard}" in caplog.text
    second = train_and_evaluate(config, tmp_path / "second")
    assert first["last_top1_error"] == second["last_top1_error"]
    np.testing.assert_array_equal(classifier(tmp_path / "first"), classifier(tmp_path / "second"))


def test_missing_shard(fault_data, config, tmp_path):
    config.data.dir = str(shutil.copytree(fault_data, tmp_path / "data"))
    shard = sorted((tmp_path / "data").glob("train-*"))[1]
    shard.unlink()
    with pytest.raises(DataError, match=f"shard {shard} is missing"):
        train_and_evaluate(config, tmp_path / "run")
    config.data.on_corrupt = "skip"
    assert train_and_evaluate(config, tmp_path / "run")["step"] == 9


def test_damaged_record_is_left_out_of_the_evaluation(fault_data, config, tmp_path):
    config.data.dir = str(shutil.copytree(fault_data, tmp_path / "data"))
    config.data.on_corrupt = "skip"
    damage_record(tmp_path / "data", "val")
    train_and_evaluate(config, tmp_path / "run")
    errors = [r["top1_error"] for r in read_metrics(tmp_path / "run") if r["kind"] == "eval"]
    for error in errors:
        assert error * 47 / 100 == pytest.approx(round(error * 47 / 100), abs=1e-6)  # of 47 images, not 48


def test_dead_reader_process(config, tmp_path, monkeypatch):
    config.data.num_workers = 1
    config.train.num_epochs = 200
    step = parallel.compile_train_step

    def compile_and_kill(*arguments, **options):
        (compiled, place), done = step(*arguments, **options), []

        def run(*arguments):
            done.append(1)
            if len(done) == 5:
                for child in children():
                    os.kill(child, signal.SIGKILL)
            return compiled(*arguments)

        return run, place

    monkeypatch.setattr(parallel, "compile_train_step", compile_and_kill)
    with pytest.raises(DataError, match=r"a data worker process died.*resume from the last checkpoint"):
        train_and_evaluate(config, tmp_path / "run")
    assert 3 in steps_in(tmp_path / "run" / "checkpoints")


def children() -> list[int]:
    """Processes started here to read data."""
    found: set[int] = set()
    for file in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found |= {int(child) for child in file.read_text().split()}
    return [child for child in found if b"resource_tracker" not in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_signals_outside_the_main_thread(config, tmp_path):
    """Python allows handlers in the main thread only; training elsewhere goes on without."""
    results = []
    thread = threading.Thread(target=lambda: results.append(train_and_evaluate(config, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0]["step"] == 9
