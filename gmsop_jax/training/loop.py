"""The training loop."""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import ConfigError
from gmsop_jax.files import write_json
from gmsop_jax.training.checkpoint import Checkpoints, Progress
from gmsop_jax.training.divergence import check_evaluation, check_state, explain, step_to_skip
from gmsop_jax.training.evaluation import COMPILING, verify_shards
from gmsop_jax.training.history import RESULT, plot_curves
from gmsop_jax.training.interrupt import Interrupted, SignalCatcher
from gmsop_jax.training.layout import DIRECTORY
from gmsop_jax.training.loggers import find_backends, open_loggers
from gmsop_jax.training.metrics import MetricsBuffer, NonFiniteError, error_text
from gmsop_jax.training.processes import check_same, ending_together, first_process_does
from gmsop_jax.training.setup import Run, prepare
from gmsop_jax.training.step import TrainState
from gmsop_jax.training.workdir import Workdir, check_path, check_same_config
from gmsop_jax.training.writer import Writer, profile_steps


@ending_together()
def train_and_evaluate(
    config: ConfigDict, workdir: str | os.PathLike[str], *, profile: range = range(0)
) -> dict[str, Any]:
    """Trains a network, evaluates it after every epoch, and writes the results into a working directory.

    If the working directory already contains checkpoints, training resumes from the latest one:
      1. The run is set up (`setup.prepare`).
      2. The directory is locked, and the configuration is compared with its `config.json`.
      3. The checksums of the shards are verified; each process verifies a part of them.
      4. Damaged checkpoints are moved out of the way.
      5. Parameters, batch statistics, their averages and the optimiser's state are restored.
      6. The data order, augmentation, gate noise, dropout and mixup continue where they were, because they are
         functions of the seed and the step.

    Otherwise it starts from random parameters, or from the network that `config.train.init_from` names.

    A resumed run computes the same numbers as an uninterrupted one, bit for bit, on the same machine with the
    same software and the same number of devices. On GPUs, this requires XLA's deterministic kernels, which
    `parallel.compiler_options` selects (except in mode `pmap`, where XLA_FLAGS must select them).

    Args:
      config: a validated configuration.
      workdir: created if it does not exist. After training, it contains `config.json`, `inputs.json`, `checkpoints/`,
        `metrics.jsonl`, the files of the loggers, `curves.png` and `result.json`.
      profile: the steps to trace for TensorBoard's profiler, counted from 1.

    Returns: the contents of `result.json`: the last step, its errors in percent, the lowest top-1 error of all epochs
      and its step, number of classes and parameters, feature dimension, seconds, and devices.

    Raises:
      UserError: if the configuration, the data set or the directory is invalid, before anything slow happens; or later,
        if the directory can no longer be written to or data are damaged.
      NonFiniteError: if the loss is no longer finite and `config.train.on_nonfinite` is `stop`, or rolling
        back does not help.
      Interrupted: after Ctrl-C, SIGTERM or SIGHUP, once the state is saved.
    """
    started = time.monotonic()
    check_same_config(config)
    check_path(workdir)
    find_backends(config.log.backends)
    run = prepare(config, pathlib.Path(workdir))
    with Workdir(workdir, run.config) as folder, folder.explaining_errors():
        check_same({f"the data set's {name}": value for name, value in run.inputs.properties().items()})
        verify_shards(run.config.data, run.manifest)
        first_process_does(lambda: run.inputs.save(folder.path))
        with Checkpoints(folder.path / DIRECTORY, keep=config.checkpoint.keep) as checkpoints:
            progress = _train(run, folder, checkpoints, profile, started)
            checkpoints.wait()
            result = _result(run, checkpoints, progress)
        if jax.process_index() == 0:
            plot_curves(folder.path)
            write_json(folder.path / RESULT, result)
    return result


def _train(run: Run, workdir: Workdir, checkpoints: Checkpoints, profile: range, started: float) -> Progress:
    """Trains to the end, resuming from the last checkpoint at the start and after each rollback."""
    _say(*checkpoints.set_aside)
    skipped: set[int] = set()
    with SignalCatcher() as signals:
        while True:
            state, progress = _restore(run, workdir, checkpoints)
            skipped |= set(progress.skipped)
            if progress.step == run.total_steps:
                _say(f"the run in {workdir.path} is finished: step {progress.step} of {run.total_steps} was reached")
                return progress
            progress = dataclasses.replace(progress, skipped=tuple(sorted(skipped)))
            try:
                return _loop(run, state, progress, workdir, checkpoints, signals, profile, started)
            except NonFiniteError as error:
                checkpoints.wait()
                last = checkpoints.latest_step
                may_skip = run.config.train.on_nonfinite == "rollback"
                step = step_to_skip(error, skipped, last or 0) if may_skip else None
                if step is None:
                    learning_rate = float(run.schedule(error.step - 1))
                    raise NonFiniteError(explain(error, run.config, learning_rate, last), error.step) from error
                _say(f"{error}; rolling back to step {last or 0} to skip the update of step {step}")
                skipped.add(step)
                started = time.monotonic()


def _restore(run: Run, workdir: Workdir, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
    """Returns the state of the last checkpoint, or the initial state if no checkpoint exists."""
    step = checkpoints.latest_step
    if step is None:
        _say(*filter(None, [run.origin]))
        return run.initial_state(), Progress(0, 0, 0.0)
    if step > run.total_steps:
        raise ConfigError(
            f"config.train.num_epochs = {run.config.train.num_epochs} ends at step {run.total_steps}, but"
            f" {workdir.path} already contains a checkpoint of step {step}; set --config.train.num_epochs="
            f"{-(-step // run.steps_per_epoch)} or more, or give another --workdir"
        )
    return checkpoints.restore(run.abstract_state, step)


def _loop(
    run: Run,
    state: TrainState,
    start: Progress,
    workdir: Workdir,
    checkpoints: Checkpoints,
    signals: SignalCatcher,
    profile: range,
    started: float,
) -> Progress:
    """Trains from `start` to the last step."""
    config, buffer, trained = run.config, MetricsBuffer(start.pending), None

    def progress(step: int) -> Progress:
        seconds = start.wall_seconds + time.monotonic() - started
        return Progress(step, step // run.steps_per_epoch, seconds, start.skipped, buffer.total)

    with _open_writer(run, start, workdir.path) as writer, profile_steps(workdir.path, profile) as profiled:
        _announce(writer, start, workdir.path)
        steps = range(start.step + 1, run.total_steps + 1)
        for step, batch in zip(steps, run.batches(start.step), strict=False):
            if step in start.skipped:
                state = state.replace(step=state.step + 1)
            else:
                with profiled(step):
                    state, metrics = run.train_step(state, batch)
                buffer.add(step, metrics)
                trained = step, batch
            if step == start.step + 1:
                jax.block_until_ready(state)
                buffer.drain()
                writer.say(f"first step after {time.monotonic() - started:.1f} s")
            writer.advance()

            epoch_ends = step % run.steps_per_epoch == 0
            signal, every_steps = signals.caught(step), config.checkpoint.every_steps
            save = epoch_ends or signal or (every_steps and step % every_steps == 0)
            record = epoch_ends or step % config.train.log_every_steps == 0
            speed = buffer.drain() if save or record else 0.0
            if save and trained:
                check_state(state, trained[0], run.train_step, trained[1])
            if record and (values := buffer.summarize()):
                values |= {"learning_rate": float(run.schedule(step - 1)), "images_per_second": speed}
                writer.record("train", step, step / run.steps_per_epoch, values)
                writer.show(values)
            is_first = step <= start.step + run.steps_per_epoch
            evaluation = _evaluate(run, state, step, writer, is_first) if epoch_ends else None
            if save:
                workdir.check()
                checkpoints.save(state, progress(step), evaluation)
                buffer.restart_clock()
            if signal and step < run.total_steps:
                checkpoints.wait()
                raise Interrupted(signal, step)
    return progress(run.total_steps)


def _evaluate(run: Run, state: TrainState, step: int, writer: Writer, is_first: bool) -> dict[str, Any]:
    """Evaluates the state at the end of an epoch, and logs and returns the result."""
    if is_first:
        writer.say(COMPILING)
    evaluation = run.evaluate(state.evaluated)
    check_evaluation(step, evaluation)
    epoch, epochs, split = step // run.steps_per_epoch, run.config.train.num_epochs, run.config.eval.split
    writer.record("eval", step, step / run.steps_per_epoch, evaluation)
    writer.say(
        f"epoch {epoch:{len(str(epochs))}}/{epochs}: {split} {error_text(evaluation, run.config.model.num_classes)},"
        f" loss {evaluation['loss']:.4f}"
    )
    return evaluation


@contextlib.contextmanager
def _open_writer(run: Run, start: Progress, workdir: pathlib.Path) -> Iterator[Writer]:
    """Opens the writer of a run, with its loggers in the first process."""
    first = jax.process_index() == 0
    opened = open_loggers(run.config, workdir, start.step) if first else contextlib.nullcontext(())
    steps = {"total_steps": run.total_steps, "start_step": start.step}
    with opened as loggers, Writer(workdir, loggers=loggers, enabled=first, **steps) as writer:
        yield writer


def _say(*lines: str) -> None:
    """Prints lines to the standard error of the first process."""
    if jax.process_index() == 0:
        for line in lines:
            print(line, file=sys.stderr)


def _announce(writer: Writer, start: Progress, workdir: pathlib.Path) -> None:
    if start.step:
        writer.say(f"resuming from step {start.step} in {workdir}")
    if start.skipped:
        steps = ", ".join(map(str, start.skipped))
        writer.say(f"skipping the updates of steps whose loss was not finite: {steps}")
    writer.say("XLA is compiling the training step, which takes minutes for large networks")


def _result(run: Run, checkpoints: Checkpoints, progress: Progress) -> dict[str, Any]:
    """Returns the contents of `result.json`."""
    best_step = checkpoints.best_step
    assert best_step is not None  # a finished run was evaluated at the end of its last epoch
    best, last = checkpoints.metrics(best_step), checkpoints.metrics(progress.step)
    assert best
    assert last
    return {
        "last_top1_error": last["top1_error"],
        "last_top5_error": last["top5_error"],
        "step": progress.step,
        "best_top1_error": best["top1_error"],
        "best_step": best_step,
        "num_classes": run.config.model.num_classes,
        "parameters": run.parameters,
        "feature_dimension": run.feature_dimension,
        "wall_seconds": round(progress.wall_seconds, 1),
        "device": f"{jax.device_count()} × {jax.devices()[0].device_kind}",
    }
