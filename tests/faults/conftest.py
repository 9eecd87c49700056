import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gmsop_jax.config import ConfigDict, load
from gmsop_jax.conversion.convert import convert

# 48 training images in batches of 16: three steps an epoch, nine in all
CONFIG = """
from gmsop_jax.config import default_config

def get_config():
    c = default_config()
    c.data.dir = {directory!r}
    c.data.source = "fashion-mnist"
    c.data.image_size = 8
    c.data.num_threads = 1
    c.model.blocks_per_stage = 1
    c.model.stem_width = 4
    c.model.stage_widths = (4,)
    c.model.stage_strides = (2,)
    c.model.gate_widths = (4,)
    c.model.candidate_widths = (4,)
    c.model.num_candidates = 3
    c.model.num_selected = 2
    c.train.batch_size = 16
    c.train.num_epochs = 3
    c.train.learning_rates = ((0.02, 3),)
    c.train.log_every_steps = 1
    c.eval.batch_size = 16
    return c
"""


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of each split in two training shards; tests only read it."""
    directory = tmp_path_factory.mktemp("fault_data") / "fashion"
    convert("fashion-mnist", None, directory, shards=2, limit=48, progress=False)
    return directory


@pytest.fixture(scope="session")
def fault_config(fault_data: Path) -> Path:
    file = fault_data.parent / "tiny.py"
    file.write_text(CONFIG.format(directory=str(fault_data)))
    return file


@pytest.fixture
def config(fault_config: Path) -> ConfigDict:
    return load(fault_config)


@pytest.fixture(scope="session")
def start(environment: dict[str, str], fault_config: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line in a process of its own; `prologue` is Python that runs before it."""

    def run(*arguments: object, prologue: str = "", devices: int = 1) -> subprocess.Popen[str]:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        program = f"{prologue}\nimport sys\nfrom gmsop_jax.main import main\nsys.exit(main())"
        command = [sys.executable, "-c", program, "--config", str(fault_config), *map(str, arguments)]
        return subprocess.Popen(
            command,
            env={**environment, "XLA_FLAGS": flags.strip()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run
