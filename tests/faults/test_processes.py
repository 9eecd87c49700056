"""Two real processes over loopback, and the way from there to one process and back."""

import json
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from gmsop_jax.training.restore import load
from gmsop_jax.training.writer import read_metrics


def two_processes(start, workdir: Path, *arguments: object, devices: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ["--workdir", workdir, "--coordinator", f"127.0.0.1:{port}", "--num-processes", 2, *arguments]
    return [start(*common, "--process-id", i, devices=devices) for i in range(2)]


def finish(*processes: subprocess.Popen[str]) -> list[tuple[str, str]]:
    told = [process.communicate(timeout=300) for process in processes]
    for (output, errors), process in zip(told, processes, strict=True):
        assert process.returncode == 0, output + errors
    return told


def training_losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(workdir) if r["kind"] == "train"]


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start("--workdir", workdir))
    return workdir


def test_two_processes_train_as_one(start, alone, tmp_path):
    first, second = finish(*two_processes(start, tmp_path / "run"))
    assert "top-1 error" in first[0]
    assert "epoch" not in second[1]  # the first process alone tells
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
    finish(*two_processes(start, tmp_path / "run", "--config.parallel.mode=pmap"))
    np.testing.assert_allclose(training_losses(tmp_path / "run"), training_losses(alone), rtol=1e-4)


def test_stopped_in_two_processes_goes_on_in_one(start, alone, tmp_path):
    """A pre-emption notice to one process stops both after the same step."""
    workdir = tmp_path / "run"
    epochs = "--config.train.num_epochs=500"
    processes = two_processes(start, workdir, epochs)
    stderr = processes[0].stderr
    assert stderr is not None
    next(line for line in stderr if "epoch   2/" in line)
    processes[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], told
    assert all("stopped by SIGTERM at step" in errors for errors in told)
    stopped = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())

    process = start("--workdir", workdir, epochs)
    assert process.stderr is not None
    next(line for line in process.stderr if f"resuming from step {stopped} " in line)
    next(line for line in process.stderr if "epoch" in line)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 75
    np.testing.assert_allclose(training_losses(workdir)[:6], training_losses(alone)[:6], rtol=1e-4)


def test_bad_coordinates(start, tmp_path):
    for arguments, words in (
        (["--num-processes", 2], "need --coordinator"),
        (["--coordinator", "somewhere"], "has no port"),
        (["--coordinator", "127.0.0.1:1"], "can't be joined"),
    ):
        process = start("--workdir", tmp_path / "run", *arguments)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2
        assert words in errors
        assert "Traceback" not in errors
