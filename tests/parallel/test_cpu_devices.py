import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from gmsop_jax.config import ConfigDict, default_config
from gmsop_jax.training import devices


def configured(count: int, batch_sizes: tuple[int, int], **train) -> ConfigDict:
    config = default_config()
    config.parallel.cpu_devices = count
    config.train.update(batch_size=batch_sizes[0], **train)
    config.eval.batch_size = batch_sizes[1]
    return config


@pytest.mark.parametrize(
    ("count", "batch_sizes", "cores", "expected"),
    [
        (1, (50, 200), 8, 1),
        (0, (50, 200), 2, 2),
        (0, (50, 200), 8, 2),  # 50 = 2 · 25; 5 devices would have 10 rows each
        (0, (256, 200), 16, 8),  # the largest that divides both
        (0, (51, 200), 2, 1),
        (0, (10, 10), 4, 1),
        (4, (64, 64), 2, 4),  # as many as asked for
    ],
)
def test_a_cpu_is_as_many_devices(count, batch_sizes, cores, expected):
    assert devices.num_cpu_devices(configured(count, batch_sizes), cores) == expected


def test_rows_that_are_split_at_a_time():
    assert devices.num_cpu_devices(configured(0, (160, 320), sub_batches=5), 2) == 2
    assert devices.num_cpu_devices(configured(0, (160, 320), sub_batches=5, mixup_alpha=0.2), 2) == 1  # pairs


def count_devices(**environment: str) -> int:
    """Returns the number of devices of a fresh process, of whose CPU four are to be made."""
    code = """
from gmsop_jax.config import default_config
from gmsop_jax.training import devices
config = default_config()
config.parallel.cpu_devices = 4
devices.use_cpu_devices(config)
import jax
print(jax.device_count())
config.parallel.cpu_devices = 3
devices.use_cpu_devices(config)  # too late, and no error
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


def test_the_environment_takes_precedence():
    assert count_devices() == 4
    assert count_devices(XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert count_devices(JAX_NUM_CPU_DEVICES="2") == 2


def test_the_environment_of_a_started_jax_stays(monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    jax.devices()
    devices.use_cpu_devices(configured(2, (64, 64)))
    assert "PJRT_NPROC" not in os.environ


@pytest.mark.slow
def test_an_operation_that_waits_for_threads_ends(tmp_path):
    """Eigendecompositions beside collectives: on two cores, they waited for each other forever."""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "gmsop_jax.main", "--config", f"{root}/configs/heads.py:mpncov"]
    command += ["--workdir", "run", "--config.train.num_epochs=1", "--config.parallel.cpu_devices=2"]
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path, env=kept)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["device"].startswith("2 ")
