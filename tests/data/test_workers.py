"""Processes that read data: they end with the process that started them, and leave nothing behind."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from batches import train_batches

from gmsop_jax.errors import DataError

READ = """
import itertools, sys, time
from gmsop_jax.config import default_config
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import train_batches

def main():
    c = default_config()
    c.data.dir, c.data.num_workers, c.train.batch_size = sys.argv[1], 2, 250
    batches = train_batches(c.data, c.train, Manifest.load(c.data.dir), seed=0)
    for step, batch in enumerate(batches):
        if step == 4:
            print("reading", flush=True)
            {then}

if __name__ == "__main__":
    main()
"""


READ_ON = """
import signal, sys
from gmsop_jax.config import default_config
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import train_batches

def main():
    c = default_config()
    c.data.dir, c.data.num_workers, c.train.batch_size = sys.argv[1], 2, 250
    caught = []
    signal.signal(int(sys.argv[2]), lambda *_: caught.append(1))
    batches = train_batches(c.data, c.train, Manifest.load(c.data.dir), seed=0)
    print("starting", flush=True)
    while not caught:
        next(batches)
    for _ in range(5):
        next(batches)
    batches.close()
    print("caught, and read 5 more")

if __name__ == "__main__":
    main()
"""


def start(fashion: Path, folder: Path, then: str) -> subprocess.Popen[str]:
    script = folder / "read.py"
    script.write_text(READ.format(then=then))
    return subprocess.Popen(
        [sys.executable, script, fashion],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.parametrize("then", ["time.sleep(600)", "pass"])
def test_workers_end_when_their_parent_is_killed(fashion: Path, tmp_path: Path, then: str):
    process = start(fashion, tmp_path, then)
    assert process.stdout
    assert process.stdout.readline() == "reading\n"
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)  # ends only when every process that holds the pipes has ended


@pytest.mark.parametrize("then", ["break", "sys.exit()"])
def test_nothing_is_leaked(fashion: Path, tmp_path: Path, then: str):
    process = start(fashion, tmp_path, then)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert errors == ""


@pytest.mark.parametrize(
    ("number", "delay"), [(signal.SIGTERM, 0.5), (signal.SIGTERM, 3), (signal.SIGINT, 3), (signal.SIGHUP, 3)]
)
def test_workers_outlive_a_signal_to_the_process_group(fashion: Path, number: signal.Signals, delay: float):
    """The process that started them may need more batches before it can save its state."""
    process = subprocess.Popen(
        [sys.executable, "-c", READ_ON, fashion, str(int(number))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "starting\n"
    time.sleep(delay)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert output == "caught, and read 5 more\n"
    assert errors == ""


def test_a_dead_worker_is_reported(fashion: Path):
    with contextlib.closing(train_batches(fashion, batch_size=250, seed=0, num_workers=1)) as batches:
        next(batches)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(DataError, match=r"data worker process died .*code -9\).*config.data.num_workers \(now 1\)"):
            list(itertools.islice(batches, 10))
