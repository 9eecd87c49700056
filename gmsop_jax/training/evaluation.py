"""Evaluation of a network on a whole split."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gmsop_jax.config import ConfigDict
from gmsop_jax.data import pipeline
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ConfigError
from gmsop_jax.models import create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.metrics import summarize
from gmsop_jax.training.step import make_eval_step


def create_eval_step(config: ConfigDict, inputs: Inputs, mesh: jax.sharding.Mesh) -> Callable:
    """Creates the evaluation step of a network: (variables, placed batch) → metrics."""
    step = make_eval_step(
        create_model(config.model, axis_name=parallel.AXIS),
        mean_rgb=inputs.mean_rgb,
        flip_average=config.eval.flip_average,
        axis_name=parallel.AXIS,
    )
    return parallel.compile_eval_step(step, mesh)


def evaluate_split(
    eval_step: Callable, variables: Mapping[str, Any], config: ConfigDict, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
    """Measures loss and errors on all images of `config.eval.split`.

    Args:
      eval_step: from `parallel.compile_eval_step`.
      variables: parameters and moments (or their averages), on all devices of the mesh.
      config: the configuration, of which the sections `data` and `eval` are used.
      mesh: the devices.

    Returns: `loss` (nats), `top1_error`, `top5_error` (percent), `candidate_use` (mean gate weights).
    """
    batches = pipeline.eval_batches(
        config.data.dir,
        config.eval.split,
        batch_size=config.eval.batch_size,
        image_size=config.data.image_size or None,
        resize=config.eval.resize,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        on_corrupt=config.data.on_corrupt,
    )
    with contextlib.closing(batches):
        sums = [eval_step(variables, parallel.place_batch(batch, mesh)) for batch in batches]
    return summarize(jax.device_get(sums))


def resolve(config: ConfigDict, manifest: Manifest) -> ConfigDict:
    """Returns a copy of the configuration with the data set's number of classes filled in.

    Raises:
      ConfigError: if the configuration has another number of classes.
    """
    config = ConfigDict(config.to_dict())
    given = config.model.num_classes
    if given not in (0, manifest.num_classes):
        raise ConfigError(
            f"config.model.num_classes = {given}, but the data set {config.data.dir} has"
            f" {manifest.num_classes} classes; set --config.model.num_classes=0 to use that number"
        )
    config.model.num_classes = manifest.num_classes
    return config


def image_shape(config: ConfigDict, manifest: Manifest) -> tuple[int, int, int]:
    """Height, width and channels of the images that the network is given."""
    if config.data.image_size:
        return config.data.image_size, config.data.image_size, 3
    size = manifest.split(config.eval.split).image_size
    if size is None:
        raise ConfigError(f"the images of {config.data.dir} differ in size; set --config.data.image_size=…")
    return (*size, 3)
