"""What stays the same over a run: compiled steps, initial state, schedule."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gmsop_jax.config import ConfigDict
from gmsop_jax.data import pipeline
from gmsop_jax.data.augment import create_crop
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ConfigError
from gmsop_jax.models import create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.evaluation import image_shape
from gmsop_jax.training.optimizer import from_config
from gmsop_jax.training.step import TrainState, create_state, make_eval_step, make_train_step
from gmsop_jax.training.transfer import Path, Source, choose, merge


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's parts.

    Attributes:
      config: resolved.
      mesh: all devices.
      initial_state: makes the state before the first step, placed where `train_step` wants it.
      abstract_state: its shapes, dtypes and shardings.
      train_step: (state, this process's rows, rows of the global batch) → (state, metrics).
      eval_step: (variables, batch) → metrics.
      schedule: step, from 0 → learning rate.
      mean_rgb: mean colour that is subtracted.
      num_images: of the training split.
      steps_per_epoch: optimiser steps.
      feature_dimension: of the classifier's input.
      origin: a line that says what the initial state has from another network; empty if nothing.
    """

    config: ConfigDict
    mesh: Mesh
    initial_state: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: Callable
    eval_step: Callable
    schedule: Callable[[int], Any]
    mean_rgb: tuple[float, float, float]
    num_images: int
    steps_per_epoch: int
    feature_dimension: int
    origin: str = ""

    @property
    def total_steps(self) -> int:
        """Of all epochs."""
        return self.config.train.num_epochs * self.steps_per_epoch

    def batch_size(self, step: int) -> int:
        """Rows of the global batch of a step, counted from 1; an epoch's last may have fewer."""
        row = (step - 1) % self.steps_per_epoch
        return min(self.config.train.batch_size, self.num_images - row * self.config.train.batch_size)

    def batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of the batches after a step, for ever.

        Raises:
          DataError: if a shard or record is damaged, or a process that reads them died.
        """
        c = self.config
        iterator = pipeline.train_batches(
            c.data.dir,
            batch_size=c.train.batch_size,
            seed=c.seed,
            start_step=start_step,
            flip=c.data.flip,
            crop=create_crop(c.data.crop, padding=c.data.crop_padding, area=c.data.crop_area),
            padding_rgb=self.mean_rgb,
            image_size=c.data.image_size or None,
            drop_remainder=c.train.drop_last,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=c.data.num_threads,
            num_workers=c.data.num_workers,
            on_corrupt=c.data.on_corrupt,
        )
        with contextlib.closing(iterator):
            yield from iterator


def prepare(
    config: ConfigDict,
    manifest: Manifest,
    mean_rgb: tuple[float, float, float] | None = None,
    source: Source | None = None,
) -> Run:
    """Builds and compiles nothing yet: compilation comes with the first call of each step.

    Args:
      config: resolved.
      manifest: of the data set.
      mean_rgb: mean colour that is subtracted; by default the data set's.
      source: a network that the initial state takes arrays from.

    Raises:
      ConfigError: if the batches don't split over devices and sub-batches, or mixup's pairs over devices;
        if a part of `config.train.rate_factors` is none of the network's, or `source` has another backbone.
      DataError: if the data set has no such splits or too few images.
    """
    t = config.train
    mesh = parallel.create_mesh()
    parallel.check_batch_size("train.batch_size", t.batch_size, mesh, t.sub_batches)
    parallel.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    num_images = manifest.split("train").num_images
    steps_per_epoch = pipeline.steps_per_epoch(num_images, t.batch_size, t.drop_last)
    manifest.split(config.eval.split)
    _check_pairs(config, mesh, num_images)
    mean_rgb = mean_rgb or manifest.mean_rgb
    optimizer, schedule = from_config(config, steps_per_epoch)
    model = create_model(config.model)
    images = jnp.zeros((1, *image_shape(config, manifest)))

    def initial_state(taken: dict[Path, Any]) -> TrainState:
        variables = merge(model.init(jax.random.key(config.seed), images), taken)
        return create_state(variables, optimizer, averaged=t.ema_decay > 0)

    state = jax.eval_shape(initial_state, {})
    taken, origin = choose(state.variables, source) if source else ({}, "")
    shardings = parallel.state_shardings(state, mesh)
    _, aux = jax.eval_shape(model.apply, state.variables, images)
    return Run(
        config=config,
        mesh=mesh,
        initial_state=functools.partial(jax.jit(initial_state, out_shardings=shardings), taken),
        abstract_state=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
        ),
        train_step=_train_step(config, mean_rgb, optimizer, mesh, shardings),
        eval_step=parallel.jit_eval_step(
            make_eval_step(model, mean_rgb=mean_rgb, flip_average=config.eval.flip_average), mesh
        ),
        schedule=schedule,
        mean_rgb=mean_rgb,
        num_images=num_images,
        steps_per_epoch=steps_per_epoch,
        feature_dimension=aux["features"].shape[-1],
        origin=origin,
    )


def _check_pairs(config: ConfigDict, mesh: Mesh, num_images: int) -> None:
    """Refuses mixup where a device's own program would make other pairs than the whole batch's."""
    t, p = config.train, config.parallel
    if not t.mixup_alpha or mesh.size == 1 or (p.mode, p.batch_norm) == ("jit", "global"):
        return
    last = [] if t.drop_last else [num_images % t.batch_size]
    for size in (t.batch_size, *last):
        if size % (mesh.size * t.sub_batches) == 0 and size // mesh.size % 2:
            which = "" if size == t.batch_size else f" makes a last batch of {size}, which"
            raise ConfigError(
                f"config.train.batch_size = {t.batch_size}{which} gives each of {mesh.size} devices an odd number of"
                f" rows ({size // mesh.size}), and config.train.mixup_alpha mixes rows in pairs; take another"
                " batch size, or --config.train.mixup_alpha=0"
            )


def _train_step(
    config: ConfigDict,
    mean_rgb: tuple[float, float, float],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    shardings: Any,
) -> Callable:
    per_device_bn = config.parallel.batch_norm == "device"

    def make_step(axis_name: str | None) -> Callable:
        return make_train_step(
            create_model(config.model, axis_name=axis_name, per_device_bn=per_device_bn),
            optimizer,
            mean_rgb=mean_rgb,
            balance_weight=config.train.balance_weight,
            balance_ddof=config.model.balance_ddof,
            seed=config.seed,
            label_smoothing=config.train.label_smoothing,
            mixup_alpha=config.train.mixup_alpha,
            ema_decay=config.train.ema_decay,
            sub_batches=config.train.sub_batches,
            axis_name=axis_name,
        )

    return parallel.compile_train_step(
        make_step,
        mesh,
        shardings,
        mode=config.parallel.mode,
        per_device_bn=per_device_bn,
        sub_batches=config.train.sub_batches,
    )
