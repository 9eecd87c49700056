"""Creates the working directory of a run that the authors' MatConvNet script trained."""

import itertools
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.data.manifest import FILE_NAME, Manifest
from gmsop_jax.data.pipeline import steps_per_epoch
from gmsop_jax.data.records import MAX_SIDE
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop.imported_run import initial_state, to_float32, without_checkpoints, write_workdir
from gmsop_jax.interop.matconvnet import Checkpoint, load_checkpoint
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.step import TrainState

_IMAGENET_IMAGES = 1_281_167  # in the training split
_MAX_IMAGES = 10**9  # a larger count in a file is ignored


@dataclass(frozen=True)
class ImportedRun:
    """The result of an import: the configuration of the run, and the contents of the file.

    `mean_rgb_difference` is the largest difference between the mean colours of the file and the data set; None if
    either is unknown.
    """

    config: ConfigDict
    checkpoint: Checkpoint
    step: int
    epoch: int
    mean_rgb_difference: float | None


def import_checkpoint(
    path: str | pathlib.Path, output: str | pathlib.Path, overrides: Sequence[str] = ()
) -> ImportedRun:
    """Creates a working directory for `gmsop evaluate` and further training.

    The configuration contains the network, gate gradient, balance weight, learning rates, batch size, momentum and
    weight decay of the file. The number of steps per epoch is computed from the data set in `config.data.dir` if it
    exists, and otherwise from the number of images stored in the file (ImageNet's if it stores none). Arrays are
    converted to float32.

    Args:
      path: `net-epoch-N.mat`.
      output: a folder without checkpoints, created if missing. It receives `config.json`, `config.py` (for
        `--config`), `inputs.json` and one checkpoint.
      overrides: `field=value` settings of the configuration, such as `train.num_epochs=70`.

    Raises:
      CheckpointError: if the file can't be imported (see `matconvnet.load`), `output` has checkpoints, or the data set
        has another number of classes.
      ConfigError: if an override is not valid.
      DataError: if the data set is damaged.
    """
    output = without_checkpoints(output)
    checkpoint = load_checkpoint(path)
    config = run_config(checkpoint)
    configs.apply_overrides(config, overrides)
    manifest = _manifest(config)
    steps = steps_per_epoch(_num_images(checkpoint, manifest), config.train.batch_size, config.train.drop_last)
    state = _state(checkpoint, config, steps)
    write_workdir(output, config, state, _inputs(checkpoint, config, manifest), checkpoint.epoch)
    difference = None
    if manifest is not None and checkpoint.mean_rgb is not None:
        difference = float(np.max(np.abs(checkpoint.mean_rgb - manifest.mean_rgb)))
    return ImportedRun(config, checkpoint, int(state.step), checkpoint.epoch, difference)


def run_config(checkpoint: Checkpoint) -> ConfigDict:
    """Returns the configuration of a run with the network and training options of a checkpoint."""
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
    """Returns the numbers of an array, rounded to 12 digits; an empty list unless all are positive and finite."""
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
            f"the network has {config.model.num_classes} classes, but the data set {config.data.dir} has"
            f" {manifest.num_classes}; give another data set with --config.data.dir=…"
        )
    return manifest


def _num_images(checkpoint: Checkpoint, manifest: Manifest | None) -> int:
    if manifest is not None:
        return manifest.split("train").num_images
    rows = checkpoint.stats.get("train")
    row = rows[-1] if isinstance(rows, list) and rows else rows
    count = _positive(row.get("num")) if isinstance(row, dict) else []
    return int(count[0]) if count and count[0] <= _MAX_IMAGES else _IMAGENET_IMAGES


def _state(checkpoint: Checkpoint, config: ConfigDict, steps: int) -> TrainState:
    state = initial_state(config, checkpoint.variables, steps)
    if (count := checkpoint.epoch * steps) >= 2**31:
        raise CheckpointError(f"{checkpoint.epoch} epochs of {steps} steps are more than the maximum of 2³¹ − 1 steps")
    step = jnp.asarray(count, jnp.int32)
    opt_state = optax.tree.set(state.opt_state, count=step)
    if checkpoint.momentum is not None and config.train.optimizer == "sgd":
        opt_state = optax.tree.set(opt_state, trace=to_float32(checkpoint.momentum))
    return state.replace(step=step, opt_state=opt_state)


def _inputs(checkpoint: Checkpoint, config: ConfigDict, manifest: Manifest | None) -> Inputs:
    """Returns the classes and mean colour of the data set if it exists, and those of the file otherwise."""
    size = checkpoint.normalization.get("imageSize")
    sides = [side for side in _positive(size)[:2] if side <= MAX_SIDE]
    height, width = sides if len(sides) == 2 else (64, 64)
    names = checkpoint.class_names or []
    if len(names) != config.model.num_classes:
        names = [str(i) for i in range(config.model.num_classes)]
    mean = checkpoint.mean_rgb
    red, green, blue = (0.0, 0.0, 0.0) if mean is None else (float(x) for x in mean)
    if manifest is not None:
        names, (red, green, blue) = manifest.classes, manifest.mean_rgb
    name = manifest.name if manifest is not None else "unknown"
    return Inputs(name, tuple(names), (red, green, blue), (int(height), int(width)))
