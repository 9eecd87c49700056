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
from gmsop_jax.files import CHECKSUMS, sha256
from gmsop_jax.models import Network, create_model
from gmsop_jax.models.network import GATED
from gmsop_jax.training import exported
from gmsop_jax.training.checkpoint import Checkpoints
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.layout import locate, read_file, steps_on_disk


@dataclasses.dataclass(frozen=True)
class Info:
    """Information about a restored network.

    Attributes:
      config: the resolved configuration of its run.
      inputs: the names of its classes, its mean colour and image size.
      step: number of optimiser steps after which it was saved.
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
        return self.config.model.num_candidates if self.config.model.head in GATED else 1


def load(path: str | os.PathLike[str], sharding: Sharding | None = None) -> tuple[Network, dict[str, Any], Info]:
    """Restores a trained network. Its data set is not needed.

    Args:
      path: a working directory, whose last checkpoint is restored, the folder of one step in it, a folder that
        `gmsop export --format safetensors` wrote, or the name of a repository on the Hugging Face Hub with the contents
        of such a folder (needs huggingface_hub).
      sharding: where the variables are placed; by default on the first local device.

    Returns: `(model, variables, info)` for `model.apply(variables, images)`. The images are float [b, h, w, 3] with
      `info.inputs.mean_rgb` subtracted, as `step.normalize` does. If the run averaged its variables over the
      steps, the averages are returned.

    Raises:
      CheckpointError: if there is no checkpoint, a file is missing or damaged, or the configuration doesn't fit the
        checkpoint.
      ConfigError: if the stored configuration is not valid.
    """
    config, inputs = read_description(path)
    configs.validate(config)
    if config.model.num_classes != len(inputs.classes):
        raise CheckpointError(
            f"{os.fspath(path)}: config.json has {config.model.num_classes} classes, but inputs.json lists"
            f" {len(inputs.classes)}; they belong to different runs"
        )
    model = create_model(config.model)
    sharding = sharding or SingleDeviceSharding(jax.local_devices()[0])
    variables, step, metrics = load_variables(model, (*inputs.image_size, 3), path, sharding)
    return model, variables, Info(config, inputs, step, metrics)


def read_description(path: str | os.PathLike[str]) -> tuple[ConfigDict, Inputs]:
    """Reads the configuration and the inputs of a trained network, without its arrays.

    Args, Raises: as in `load`.
    """
    if exported_folder := exported.find(path):
        return exported.read_description(exported_folder)
    folder = locate(path)[0].parent
    return configs.from_json(read_file(folder, "config.json"), str(folder / "config.json")), Inputs.load(folder)


def checksum(path: str | os.PathLike[str]) -> str:
    """Returns a string that identifies the arrays of a trained network, without reading those of a checkpoint.

    Args, Raises: as in `load`.
    """
    if exported_folder := exported.find(path):
        return f"sha256 {sha256(exported_folder / exported.WEIGHTS)}"
    folder, step = locate(path)
    step = steps_on_disk(folder)[-1] if step is None else step
    file = folder / str(step) / CHECKSUMS
    return f"step {step}, {CHECKSUMS} of sha256 {sha256(file) if file.is_file() else 'absent'}"


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the working directory of a run, or the folder of an exported network. Args, Raises: as in `load`."""
    return exported.find(path) or locate(path)[0].parent


def load_variables(
    model: Network, image_shape: tuple[int, int, int], path: str | os.PathLike[str], sharding: Sharding
) -> tuple[dict[str, Any], int, Mapping[str, Any] | None]:
    """Restores the variables of a network for images of a shape [h, w, c]; `path` is as in `load`.

    If the run computed averages, they are restored instead.

    Returns: (variables, step, evaluation metrics of that step).

    Raises:
      CheckpointError: if there is no checkpoint, it doesn't fit the model, or is damaged.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    like = dict(jax.eval_shape(model.init, jax.random.key(0), images))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    if exported_folder := exported.find(path):
        return exported.load_variables(exported_folder, like, sharding)
    folder, step = locate(path)
    with Checkpoints(folder, read_only=True) as checkpoints:
        step = checkpoints.latest_step if step is None else step
        assert step is not None  # locate found one
        variables, _ = checkpoints.restore_variables({"batch_stats": {}, **like}, step)
        return variables, step, checkpoints.metrics(step)
