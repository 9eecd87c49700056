"""The training loop."""

import dataclasses
import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import CheckpointError, UserError
from gmsop_jax.files import write_atomic
from gmsop_jax.models import count_parameters
from gmsop_jax.training.checkpoint import DIRECTORY, Checkpoints, Progress, locate, steps_on_disk
from gmsop_jax.training.evaluation import evaluate_split, image_shape, resolve
from gmsop_jax.training.inputs import Inputs, fingerprint
from gmsop_jax.training.interrupt import Interrupted, SignalCatcher
from gmsop_jax.training.metrics import summarize
from gmsop_jax.training.parallel import create_mesh, first_process_does, replicated
from gmsop_jax.training.profiling import StepProfiler
from gmsop_jax.training.setup import Run, prepare
from gmsop_jax.training.step import TrainState
from gmsop_jax.training.transfer import Source, read_source
from gmsop_jax.training.workdir import Workdir
from gmsop_jax.training.writer import Writer, plot_curves

_MOST_SKIPPED = 10  # steps in a row that may be left out before the run gives up


class NonFiniteError(UserError):
    """The loss or its gradient became infinite or not a number.

    Attributes:
      step: the first where it did, counted from 1.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike[str], *, profile: range = range(0)
) -> dict[str, Any]:
    """Trains, evaluates after every epoch, and leaves the results in a folder.

    A working directory that holds checkpoints is gone on with, in this order:
      1. the data set's manifest is read;
      2. the folder is locked, and the configuration compared with its `config.json`;
      3. the shards' checksums are compared;
      4. checkpoints that are damaged are set aside;
      5. parameters, batch norm's moments, their averages and the optimiser's state are the last
         checkpoint's;
      6. data order, augmentation, gate noise, dropout and mixup go on, being functions of seed and step.

    One without starts anew, or from the network that `config.train.init_from` names.

    Args:
      config: a validated configuration.
      workdir: made if missing. In the end it holds `config.json`, `inputs.json`, `checkpoints/`,
        `metrics.jsonl`, TensorBoard events, `curves.png` and `result.json`.
      profile: steps, counted from 1, that are traced for TensorBoard's profiler.

    Returns: what `result.json` holds: errors in percent of the best and the last epoch, number of
      parameters, feature dimension, seconds.

    Raises:
      UserError: for what the user can mend, before anything slow happens; later if the folder can't be
        written to any more, or data is damaged.
      NonFiniteError: if the loss is no longer finite, and `config.train.on_nonfinite` says stop.
      Interrupted: after Ctrl-C or SIGTERM, once the state is saved.
    """
    started = time.monotonic()
    checked = None if config.data.on_corrupt == "stop" else ()  # splits whose shards must be whole
    manifest = Manifest.load(config.data.dir, splits=checked)
    config = resolve(config, manifest)
    source = _source(config, pathlib.Path(workdir))
    inputs = _inputs(config, manifest, pathlib.Path(workdir), source)
    run = prepare(config, manifest, inputs.mean_rgb, source)
    with Workdir(workdir, config) as folder, folder.explaining_errors():
        if config.data.verify:
            Manifest.load(config.data.dir, verify_checksums=True, splits=checked)
        first_process_does(lambda: inputs.save(folder.path))
        with Checkpoints(folder.path / DIRECTORY, keep=config.checkpoint.keep) as checkpoints:
            progress = _train(run, folder, checkpoints, started, profile)
            checkpoints.wait()
            result = _result(run, checkpoints, progress)
        if jax.process_index() == 0:
            plot_curves(folder.path)
            write_atomic(folder.path / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def _source(config: ConfigDict, workdir: pathlib.Path) -> Source | None:
    """The network that a new run starts from; None for a run that goes on."""
    if not config.train.init_from or steps_on_disk(workdir / DIRECTORY):
        return None
    return read_source(config, replicated(create_mesh()))


def _inputs(config: ConfigDict, manifest: Manifest, workdir: pathlib.Path, source: Source | None) -> Inputs:
    """The data set's; but a network that was trained before knows pixels less the mean colour of then."""
    height, width, _ = image_shape(config, manifest)
    inputs = Inputs(manifest.name, manifest.classes, manifest.mean_rgb, (height, width), fingerprint(manifest))
    if source:
        return dataclasses.replace(inputs, mean_rgb=source.inputs.mean_rgb)
    if not steps_on_disk(workdir / DIRECTORY):
        return inputs
    try:
        known = Inputs.load(workdir)
    except CheckpointError:
        if not config.train.init_from:
            return inputs
        known = Inputs.load(locate(config.train.init_from)[0].parent)
    return dataclasses.replace(inputs, mean_rgb=known.mean_rgb)


def _train(run: Run, workdir: Workdir, checkpoints: Checkpoints, started: float, profile: range) -> Progress:
    """Trains from the last checkpoint to the end, and again after each rollback."""
    skipped: set[int] = set()
    for line in checkpoints.set_aside:
        print(line, file=sys.stderr)
    while True:
        state, progress = _last_state(run, checkpoints)
        skipped |= set(progress.skipped)
        progress = dataclasses.replace(progress, skipped=tuple(sorted(skipped)))
        if progress.step >= run.total_steps:
            return progress
        try:
            return _loop(run, state, progress, workdir, checkpoints, started, profile)
        except NonFiniteError as error:
            before = range(error.step - _MOST_SKIPPED, error.step)
            if run.config.train.on_nonfinite == "stop" or skipped.issuperset(before):
                raise
            skipped.add(error.step)
            started = time.monotonic()


def _last_state(run: Run, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
    if checkpoints.latest_step is None:
        if run.origin and jax.process_index() == 0:
            print(run.origin, file=sys.stderr)
        return run.initial_state(), Progress(0, 0, 0.0)
    return checkpoints.restore(run.abstract_state, checkpoints.latest_step)


def _loop(
    run: Run,
    state: TrainState,
    progress: Progress,
    workdir: Workdir,
    checkpoints: Checkpoints,
    started: float,
    profile: range,
) -> Progress:
    config = run.config
    told = _Told(run, checkpoints)

    def where(step: int) -> Progress:
        seconds = progress.wall_seconds + time.monotonic() - started
        return Progress(step, step // run.steps_per_epoch, seconds, progress.skipped)

    writer = Writer(
        workdir.path, total_steps=run.total_steps, start_step=progress.step, enabled=jax.process_index() == 0
    )
    with writer, SignalCatcher() as signals, StepProfiler(workdir.path, profile) as profiler:
        writer.describe(configs.to_json(config))
        _announce(writer, progress, workdir.path)
        for step, batch in enumerate(run.batches(progress.step), progress.step + 1):
            if step in progress.skipped:
                state = state.replace(step=state.step + 1)
            else:
                state, metrics = profiler.run(step, run.train_step, state, batch, run.batch_size(step))
                told.add(step, metrics)
            if step == progress.step + 1:
                jax.block_until_ready(state)
                told.restart_clock()
                writer.say(f"first step after {time.monotonic() - started:.1f} s")
            writer.advance()
            signal = signals.caught(step)
            epoch_ends = step % run.steps_per_epoch == 0
            save = config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0
            if (epoch_ends or save or signal or step % config.train.log_every_steps == 0) and told.anything:
                values = told.collect()
                writer.record("train", step, step / run.steps_per_epoch, values)
                writer.show(values)
            evaluation = None
            if epoch_ends:
                evaluation = evaluate_split(run.eval_step, state.evaluated, config, run.mesh)
                writer.record("eval", step, step / run.steps_per_epoch, evaluation)
                writer.say(_epoch_line(step // run.steps_per_epoch, config, evaluation))
            if epoch_ends or save or signal:
                workdir.check()
                checkpoints.save(state, where(step), evaluation)
                told.restart_clock()
            if signal and step < run.total_steps:
                checkpoints.wait()
                raise Interrupted(signal, step)
            if step == run.total_steps:
                break
    return where(run.total_steps)


def _announce(writer: Writer, progress: Progress, workdir: pathlib.Path) -> None:
    if progress.step:
        writer.say(f"going on from step {progress.step} in {workdir}")
    if progress.skipped:
        steps = ", ".join(map(str, progress.skipped))
        writer.say(f"leaving out the update of steps whose loss was not finite: {steps}")


class _Told:
    """Metrics of the steps since they were last told; they stay on the device until then."""

    _AHEAD = 2  # steps that the host may be ahead of the device

    def __init__(self, run: Run, checkpoints: Checkpoints):
        self._run, self._checkpoints = run, checkpoints
        self._steps: list[int] = []
        self._metrics: list[dict[str, jax.Array]] = []
        self._timed_from = (time.monotonic(), 0)

    def restart_clock(self) -> None:
        """Leaves what happened until now out of the speed."""
        self._timed_from = (time.monotonic(), len(self._metrics))

    @property
    def anything(self) -> bool:
        """Whether there is a step that was not told."""
        return bool(self._steps)

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
            " config.train.learning_rates and start in a new --workdir, or go on without that step's batch with"
            " --config.train.on_nonfinite=rollback",
            step,
        )


def _epoch_line(epoch: int, config: ConfigDict, evaluation: dict[str, float]) -> str:
    return (
        f"epoch {epoch:{len(str(config.train.num_epochs))}}/{config.train.num_epochs}:"
        f" {config.eval.split} top-1 error {evaluation['top1_error']:.2f} %,"
        f" top-5 {evaluation['top5_error']:.2f} %, loss {evaluation['loss']:.4f}"
    )


def _result(run: Run, checkpoints: Checkpoints, progress: Progress) -> dict[str, Any]:
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
        "parameters": count_parameters(run.abstract_state.params),
        "feature_dimension": run.feature_dimension,
        "wall_seconds": round(progress.wall_seconds, 1),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }
