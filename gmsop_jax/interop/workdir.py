"""A working directory from a checkpoint of the authors' script, as if it had been trained here."""

import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.data.manifest import FILE_NAME, Manifest
from gmsop_jax.data.pipeline import steps_per_epoch
from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import write_atomic
from gmsop_jax.interop.matconvnet import Checkpoint, load_checkpoint
from gmsop_jax.training.checkpoint import DIRECTORY, Checkpoints, Progress, steps_on_disk
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.optimizer import create_optimizer, create_schedule
from gmsop_jax.training.step import TrainState, create_state
from gmsop_jax.training.workdir import Workdir

_IMAGENET_IMAGES = 1_281_167  # of its training split
_CONFIG_FILE = '''"""An imported run, for further training.

python -m gmsop_jax.main --config DIR/config.py --workdir DIR
"""

import pathlib

from gmsop_jax.config import ConfigDict, from_json


def get_config() -> ConfigDict:
    return from_json(pathlib.Path(__file__).with_name("config.json").read_text())
'''


@dataclass(frozen=True)
class ImportedRun:
    """What was imported.

    Attributes:
      config: of the run, as `config.json` holds it.
      checkpoint: what the file held.
      step, epoch: where the run stands.
      mean_rgb_difference: largest difference between the mean colours of file and data set; None if
        either is not known.
    """

    config: ConfigDict
    checkpoint: Checkpoint
    step: int
    epoch: int
    mean_rgb_difference: float | None


def import_checkpoint(
    path: str | pathlib.Path, output: str | pathlib.Path, overrides: Sequence[str] = ()
) -> ImportedRun:
    """Makes a working directory for `--mode evaluate` and further training.

    The configuration has the file's network, gradient of the gate, learning rates, batch size, momentum
    and weight decay. The data set in `config.data.dir`, if it is there, tells how many steps an epoch
    has; otherwise the file's own count of images does. Arrays become float32.

    Args:
      path: `net-epoch-N.mat`.
      output: a folder without checkpoints, made if missing: gets `config.json`, `config.py` (for
        `--config`), `inputs.json` and one checkpoint.
      overrides: `field=value` of the configuration, like `train.num_epochs=70`.

    Raises:
      CheckpointError: as `matconvnet.load`, or if `output` has checkpoints.
      ConfigError: if an override doesn't fit.
      DataError: if the data set is damaged.
    """
    output = without_checkpoints(output)
    checkpoint = load_checkpoint(path)
    config = run_config(checkpoint)
    for item in overrides:
        configs.override(config, item)
    configs.validate(config)
    manifest = _manifest(config)
    steps = steps_per_epoch(_num_images(checkpoint, manifest), config.train.batch_size, config.train.drop_last)
    state = _state(checkpoint, config, steps)
    write_workdir(output, config, state, _inputs(checkpoint, config, manifest), checkpoint.epoch)
    difference = None
    if manifest is not None and checkpoint.mean_rgb is not None:
        difference = float(np.max(np.abs(checkpoint.mean_rgb - manifest.mean_rgb)))
    return ImportedRun(config, checkpoint, int(state.step), checkpoint.epoch, difference)


def without_checkpoints(folder: str | pathlib.Path) -> pathlib.Path:
    """The folder's absolute path; CheckpointError if it holds checkpoints, which stay as they are."""
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


def run_config(checkpoint: Checkpoint) -> ConfigDict:
    """The configuration of a run with a checkpoint's network and training options."""
    config = configs.default_config()
    config.model.update(checkpoint.model_config)
    config.train.balance_weight = checkpoint.balance_weight
    config.train.drop_last = False
    options = checkpoint.meta.get("trainOpts")
    options = options if isinstance(options, dict) else {}
    for ours, theirs in (("momentum", "momentum"), ("weight_decay", "weightDecay")):
        values = _positive(options.get(theirs))
        if values:
            config.train[ours] = values[0]
    if batch_size := _positive(options.get("batchSize")):
        config.train.batch_size = int(batch_size[0])
    if rates := _positive(options.get("learningRate")):
        runs = itertools.groupby(rates)
        config.train.learning_rates = tuple((rate, len(list(epochs))) for rate, epochs in runs)
        config.train.num_epochs = max(len(rates), checkpoint.epoch)
    return config


def _positive(value: Any) -> list[float]:
    """Numbers rounded to what was typed; none where the file has none, or something else."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iuf":
        return []
    numbers = [float(f"{number:.12g}") for number in value.ravel()]
    return numbers if all(0 < number < np.inf for number in numbers) else []


def _manifest(config: ConfigDict) -> Manifest | None:
    if not (pathlib.Path(config.data.dir) / FILE_NAME).exists():
        return None
    manifest = Manifest.load(config.data.dir, splits=())
    if manifest.num_classes != config.model.num_classes:
        raise CheckpointError(
            f"the network has {config.model.num_classes} classes and the data set {config.data.dir}"
            f" {manifest.num_classes}; name another with --config.data.dir=…"
        )
    return manifest


def _num_images(checkpoint: Checkpoint, manifest: Manifest | None) -> int:
    if manifest is not None:
        return manifest.split("train").num_images
    rows = checkpoint.stats.get("train")
    row = rows[-1] if isinstance(rows, list) and rows else rows
    count = _positive(row.get("num")) if isinstance(row, dict) else []
    return int(count[0]) if count else _IMAGENET_IMAGES


def _state(checkpoint: Checkpoint, config: ConfigDict, steps: int) -> TrainState:
    schedule = create_schedule(config.train, steps)
    optimizer = create_optimizer(config.train, schedule, config.model.pixel_scale)
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.variables)
    state = create_state(variables, optimizer, averaged=config.train.ema_decay > 0)
    step = jnp.asarray(checkpoint.epoch * steps, jnp.int32)
    opt_state = optax.tree.set(state.opt_state, count=step)
    if checkpoint.momentum is not None and config.train.optimizer == "sgd":
        momentum = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), checkpoint.momentum)
        opt_state = optax.tree.set(opt_state, trace=momentum)
    return state.replace(step=step, opt_state=opt_state)


def _inputs(checkpoint: Checkpoint, config: ConfigDict, manifest: Manifest | None) -> Inputs:
    """From the data set, where it is there; from the file otherwise."""
    normalization = checkpoint.meta.get("normalization")
    size = normalization.get("imageSize") if isinstance(normalization, dict) else None
    height, width = (_positive(size) or [64.0, 64.0])[:2]
    names = checkpoint.class_names or [str(i) for i in range(config.model.num_classes)]
    mean = checkpoint.mean_rgb
    red, green, blue = (0.0, 0.0, 0.0) if mean is None else (float(x) for x in mean)
    if manifest is not None:
        names, (red, green, blue) = manifest.classes, manifest.mean_rgb
    name = manifest.name if manifest is not None else "unknown"
    return Inputs(name, tuple(names), (red, green, blue), (int(height), int(width)))
