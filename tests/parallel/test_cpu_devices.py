import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from gmsop_jax import main
from gmsop_jax.config import default_config
from gmsop_jax.training import parallel


def devices(count: int, batch_sizes: tuple[int, ...], cores: int, **environment: str) -> int:
    """How many devices a fresh process has that was told so."""
    code = f"""
import os
os.cpu_count = lambda: {cores}
from gmsop_jax.training import parallel
parallel.use_cpu_devices({count}, {batch_sizes})
import jax
print(jax.device_count())
parallel.use_cpu_devices(3, (1, 1))  # too late, and no error
"""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return int(done.stdout)


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
    assert devices(count, batch_sizes, cores) == expected


def test_the_environment_goes_first():
    assert devices(0, (64, 64), 4, XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3
    assert devices(0, (64, 64), 4, JAX_NUM_CPU_DEVICES="2") == 2


def test_the_environment_of_a_started_jax_stays(monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    jax.devices()
    parallel.use_cpu_devices(2, (64, 64))
    assert "PJRT_NPROC" not in os.environ


def test_rows_that_are_split_at_a_time():
    config = default_config()
    config.train.batch_size, config.eval.batch_size = 100, 200
    assert main._split_rows(config) == (100, 200)
    config.train.sub_batches, config.train.mixup_alpha = 5, 0.2
    assert main._split_rows(config) == (10, 200)  # pairs of each part


@pytest.mark.slow
def test_an_operation_that_waits_for_threads_ends(tmp_path):
    """Eigendecompositions beside collectives: on two cores they waited for each other for ever."""
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "gmsop_jax.main", "--config", f"{root}/configs/heads.py:mpncov"]
    command += ["--workdir", "run", "--config.train.num_epochs=1", "--config.parallel.cpu_devices=2"]
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=tmp_path, env=kept)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["device"].startswith("2 ")
