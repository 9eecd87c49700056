"""Sets up a run: creates, from the configuration, the data, state, steps and schedule that the loop needs."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gmsop_jax.config import ConfigDict
from gmsop_jax.data import pipeline
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import CheckpointError
from gmsop_jax.models import count_parameters, create_model
from gmsop_jax.training import parallel
from gmsop_jax.training.evaluation import create_evaluation, resolve
from gmsop_jax.training.inputs import Inputs, fingerprint
from gmsop_jax.training.layout import DIRECTORY, steps_on_disk
from gmsop_jax.training.optimizer import create_optimizer, create_schedule
from gmsop_jax.training.step import TrainState, create_state, make_train_step
from gmsop_jax.training.transfer import Path, choose, merge, read_mean_rgb, read_source


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the training loop needs.

    Attributes:
      config: the configuration, with the data set's number of classes filled in.
      inputs: the properties of the data set on which the network depends.
      batches: maps the number of steps that are done to an endless iterator over the batches of the following steps,
        in the form that `train_step` takes.
      initial_state: creates the state before the first step.
      abstract_state: shapes, dtypes and shardings of the state.
      train_step: (state, batch) → (state, metrics); donates the state's memory.
      evaluate: variables → metrics on `config.eval.split`.
      schedule: step, counted from 0 → learning rate.
      parameters: number of parameters.
      feature_dimension: width of the classifier's input.
      origin: describes what is copied from `config.train.init_from` to the initial state; empty without that.
    """

    config: ConfigDict
    manifest: Manifest
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
      workdir: the working directory, which may not exist yet. If it contains checkpoints, the network keeps the
        mean colour that it was trained with.

    Raises:
      ConfigError: if a batch doesn't split over the devices, `config.model.num_classes` is not that of the data set,
        `config.train.rate_factors` names an unknown part, or `config.train.init_from` doesn't fit.
      DataError: if the data set is damaged, lacks a split or has too few images.
      FileAccessError: if one of its files can't be opened.
    """
    manifest = Manifest.load(config.data.dir, splits=None if config.data.on_corrupt == "stop" else ())
    image_size = manifest.image_size(config.eval.split, config.data.image_size)
    num_images = manifest.split("train").num_images
    steps_per_epoch = pipeline.steps_per_epoch(num_images, config.train.batch_size, config.train.drop_last)
    mesh = parallel.create_mesh()
    parallel.check_train_batches(config.train, config.parallel.batch_norm, num_images, mesh)
    sharding = parallel.replicated(mesh)

    resumes, init_from = bool(steps_on_disk(workdir / DIRECTORY)), config.train.init_from
    source = read_source(init_from, config.model.pixel_scale, sharding) if init_from and not resumes else None
    mean_rgb = _stored_mean_rgb(workdir, init_from) if resumes else None
    mean_rgb = mean_rgb or (source or manifest).mean_rgb
    inputs = Inputs(manifest.name, manifest.classes, mean_rgb, image_size, fingerprint(manifest))
    config = resolve(config, manifest)
    evaluate = create_evaluation(config, manifest, mean_rgb, mesh)

    schedule = create_schedule(config.train, steps_per_epoch)
    optimizer = create_optimizer(config.train, schedule, config.model.pixel_scale)
    model = create_model(config.model)
    images = jnp.zeros((1, *image_size, 3))

    def initial_state(taken: dict[Path, Any]) -> TrainState:
        variables = merge(model.init(jax.random.key(config.seed), images), taken)
        return create_state(variables, optimizer, averaged=config.train.ema_decay > 0)

    state = jax.eval_shape(initial_state, {})
    taken, origin = choose(state.variables, source) if source else ({}, "")
    _, aux = jax.eval_shape(model.apply, state.variables, images)
    step = make_train_step(
        create_model(config.model, axis_name=parallel.AXIS, per_device_bn=config.parallel.batch_norm == "device"),
        optimizer,
        config.train,
        seed=config.seed,
        mean_rgb=mean_rgb,
        balance_ddof=config.model.balance_ddof,
        axis_name=parallel.AXIS,
    )
    train_step, place = parallel.compile_train_step(step, mesh, config.parallel.mode)
    return Run(
        config=config,
        manifest=manifest,
        inputs=inputs,
        batches=functools.partial(_batches, config, manifest, mean_rgb, place),
        initial_state=functools.partial(_compile_initialization(initial_state, sharding), taken),
        abstract_state=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state),
        train_step=train_step,
        evaluate=evaluate,
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        parameters=count_parameters(state.params),
        feature_dimension=aux["features"].shape[-1],
        origin=origin,
    )


def _stored_mean_rgb(workdir: pathlib.Path, init_from: str) -> tuple[float, float, float] | None:
    """Returns the mean colour of a resumed run, or None if `inputs.json` is lost and `init_from` is not set."""
    with contextlib.suppress(CheckpointError):
        return Inputs.load(workdir).mean_rgb
    return read_mean_rgb(init_from) if init_from else None


def _batches(
    config: ConfigDict, manifest: Manifest, mean_rgb: Sequence[float], place: Callable, start_step: int
) -> Iterator[Any]:
    """Yields the batches after `start_step` steps indefinitely, as `place` returns them."""
    iterator = pipeline.train_batches(
        config.data,
        config.train,
        manifest,
        seed=config.seed,
        start_step=start_step,
        padding_rgb=mean_rgb,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    with contextlib.closing(iterator):
        yield from map(place, iterator)


def _compile_initialization(initial_state: Callable, sharding: Any) -> Callable:
    """Compiles with fewer optimisations on a CPU, because the program runs only once and computes the same values."""
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(initial_state, out_shardings=sharding, compiler_options=options)
