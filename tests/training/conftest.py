import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gmsop_jax.config import ConfigDict, load
from gmsop_jax.conversion.convert import convert

# 80 training images in batches of 20: four steps an epoch
CONFIG = """
from gmsop_jax.config import default_config

def get_config():
    c = default_config()
    c.data.dir = {directory!r}
    c.data.source = "fashion-mnist"
    c.data.image_size = 12
    c.data.num_threads = 1
    c.model.blocks_per_stage = 1
    c.model.stem_width = 4
    c.model.stage_widths = (4, 8)
    c.model.stage_strides = (2, 1)
    c.model.gate_widths = (6, 4)
    c.model.candidate_widths = (6, 4)
    c.model.num_candidates = 4
    c.model.num_selected = 2
    c.train.batch_size = 20
    c.train.num_epochs = 3
    c.train.learning_rates = ((0.02, 2), (0.002, 1))
    c.train.log_every_steps = 3
    c.eval.batch_size = 32
    c.checkpoint.keep = 2
    return c
"""


@pytest.fixture(autouse=True, scope="module")
def keep_programs(compile_once: None) -> None:
    """Applies `compile_once` to all tests of this folder."""


@pytest.fixture(scope="package")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 images of each split; tests only read it."""
    directory = tmp_path_factory.mktemp("data") / "fashion"
    convert("fashion-mnist", None, directory, limit=80, progress=False)
    return directory


@pytest.fixture(scope="package")
def config_file(dataset: Path) -> Path:
    file = dataset.parent / "tiny.py"
    file.write_text(CONFIG.format(directory=str(dataset)))
    return file


@pytest.fixture
def tiny(config_file: Path) -> ConfigDict:
    return load(config_file)


@pytest.fixture(scope="package")
def start(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command line in a process of its own, in an empty folder."""
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "gmsop_jax.main", *map(str, arguments)]
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return run
