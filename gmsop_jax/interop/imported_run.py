"""Writes the working directory of an imported network."""

import pathlib
from collections.abc import Iterable

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import write_atomic
from gmsop_jax.training.checkpoint import DIRECTORY, Checkpoints, Progress, steps_on_disk
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.step import TrainState
from gmsop_jax.training.workdir import Workdir

_CONFIG_FILE = '''"""The configuration of an imported run, for further training.

gmsop train --config DIR/config.py --workdir DIR
"""

import pathlib

from gmsop_jax.config import ConfigDict, from_json


def get_config() -> ConfigDict:
    return from_json(pathlib.Path(__file__).with_name("config.json").read_text())
'''


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Applies `field=value` settings to a configuration and validates it; ConfigError if one is not valid."""
    for item in overrides:
        configs.override(config, item)
    configs.validate(config)


def without_checkpoints(folder: str | pathlib.Path) -> pathlib.Path:
    """Returns the absolute path of a folder; CheckpointError if it already has checkpoints, which are kept."""
    folder = pathlib.Path(folder).absolute()
    if steps_on_disk(folder / DIRECTORY):
        raise CheckpointError(f"{folder} holds checkpoints already; name a new folder with --output")
    return folder


def write_workdir(folder: pathlib.Path, config: ConfigDict, state: TrainState, inputs: Inputs, epoch: int) -> None:
    """Writes `config.json`, `config.py` (for `--config`), `inputs.json` and one checkpoint."""
    with Workdir(folder, config):
        write_atomic(folder / "config.py", _CONFIG_FILE)
        inputs.save(folder)
        with Checkpoints(folder / DIRECTORY, keep=config.checkpoint.keep) as checkpoints:
            checkpoints.save(state, Progress(int(state.step), epoch, 0.0))
