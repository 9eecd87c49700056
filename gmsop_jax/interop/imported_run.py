"""Writes the working directory of an imported network."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import write_atomic
from gmsop_jax.training.checkpoint import Checkpoints, Progress
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.layout import DIRECTORY, steps_on_disk
from gmsop_jax.training.optimizer import create_optimizer, create_schedule
from gmsop_jax.training.step import TrainState, create_state
from gmsop_jax.training.workdir import Workdir

_CONFIG_FILE = '''"""The configuration of an imported run, for further training.

gmsop train --config DIR/config.py --workdir DIR
"""

import pathlib

from gmsop_jax.config import ConfigDict, from_json


def get_config() -> ConfigDict:
    return from_json(pathlib.Path(__file__).with_name("config.json").read_text())
'''


def without_checkpoints(folder: str | pathlib.Path) -> pathlib.Path:
    """Returns a folder's absolute path. Raises CheckpointError if it contains checkpoints, which are never replaced."""
    folder = pathlib.Path(folder).absolute()
    if steps_on_disk(folder / DIRECTORY):
        raise CheckpointError(f"{folder} already contains checkpoints; give a new folder with --output")
    return folder


def initial_state(config: ConfigDict, variables: Any, num_steps: int = 1) -> TrainState:
    """Returns the state of a run at step 0, with the given variables in float32; an epoch has `num_steps` steps."""
    optimizer = create_optimizer(config.train, create_schedule(config.train, num_steps), config.model.pixel_scale)
    return create_state(to_float32(variables), optimizer, averaged=config.train.ema_decay > 0)


def to_float32(tree: Any) -> Any:
    """Converts the arrays of a tree to JAX arrays in float32."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def write_workdir(folder: pathlib.Path, config: ConfigDict, state: TrainState, inputs: Inputs, epoch: int) -> None:
    """Writes `config.json`, `config.py` (for `--config`), `inputs.json` and one checkpoint."""
    with Workdir(folder, config):
        write_atomic(folder / "config.py", _CONFIG_FILE)
        inputs.save(folder)
        with Checkpoints(folder / DIRECTORY, keep=config.checkpoint.keep) as checkpoints:
            checkpoints.save(state, Progress(int(state.step), epoch, 0.0))
