"""Two real processes over loopback, and the way from there to one process and back."""

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gmsop_jax.conversion.convert import convert
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ConfigError
from gmsop_jax.training.history import read_metrics
from gmsop_jax.training.processes import JOIN_SECONDS, start_processes
from gmsop_jax.training.restore import load


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# With seed 0, two gate logits are so close that rounding on two devices selects another candidate.
WITHOUT_NEAR_TIES = "--config.seed=1"


def two_processes(
    start,
    workdir: Path,
    *arguments: object,
    second: Sequence[object] = (),
    prologues: tuple[str, str] = ("", ""),
    devices: int = 2,
) -> list[subprocess.Popen[str]]:
    """Starts both processes; `second` is added to the second one's arguments."""
    common = ["--workdir", workdir, "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, *arguments]
    return [
        start(*common, "--process-id", i, *(second if i else ()), prologue=prologues[i], devices=devices)
        for i in range(2)
    ]


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    logged = [process.communicate(timeout=300) for process in processes]
    for (output, errors), process in zip(logged, processes, strict=True):
        assert process.returncode == 0, output + errors
    return logged


def training_losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start("--workdir", workdir, WITHOUT_NEAR_TIES))
    return workdir


def test_two_processes_train_as_one(start, alone, tmp_path):
    first, second = finish(*two_processes(start, tmp_path / "run", WITHOUT_NEAR_TIES))
    assert "top-1 error" in first[0]
    assert "epoch" not in second[1]  # only the first process logs
    assert json.loads((tmp_path / "run" / "result.json").read_text())["device"].startswith("4 ×")
    np.testing.assert_allclose(training_losses(tmp_path / "run"), training_losses(alone), rtol=1e-4)
    (_, ours, _), (_, theirs, _) = load(tmp_path / "run"), load(alone)
    np.testing.assert_allclose(
        ours["params"]["head"]["classifier"]["kernel"],
        theirs["params"]["head"]["classifier"]["kernel"],
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.slow
def test_two_processes_train_as_one_under_pmap(start, alone, tmp_path):
    finish(*two_processes(start, tmp_path / "run", "--config.parallel.mode=pmap", WITHOUT_NEAR_TIES))
    np.testing.assert_allclose(training_losses(tmp_path / "run"), training_losses(alone), rtol=1e-4)


def test_a_run_stopped_in_two_processes_resumes_in_one(start, alone, tmp_path):
    """A pre-emption notice to one process stops both after the same step."""
    workdir = tmp_path / "run"
    epochs = "--config.train.num_epochs=500"
    processes = two_processes(start, workdir, epochs, WITHOUT_NEAR_TIES)
    stderr = processes[0].stderr
    assert stderr is not None
    next(line for line in stderr if "epoch   2/" in line)
    processes[1].send_signal(signal.SIGTERM)
    logged = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], logged
    assert all("stopped by SIGTERM at step" in errors for errors in logged)
    stopped = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())

    process = start("--workdir", workdir, epochs, WITHOUT_NEAR_TIES)
    assert process.stderr is not None
    next(line for line in process.stderr if f"resuming from step {stopped} " in line)
    next(line for line in process.stderr if "epoch" in line)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 75
    np.testing.assert_allclose(training_losses(workdir)[:6], training_losses(alone)[:6], rtol=1e-4)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT])
def test_other_signals_stop_both_processes(start, tmp_path, signum):
    """They are passed on as SIGTERM, so that both stop after the same step."""
    processes = two_processes(start, tmp_path / "run", "--config.train.num_epochs=500")
    stderr = processes[0].stderr
    assert stderr is not None
    next(line for line in stderr if "epoch   1/" in line)
    processes[1].send_signal(signum)
    logged = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], logged
    steps = {errors.partition("stopped by SIGTERM at step ")[2].partition(",")[0] for errors in logged}
    (step,) = steps
    assert (tmp_path / "run" / "checkpoints" / step).is_dir()


def test_bad_coordinates(start, tmp_path):
    for arguments, words in (
        (["--num-processes", 2], "need --coordinator"),
        (["--coordinator", "somewhere"], "has no port"),
        (["--coordinator", "auto"], "can't be joined"),
    ):
        process = start("--workdir", tmp_path / "run", *arguments)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert words in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("count", "index", "message"),
    [
        (2, 7, "--process-id must be from 0 to 1 with --num-processes 2, got 7"),
        (2, -1, "--process-id must be from 0 to 1 with --num-processes 2, got -1"),
        (0, 0, "--num-processes must be at least 1, got 0"),
        (None, 1, "--coordinator host:port needs --num-processes and --process-id"),
        (2, None, "--coordinator host:port needs --num-processes and --process-id"),
    ],
)
def test_numbers_of_processes_that_contradict_each_other(count, index, message):
    with pytest.raises(ConfigError, match=message):
        start_processes("127.0.0.1:1", count, index)


# ---- processes that differ or fail: all of them end, and say why


def failures(processes: list[subprocess.Popen[str]], seconds: float = 60) -> list[str]:
    """What each process says; all must end with an error status, `seconds` (with their start) after this call."""
    deadline = time.monotonic() + seconds
    try:
        errors = [process.communicate(timeout=deadline - time.monotonic())[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode for process in processes), errors
    return errors


@pytest.mark.parametrize(
    ("field", "value", "differ"),
    [
        ("config.seed", "3", "config.seed is 0 in process 0 and 3 in process 1"),
        ("config.train.learning_rates", "((0.03,3),)", "config.train.learning_rates is ((0.02, 3),) in process 0 and"),
        ("config.checkpoint.every_steps", "2", "config.checkpoint.every_steps is 0 in process 0 and 2 in process 1"),
    ],
)
def test_other_configuration_in_a_process(start, tmp_path, field, value, differ):
    for errors in failures(two_processes(start, tmp_path / "run", second=[f"--{field}={value}"])):
        assert differ in errors
        assert "Traceback" not in errors


def test_other_version_in_a_process(start, tmp_path):
    prologue = "import gmsop_jax; gmsop_jax.__version__ = '9'"
    for errors in failures(two_processes(start, tmp_path / "run", prologues=("", prologue))):
        assert "the version of gmsop_jax is" in errors
        assert "'9' in process 1" in errors


def test_other_data_in_a_process(start, tmp_path):
    convert("fashion-mnist", None, tmp_path / "data", shards=2, limit=32, progress=False)
    processes = two_processes(start, tmp_path / "run", second=[f"--config.data.dir={tmp_path / 'data'}"])
    for errors in failures(processes):
        assert "the data set's split" in errors
        assert "in process 1" in errors
        assert "Traceback" not in errors


def test_another_mode_in_a_process(start, tmp_path):
    for errors in failures(two_processes(start, tmp_path / "run", second=["--mode", "evaluate"])):
        assert "--mode is 'train' in process 0 and 'evaluate' in process 1" in errors
        assert "Traceback" not in errors


def with_manifest(data: Path, directory: Path, **fields: object) -> Path:
    """Copies a data set and sets fields of its dataset.json."""
    file = shutil.copytree(data, directory) / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_other_names_of_classes_in_a_process(start, alone, fault_data, tmp_path, mode):
    names = ["shirt", *Manifest.load(fault_data).classes[1:]]
    data = with_manifest(fault_data, tmp_path / "data", classes=names)
    workdir = tmp_path / "run" if mode == "train" else alone
    second = [f"--config.data.dir={data}"]
    for errors in failures(two_processes(start, workdir, "--mode", mode, WITHOUT_NEAR_TIES, second=second)):
        assert "the data set's class 0 is 't-shirt/top' in process 0 and 'shirt' in process 1" in errors
        assert "Traceback" not in errors


def test_another_mean_colour_in_a_process(start, fault_data, tmp_path):
    data = with_manifest(fault_data, tmp_path / "data", mean_rgb=[1.0, 2.0, 3.0])
    for errors in failures(two_processes(start, tmp_path / "run", second=[f"--config.data.dir={data}"])):
        assert "the data set's mean_rgb is" in errors
        assert "(1.0, 2.0, 3.0) in process 1" in errors


def test_another_checkpoint_is_evaluated_in_a_process(start, alone, tmp_path):
    steps = sorted((alone / "checkpoints").iterdir())
    processes = two_processes(start, alone, "--mode", "evaluate", WITHOUT_NEAR_TIES, second=["--checkpoint", steps[0]])
    for errors in failures(processes):
        assert "the network is 'step 9, checksums.json of sha256" in errors
        assert f"and 'step {steps[0].name}, " in errors
        assert "Traceback" not in errors


def damage(shard: Path) -> None:
    """Flips a bit of a shard; its size stays."""
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize("mode", ["train", "evaluate"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_damaged_shard_in_either_share_ends_both_processes(start, alone, fault_data, tmp_path, mode, index):
    """Each process verifies every second shard, and says so if one of its share is damaged."""
    data = shutil.copytree(fault_data, tmp_path / "data")
    shards = sorted(data.glob("train-*" if mode == "train" else "val-*"))
    damage(shards[index])
    workdir = tmp_path / "run" if mode == "train" else shutil.copytree(alone, tmp_path / "run")
    errors = failures(two_processes(start, workdir, "--mode", mode, f"--config.data.dir={data}", WITHOUT_NEAR_TIES))
    assert f"error: shard {shards[index]} has sha256" in errors[index]
    assert f"error: process {index} of this run failed: shard {shards[index]} has sha256" in errors[1 - index]
    assert not any("Traceback" in text for text in errors)


def test_other_workdir_in_a_process(start, tmp_path):
    for errors in failures(two_processes(start, tmp_path / "run", second=["--workdir", tmp_path / "other"])):
        assert "lock of the working directory" in errors
        assert f"absent in {tmp_path / 'other'}" in errors


FAIL_IN_SET_UP = """
import gmsop_jax.training.loop as loop
from gmsop_jax.errors import UserError
def prepare(*_):
    raise {error}
loop.prepare = prepare
"""


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.slow
@pytest.mark.parametrize("error", ["UserError('wrong')", "ZeroDivisionError('wrong')"])
def test_failure_in_set_up(start, tmp_path, index, error):
    failing = FAIL_IN_SET_UP.format(error=error)
    processes = two_processes(start, tmp_path / "run", prologues=(failing, "") if index == 0 else ("", failing))
    errors = failures(processes)
    assert "wrong" in errors[index]
    assert f"error: process {index} of this run failed: " in errors[1 - index]


@pytest.mark.parametrize("index", [0, 1])
def test_killed_process(start, tmp_path, index):
    processes = two_processes(start, tmp_path / "run", "--config.train.num_epochs=500")
    assert processes[0].stderr is not None
    next(line for line in processes[0].stderr if "epoch   2/" in line)
    processes[index].kill()
    processes[index].communicate()
    began = time.monotonic()
    assert failures([processes[1 - index]])[0]
    assert time.monotonic() - began < 60


def test_an_error_in_the_configuration_of_a_process_ends_the_other(start, tmp_path):
    first, second = failures(two_processes(start, tmp_path / "run", second=["--config.sed=1"]))
    assert second == "error: there is no field config.sed; did you mean seed?\n"
    assert first == "error: process 1 of this run failed: there is no field config.sed; did you mean seed?\n"


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_is_never_joined_ends(start, tmp_path, index):
    """As if a wrong flag had ended the other one at once."""
    assert JOIN_SECONDS <= 50  # ends within a minute; the test waits for less
    shorter = "from gmsop_jax.training import processes\nprocesses.JOIN_SECONDS = 10"
    processes = two_processes(start, tmp_path / "run", prologues=(shorter, shorter))
    processes[1 - index].kill()
    processes[1 - index].communicate()
    (errors,) = failures([processes[index]])
    assert errors.startswith("error: the processes of this run can't be joined (some of them did not start within ")
    assert errors.count("\n") == 1


def test_taken_port(start, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = start("--workdir", tmp_path, "--coordinator", address, "--num-processes", 2, "--process-id", 0)
        (errors,) = failures([process])
    assert f"--coordinator {address}: port" in errors
    assert "can't be used" in errors
