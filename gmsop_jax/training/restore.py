"""Restores a trained network, with everything that is needed to use it."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.models import Network, create_model
from gmsop_jax.training import checkpoint, exported
from gmsop_jax.training.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Info:
    """Information about a restored network.

    Attributes:
      config: the resolved configuration of its run.
      inputs: its classes' names, mean colour and image size.
      step: optimiser steps after which it was saved.
      metrics: `loss` (nats), `top1_error` and `top5_error` (percent) measured at that step; None if
        it was not evaluated.
    """

    config: ConfigDict
    inputs: Inputs
    step: int
    metrics: Mapping[str, Any] | None

    @property
    def num_candidates(self) -> int:
        """The number of gate weights n; 1 for a head without a gate."""
        return self.config.model.num_candidates if self.config.model.head in ("gmgap", "gmsop") else 1


def load(path: str | os.PathLike[str]) -> tuple[Network, dict[str, Any], Info]:
    """Restores a trained network. Its data set is not needed.

    Args:
      path: a working directory (its best checkpoint is taken, or the last if none was evaluated), one step's folder in
        it, a folder that `gmsop export --format safetensors` wrote, or the name of a repository on the Hugging Face Hub
        with the contents of such a folder (needs huggingface_hub).

    Returns: `(model, variables, info)` for `model.apply(variables, images)`, images being float
      [b, h, w, 3] with `info.inputs.mean_rgb` subtracted (`train_step.normalize`); the variables,
      averages if the run has them, are on the first device.

    Raises:
      CheckpointError: if there is no checkpoint, a file of its run is missing or damaged, or the
        configuration doesn't fit it.
    """
    return load_onto(path, SingleDeviceSharding(jax.local_devices()[0]))


def load_onto(path: str | os.PathLike[str], sharding: Sharding) -> tuple[Network, dict[str, Any], Info]:
    """Restores a network like `load`, and places its variables by a sharding."""
    config, inputs = read_description(path)
    configs.validate(config)
    if config.model.num_classes != len(inputs.classes):
        raise CheckpointError(
            f"{os.fspath(path)}: config.json has {config.model.num_classes} classes, inputs.json names"
            f" {len(inputs.classes)}; they belong to different runs"
        )
    model = create_model(config.model)
    variables, step, metrics = load_variables(model, (*inputs.image_size, 3), path, sharding)
    return model, variables, Info(config, inputs, step, metrics)


def read_description(path: str | os.PathLike[str]) -> tuple[ConfigDict, Inputs]:
    """Reads the configuration and the inputs of a trained network, without its arrays.

    Args, Raises: as in `load`.
    """
    if exported_folder := exported.find(path):
        return exported.read_description(exported_folder)
    config = configs.from_json(checkpoint.read_config(os.fspath(path)))
    return config, Inputs.load(folder_of(path))


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """The working directory of a run, or the folder of an exported network. Args, Raises: as in `load`."""
    return exported.find(path) or checkpoint.locate(os.fspath(path))[0].parent


def load_variables(
    model: Network, image_shape: tuple[int, int, int], path: str | os.PathLike[str], sharding: Sharding
) -> tuple[dict[str, Any], int, Mapping[str, Any] | None]:
    """Restores the parameters and moments of a network; the averages, if the run computes them.

    Args:
      model: the network.
      image_shape: height, width and channels of its images.
      path: as `load`.
      sharding: where each array goes.

    Returns: (variables, step, what was measured at that step).

    Raises:
      CheckpointError: if there is no checkpoint, it doesn't fit the model, or is damaged.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    like = dict(jax.eval_shape(model.init, jax.random.key(0), images))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    if exported_folder := exported.find(path):
        return exported.load_variables(exported_folder, like, sharding)
    folder, step = checkpoint.locate(os.fspath(path))
    with checkpoint.Checkpoints(folder, read_only=True) as checkpoints:
        if step is None:
            best = checkpoints.best_step
            step = best if best is not None else checkpoints.latest_step
        assert step is not None  # locate found one
        variables, _ = checkpoints.restore_variables({"batch_stats": {}, **like}, step)
        return variables, step, checkpoints.metrics(step)
