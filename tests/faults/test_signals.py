"""Signals and closed streams during a run; `tests/test_main.py` covers them before and after it."""

import json
import signal
import sys

import pytest

from gmsop_jax.errors import CheckpointError
from gmsop_jax.training.interrupt import tolerating_closed_streams
from gmsop_jax.training.loop import train_and_evaluate


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGHUP, 75), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_signal_saves_and_ends_the_run(start, tmp_path, signum, status):
    process = start("--workdir", tmp_path / "run", "--config.train.num_epochs=500")
    next(line for line in process.stderr if "epoch   1/" in line)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == status
    assert f"stopped by {signum.name} at step" in errors
    assert "Traceback" not in errors
    step = int(errors.partition("at step ")[2].partition(",")[0])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()


def test_closed_streams_do_not_end_a_run(start, tmp_path):
    """As with `2>&1 | head -1`."""
    process = start("--workdir", tmp_path / "run")
    process.stdout.close()
    assert process.stderr.readline()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 9


def test_missing_streams_are_tolerated(monkeypatch):
    """As with `>&- 2>&-`."""
    monkeypatch.setattr("sys.stdout", None)
    monkeypatch.setattr("sys.stderr", None)
    with tolerating_closed_streams():
        print("nowhere", flush=True)
        assert sys.stdout is not None


@pytest.mark.parametrize(
    "path", ["", " ", "x" * 300, "/".join(["x" * 200] * 25)], ids=["empty", "blank", "name", "path"]
)
def test_impossible_workdir_is_refused(config, path):
    with pytest.raises(CheckpointError, match=r"--workdir .*(is empty|can't be used)"):
        train_and_evaluate(config, path)
