"""The training loop."""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gmsop_jax import config as configs
from gmsop_jax import parallel
from gmsop_jax.checkpoint import DIRECTORY, Checkpoints, Progress
from gmsop_jax.config import ConfigDict
from gmsop_jax.data import pipeline
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import CheckpointError, ConfigError, UserError
from gmsop_jax.evaluate import evaluate_split, image_shape, resolve
from gmsop_jax.inputs import Inputs
from gmsop_jax.interrupt import Interrupted, SignalCatcher
from gmsop_jax.metrics import summarize
from gmsop_jax.models import count_parameters, create_model
from gmsop_jax.optimizer import create_optimizer, piecewise_schedule
from gmsop_jax.profiling import StepProfiler
from gmsop_jax.train_step import TrainState, create_state, make_eval_step, make_train_step
from gmsop_jax.writer import Writer, plot_curves, write_atomic


class NonFiniteError(UserError):
    """The loss or its gradient became infinite or not a number."""


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike[str], *, profile: range = range(0)
) -> dict[str, Any]:
    """Trains, evaluates after every epoch, and leaves the results in a folder.

    A working directory that holds checkpoints is gone on with, in this order:
      1. the data set's manifest is read, and its shards' checksums compared;
      2. the configuration is compared with the folder's `config.json`;
      3. parameters are initialised from the seed, then replaced, with batch norm's moments and the
         optimiser's state, by the last checkpoint's;
      4. data order, augmentation, gate noise and dropout go on, being functions of seed and step.

    Args:
      config: a validated configuration.
      workdir: made if missing. In the end it holds `config.json`, `inputs.json`, `checkpoints/`,
        `metrics.jsonl`, TensorBoard events, `curves.png` and `result.json`.
      profile: steps, counted from 1, that are traced for TensorBoard's profiler.

    Returns: what `result.json` holds: errors in percent of the best and the last epoch, number of
      parameters, feature dimension, seconds.

    Raises:
      UserError: for what the user can mend, before anything slow happens.
      NonFiniteError: if the loss is no longer finite.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    workdir = pathlib.Path(workdir).absolute()
    manifest = Manifest.load(config.data.dir, config.data.verify)
    config = resolve(config, manifest)
    mesh = parallel.create_mesh()
    parallel.check_batch_size("train.batch_size", config.train.batch_size, mesh)
    parallel.check_batch_size("eval.batch_size", config.eval.batch_size, mesh)
    run = _prepare(config, manifest, mesh)
    _open_workdir(workdir, config)
    if jax.process_index() == 0:
        height, width, _ = image_shape(config, manifest)
        Inputs(manifest.name, manifest.classes, manifest.mean_rgb, (height, width)).save(workdir)
    with Checkpoints(workdir / DIRECTORY, keep=config.checkpoint.keep) as checkpoints:
        state, progress = run.initial_state, Progress(0, 0, 0.0)
        if checkpoints.latest_step is not None:
            state, progress = checkpoints.restore(state, checkpoints.latest_step)
        if progress.step < run.total_steps:
            state, progress = _loop(run, state, progress, workdir, checkpoints, started, profile)
        checkpoints.wait()
        result = _result(run, checkpoints, progress)
    if jax.process_index() == 0:
        plot_curves(workdir)
        write_atomic(workdir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


@dataclasses.dataclass(frozen=True)
class _Run:
    """What stays the same over a run."""

    config: ConfigDict
    mesh: jax.sharding.Mesh
    initial_state: TrainState
    train_step: Callable
    eval_step: Callable
    schedule: Callable[[int], Any]
    steps_per_epoch: int
    feature_dimension: int

    @property
    def total_steps(self) -> int:
        return self.config.train.num_epochs * self.steps_per_epoch


def _prepare(config: ConfigDict, manifest: Manifest, mesh: jax.sharding.Mesh) -> _Run:
    model = create_model(config.model)
    steps_per_epoch = pipeline.steps_per_epoch(
        manifest.split("train").num_images, config.train.batch_size, config.train.drop_last
    )
    manifest.split(config.eval.split)
    schedule = piecewise_schedule(config.train.learning_rates, steps_per_epoch)
    optimizer = create_optimizer(
        schedule,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        pixel_scale=config.model.pixel_scale,
    )
    train_step = make_train_step(
        model,
        optimizer,
        mean_rgb=manifest.mean_rgb,
        balance_weight=config.train.balance_weight,
        seed=config.seed,
    )
    images = jnp.zeros((1, *image_shape(config, manifest)))
    variables = jax.jit(model.init)(jax.random.key(config.seed), images)
    _, aux = jax.eval_shape(model.apply, variables, images)
    return _Run(
        config=config,
        mesh=mesh,
        initial_state=parallel.replicate(create_state(variables, optimizer), mesh),
        train_step=parallel.jit_train_step(train_step, mesh),
        eval_step=parallel.jit_eval_step(make_eval_step(model, mean_rgb=manifest.mean_rgb), mesh),
        schedule=schedule,
        steps_per_epoch=steps_per_epoch,
        feature_dimension=aux["features"].shape[-1],
    )


def _open_workdir(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the folder, or checks that it belongs to this configuration; leaves `config.json` there."""
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if file.exists():
            lines = configs.differences(configs.from_json(file.read_text()), config)
            if lines:
                raise CheckpointError(
                    f"{workdir} was made with another configuration:\n  "
                    + "\n  ".join(lines)
                    + "\nname another --workdir, or set these fields back"
                )
        elif jax.process_index() == 0:
            write_atomic(file, configs.to_json(config) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"can't write to the working directory {workdir} ({error.strerror}); name another --workdir"
        ) from error
    except (ConfigError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); name another --workdir") from error


def _loop(
    run: _Run,
    state: TrainState,
    progress: Progress,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    started: float,
    profile: range,
) -> tuple[TrainState, Progress]:
    config = run.config
    told = _Told(run, checkpoints)

    def where(step: int) -> Progress:
        seconds = progress.wall_seconds + time.monotonic() - started
        return Progress(step, step // run.steps_per_epoch, seconds)

    writer = Writer(
        workdir,
        total_steps=run.total_steps,
        start_step=progress.step,
        enabled=jax.process_index() == 0,
    )
    with writer, SignalCatcher() as signals, StepProfiler(workdir, profile) as profiler:
        writer.describe(configs.to_json(config))
        if progress.step:
            writer.say(f"going on from step {progress.step} in {workdir}")
        batches = _train_batches(config, progress.step)
        for step, batch in enumerate(batches, progress.step + 1):
            batch = parallel.place_batch(batch, run.mesh)
            state, metrics = profiler.run(step, run.train_step, state, batch)
            told.add(step, metrics)
            if step == progress.step + 1:
                jax.block_until_ready(metrics)
                told.restart_clock()
                writer.say(f"first step after {time.monotonic() - started:.1f} s")
            writer.advance()
            epoch_ends = step % run.steps_per_epoch == 0
            save = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            if epoch_ends or save or signals.caught or step % config.train.log_every_steps == 0:
                values = told.collect()
                writer.record("train", step, step / run.steps_per_epoch, values)
                writer.show(values)
            evaluation = None
            if epoch_ends:
                evaluation = evaluate_split(run.eval_step, state.variables, config, run.mesh)
                writer.record("eval", step, step / run.steps_per_epoch, evaluation)
                writer.say(_epoch_line(step // run.steps_per_epoch, config, evaluation))
            if epoch_ends or save or signals.caught:
                checkpoints.save(state, where(step), evaluation)
                told.restart_clock()
            if signals.caught and step < run.total_steps:
                checkpoints.wait()
                raise Interrupted(signals.caught, step)
            if step == run.total_steps:
                break
    return state, where(run.total_steps)


def _train_batches(config: ConfigDict, start_step: int) -> Iterator[dict[str, np.ndarray]]:
    return pipeline.train_batches(
        config.data.dir,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        flip=config.data.flip,
        image_size=config.data.image_size or None,
        drop_remainder=config.train.drop_last,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
    )


class _Told:
    """Metrics of the steps since they were last told; they stay on the device until then."""

    _AHEAD = 2  # steps that the host may be ahead of the device

    def __init__(self, run: _Run, checkpoints: Checkpoints):
        self._run, self._checkpoints = run, checkpoints
        self._steps: list[int] = []
        self._metrics: list[dict[str, jax.Array]] = []
        self._timed_from = (time.monotonic(), 0)

    def restart_clock(self) -> None:
        """Leaves what happened until now out of the speed."""
        self._timed_from = (time.monotonic(), len(self._metrics))

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self._steps.append(step)
        self._metrics.append(metrics)
        if len(self._metrics) > self._AHEAD:
            jax.block_until_ready(self._metrics[-1 - self._AHEAD])

    def collect(self) -> dict[str, float]:
        """Ratios over the steps since the last call, with learning rate and images per second."""
        steps, sums = self._steps, jax.device_get(self._metrics)
        for step, values in zip(steps, sums, strict=True):
            self._check_finite(step, values)
        start, done_before = self._timed_from
        seconds = max(time.monotonic() - start, 1e-9)
        images = sum(int(values["count"]) for values in sums[done_before:])
        self._steps, self._metrics = [], []
        self.restart_clock()
        return summarize(sums) | {
            "learning_rate": float(self._run.schedule(steps[-1] - 1)),
            "images_per_second": images / seconds,
        }

    def _check_finite(self, step: int, values: dict[str, np.ndarray]) -> None:
        bad = [name for name in ("loss_sum", "balance_loss", "grad_norm") if not np.isfinite(values[name])]
        if not bad:
            return
        self._checkpoints.wait()
        last = self._checkpoints.latest_step
        good = f"the last good checkpoint is step {last}" if last is not None else "none was saved yet"
        rate = float(self._run.schedule(step - 1))
        raise NonFiniteError(
            f"{' and '.join(bad)} not finite at step {step} ({good}). Likely causes: a learning rate too"
            f" high for this network (now {rate:g}), float16-sized numbers under"
            f" config.compute_dtype={self._run.config.compute_dtype!r}, or damaged images; lower"
            " config.train.learning_rates and start in a new --workdir"
        )


def _epoch_line(epoch: int, config: ConfigDict, evaluation: dict[str, float]) -> str:
    return (
        f"epoch {epoch:{len(str(config.train.num_epochs))}}/{config.train.num_epochs}:"
        f" {config.eval.split} top-1 error {evaluation['top1_error']:.2f} %,"
        f" top-5 {evaluation['top5_error']:.2f} %, loss {evaluation['loss']:.4f}"
    )


def _result(run: _Run, checkpoints: Checkpoints, progress: Progress) -> dict[str, Any]:
    best_step = checkpoints.best_step
    best = checkpoints.metrics(best_step) if best_step is not None else None
    last = checkpoints.metrics(progress.step)
    assert best  # the last epoch was evaluated
    assert last  # and kept
    return {
        "top1_error": best["top1_error"],
        "top5_error": best["top5_error"],
        "best_step": best_step,
        "last_top1_error": last["top1_error"],
        "last_top5_error": last["top5_error"],
        "step": progress.step,
        "parameters": count_parameters(run.initial_state.params),
        "feature_dimension": run.feature_dimension,
        "wall_seconds": round(progress.wall_seconds, 1),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }
