"""Setting up a run: from the configuration to the data, state, steps and schedule that the loop needs."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gmsop_jax.config import ConfigDict
from gmsop_jax.data import pipeline
from gmsop_jax.data.augment import create_crop
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import CheckpointError, ConfigError
from gmsop_jax.models import count_parameters, create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.checkpoint import DIRECTORY, locate, steps_on_disk
from gmsop_jax.training.evaluation import create_eval_step, evaluate_split, image_shape, resolve
from gmsop_jax.training.inputs import Inputs, fingerprint
from gmsop_jax.training.optimizer import create_optimizer, create_schedule
from gmsop_jax.training.step import TrainState, create_state, make_train_step
from gmsop_jax.training.transfer import Path, choose, merge, read_source


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the training loop needs.

    Attributes:
      config: the configuration, with the data set's number of classes filled in.
      inputs: the data set as the network sees it.
      batches: number of steps done → endless iterator over the batches of the following steps, placed on
        this process's devices.
      initial_state: creates the state before the first step.
      abstract_state: shapes, dtypes and shardings of the state.
      train_step: (state, batch) → (state, metrics); donates the state's memory.
      evaluate: variables → metrics on `config.eval.split`.
      schedule: step, counted from 0 → learning rate.
      steps_per_epoch: optimiser steps in an epoch.
      parameters: number of parameters.
      feature_dimension: width of the classifier's input.
      origin: describes what the initial state takes from `config.train.init_from`; empty without that.
    """

    config: ConfigDict
    inputs: Inputs
    batches: Callable[[int], Iterator[Any]]
    initial_state: Callable[[], TrainState]
    abstract_state: TrainState
    train_step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    evaluate: Callable[[Any], dict[str, Any]]
    schedule: Callable[[int], Any]
    steps_per_epoch: int
    parameters: int
    feature_dimension: int
    origin: str = ""

    @property
    def total_steps(self) -> int:
        """Number of steps in all epochs."""
        return self.config.train.num_epochs * self.steps_per_epoch


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Run:
    """Sets up a run. Nothing is compiled until a step is first called, and nothing is written.

    Args:
      config: a validated configuration.
      workdir: the working directory, which may not exist yet. If it holds checkpoints, the network keeps the
        mean colour that it was trained with.

    Raises:
      ConfigError: if a batch doesn't split over the devices, `config.train.rate_factors` names an unknown
        part, or `config.train.init_from` doesn't fit.
      DataError: if the data set is damaged, lacks a split or has too few images.
    """
    manifest = Manifest.load(config.data.dir, splits=None if config.data.on_corrupt == "stop" else ())
    config = resolve(config, manifest)
    manifest.split(config.eval.split)  # raises if there is none
    mesh = parallel.create_mesh()
    num_images = manifest.split("train").num_images
    steps_per_epoch = pipeline.steps_per_epoch(num_images, config.train.batch_size, config.train.drop_last)
    _check_batches(config, mesh, num_images)

    checkpoints = workdir / DIRECTORY
    starts_elsewhere = config.train.init_from and not steps_on_disk(checkpoints)
    source = read_source(config, parallel.replicated(mesh)) if starts_elsewhere else None
    height, width, channels = image_shape(config, manifest)
    mean_rgb = source.inputs.mean_rgb if source else _mean_rgb(config, manifest, workdir)
    inputs = Inputs(manifest.name, manifest.classes, mean_rgb, (height, width), fingerprint(manifest))

    schedule = create_schedule(config.train, steps_per_epoch)
    optimizer = create_optimizer(config.train, schedule, config.model.pixel_scale)
    model = create_model(config.model)
    images = jnp.zeros((1, height, width, channels))

    def initial_state(taken: dict[Path, Any]) -> TrainState:
        variables = merge(model.init(jax.random.key(config.seed), images), taken)
        return create_state(variables, optimizer, averaged=config.train.ema_decay > 0)

    state = jax.eval_shape(initial_state, {})
    taken, origin = choose(state.variables, source) if source else ({}, "")
    _, aux = jax.eval_shape(model.apply, state.variables, images)
    sharding = parallel.replicated(mesh)
    train_step, place = _train_step(config, inputs, optimizer, mesh)
    eval_step = create_eval_step(config, inputs, mesh)
    return Run(
        config=config,
        inputs=inputs,
        batches=functools.partial(_batches, config, inputs, place),
        initial_state=functools.partial(jax.jit(initial_state, out_shardings=sharding), taken),
        abstract_state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state),
        train_step=train_step,
        evaluate=lambda variables: evaluate_split(eval_step, variables, config, mesh),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        parameters=count_parameters(state.params),
        feature_dimension=aux["features"].shape[-1],
        origin=origin,
    )


def _mean_rgb(config: ConfigDict, manifest: Manifest, workdir: pathlib.Path) -> tuple[float, float, float]:
    """The colour that is subtracted: that of the data set, or of the one that a network was first trained on."""
    if not steps_on_disk(workdir / DIRECTORY):
        return manifest.mean_rgb
    try:
        return Inputs.load(workdir).mean_rgb
    except CheckpointError:
        if not config.train.init_from:
            return manifest.mean_rgb
        return Inputs.load(locate(config.train.init_from)[0].parent).mean_rgb


def _check_batches(config: ConfigDict, mesh: Mesh, num_images: int) -> None:
    """Raises ConfigError if a batch can't be split over devices and sub-batches, or leaves too few images a part."""
    t = config.train
    parallel.check_batch_size("train.batch_size", t.batch_size, mesh, t.sub_batches)
    parallel.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    last = 0 if t.drop_last else num_images % t.batch_size
    for size in {t.batch_size, last} - {0}:
        name = f"config.train.batch_size = {t.batch_size}"
        advice = "choose another batch size"
        if size == last:
            name += f" with config.train.drop_last = False leaves a last batch of {last} of {num_images} images, which"
            advice += ", or leave that batch out with --config.train.drop_last=True"
        if size % (mesh.size * t.sub_batches):
            over = f"{mesh.size} devices × {t.sub_batches} sub-batches"
            raise ConfigError(f"{name} doesn't split evenly over {over}; {advice}")
        normalized = size // t.sub_batches // (mesh.size if config.parallel.batch_norm == "device" else 1)
        if normalized < 2:
            raise ConfigError(
                f"{name} gives batch norm single images to take the moments of (train.sub_batches ="
                f" {t.sub_batches}, parallel.batch_norm = {config.parallel.batch_norm!r}, {mesh.size} devices);"
                f" {advice}"
            )
        if t.mixup_alpha and mesh.size > 1 and size // mesh.size % 2:
            raise ConfigError(
                f"{name} gives each of {mesh.size} devices an odd number of rows ({size // mesh.size}), but"
                f" config.train.mixup_alpha = {t.mixup_alpha} mixes them in pairs; {advice}, or set"
                " --config.train.mixup_alpha=0"
            )


def _train_step(
    config: ConfigDict, inputs: Inputs, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[Callable, Callable]:
    per_device_bn = config.parallel.batch_norm == "device"
    step = make_train_step(
        create_model(config.model, axis_name=parallel.AXIS, per_device_bn=per_device_bn),
        optimizer,
        mean_rgb=inputs.mean_rgb,
        seed=config.seed,
        balance_weight=config.train.balance_weight,
        balance_ddof=config.model.balance_ddof,
        label_smoothing=config.train.label_smoothing,
        mixup_alpha=config.train.mixup_alpha,
        ema_decay=config.train.ema_decay,
        sub_batches=config.train.sub_batches,
        axis_name=parallel.AXIS,
    )
    return parallel.compile_train_step(step, mesh, config.parallel.mode)


def _batches(config: ConfigDict, inputs: Inputs, place: Callable, start_step: int) -> Iterator[Any]:
    """Yields the batches after `start_step` steps, for ever.

    Raises:
      DataError: if a shard or record is damaged, or a process that reads the data died.
    """
    data = config.data
    iterator = pipeline.train_batches(
        data.dir,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        flip=data.flip,
        crop=create_crop(data.crop, padding=data.crop_padding, area=data.crop_area),
        padding_rgb=inputs.mean_rgb,
        image_size=data.image_size or None,
        drop_remainder=config.train.drop_last,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.num_threads,
        num_workers=data.num_workers,
        on_corrupt=data.on_corrupt,
    )
    with contextlib.closing(iterator):
        for batch in iterator:
            yield place(batch)
