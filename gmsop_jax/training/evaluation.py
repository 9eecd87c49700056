"""Evaluation of a network on a whole split."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax

from gmsop_jax.config import ConfigDict
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import eval_batches
from gmsop_jax.errors import ConfigError
from gmsop_jax.models import create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.metrics import summarize
from gmsop_jax.training.step import make_eval_step

COMPILING = "XLA is compiling the evaluation step, which takes minutes for large networks"


def create_evaluation(
    config: ConfigDict, manifest: Manifest, mean_rgb: tuple[float, float, float], mesh: jax.sharding.Mesh
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Creates a function that evaluates a network, trained with `mean_rgb`, on all images of `config.eval.split`.

    Returns: a function that maps variables on all devices of the mesh (parameters and batch statistics, or their
      averages) to `loss` (nats), `top1_error`, `top5_error` (percent) and `candidate_use` (mean gate weights).

    Raises:
      ConfigError: if `config.eval.batch_size` doesn't split evenly over the devices.
    """
    parallel.check_eval_batch(config.eval.batch_size, mesh)
    model = create_model(config.model, axis_name=parallel.AXIS)
    step = make_eval_step(model, mean_rgb=mean_rgb, flip_average=config.eval.flip_average, axis_name=parallel.AXIS)
    eval_step = parallel.compile_eval_step(step, mesh)

    def evaluate(variables: Mapping[str, Any]) -> dict[str, Any]:
        process = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        with contextlib.closing(eval_batches(config.data, config.eval, manifest, **process)) as batches:
            sums = [eval_step(variables, parallel.place_batch(batch, mesh)) for batch in batches]
        return summarize(jax.device_get(sums))

    return evaluate


def verify_shards(data: Any, manifest: Manifest, splits: Collection[str] | None = None) -> None:
    """Verifies the checksums of this process's part of the shards of some splits, by default all.

    Nothing is verified without `config.data.verify`, or if damaged records are to be skipped.

    Raises:
      DataError: if a shard is missing or its bytes changed.
      FileAccessError: if a shard can't be read.
    """
    if data.verify and data.on_corrupt == "stop":
        index, count = jax.process_index(), jax.process_count()
        manifest.verify_checksums(data.dir, splits=splits, process_index=index, process_count=count)


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
