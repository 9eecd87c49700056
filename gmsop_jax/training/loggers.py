"""Loggers of a run's metrics, besides `metrics.jsonl`: TensorBoard, Weights & Biases, Trackio, or your own.

`config.log.backends` lists them. To log elsewhere, write a class with the methods of `Logger`, and list it as
`module:Class`.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import secrets
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from gmsop_jax.config import LOG_BACKENDS, ConfigDict
from gmsop_jax.errors import ConfigError, UserError
from gmsop_jax.files import read_bytes, write_atomic

Values = Mapping[str, float | Sequence[float]]


class Logger(Protocol):
    """Logs the metrics of a run. It is used in the first process only.

    Args:
      workdir: the working directory of the run.
      config: the resolved configuration, as nested dictionaries.
      start_step: number of steps that are already done. Later steps that were logged before an interruption are logged
        again.
    """

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int) -> None: ...

    def record(self, step: int, values: Values) -> None:
        """Logs the values of a step: `train/loss`, `eval/top1_error`, …. Lists have one value for each candidate."""

    def close(self) -> None:
        """Writes pending data. Called when the run ends, is interrupted, or fails."""


class TensorBoard:
    """A `Logger` that writes `events.out.tfevents.*` into the working directory."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        # not tensorboardX's SummaryWriter, because if the disk is full, its thread dies and this one waits forever
        self._events = EventsWriter(str(workdir / "events"), f".{start_step}")
        if start_step:  # TensorBoard discards the events of later steps
            self._add(start_step + 1, session_log=SessionLog(status=SessionLog.START))
        text = textwrap.indent(json.dumps(config, indent=2), "    ")  # indented text is not formatted as Markdown
        self._add(0, summary=summary.text("config", text))
        self._events.flush()

    def record(self, step: int, values: Values) -> None:
        """Logs scalars, and lists as bar charts."""
        for name, value in values.items():
            if not isinstance(value, Sequence):
                self._add(step, summary=summary.scalar(name, value))
            elif len(value) > 1:  # without a gate there is one weight, always 1
                bars = _draw_bars(value, name.rpartition("/")[2])
                self._add(step, summary=summary.image(name, bars, dataformats="HWC"))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))


class _Service:
    """What the loggers of two packages with the same interface share."""

    _run: Any

    def record(self, step: int, values: Values) -> None:
        """Logs scalars; the values of a list are numbered."""
        self._run.log(_numbered(values), step=step)

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class WandB(_Service):
    """A `Logger` for Weights & Biases. Its environment variables, such as WANDB_PROJECT and WANDB_MODE, apply."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        import wandb  # pyright: ignore[reportMissingImports]

        name = "/".join(workdir.absolute().parts[-2:])
        self._run = wandb.init(dir=str(workdir), config=dict(config), name=name, id=_run_id(workdir), resume="allow")


class Trackio(_Service):
    """A `Logger` for Trackio. The environment variable TRACKIO_PROJECT names the project (default: gmsop_jax)."""

    def __init__(self, workdir: pathlib.Path, config: Mapping[str, Any], start_step: int):
        import trackio  # pyright: ignore[reportMissingImports]

        project = os.environ.get("TRACKIO_PROJECT", "gmsop_jax")
        name = f"{workdir.absolute().name}-{_run_id(workdir)}"
        self._run = trackio.init(project=project, name=name, config=dict(config), resume="allow", embed=False)


_BACKENDS: dict[str, type[Logger]] = dict(zip(LOG_BACKENDS, (TensorBoard, WandB, Trackio), strict=True))


def find_backends(names: Sequence[str]) -> list[type[Logger]]:
    """Returns the classes that `config.log.backends` names.

    Raises:
      ConfigError: if a package is not installed, or there is no such class.
    """
    return [_find(name) for name in names]


def _find(name: str) -> type[Logger]:
    if name in _BACKENDS:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(f"config.log.backends names {name!r}, which needs: pip install 'gmsop-jax[{name}]'")
        return _BACKENDS[name]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"config.log.backends names {name!r}, which can't be imported ({error}); is its folder in PYTHONPATH?"
        ) from error


@contextlib.contextmanager
def open_loggers(config: ConfigDict, workdir: pathlib.Path, start_step: int) -> Iterator[list[Logger]]:
    """Creates the loggers that `config.log.backends` names, and closes them on leaving.

    If the block raises, closing often fails for the same reason, so errors of closing are not reported.

    Args: as in `Logger`.

    Raises:
      ConfigError: see `find_backends`.
      UserError: if a logger can't start, for example without an account.
    """
    names, loggers = config.log.backends, []
    try:
        for name, backend in zip(names, find_backends(names), strict=True):
            loggers.append(_start(name, backend, workdir, config, start_step))
        yield loggers
    except BaseException:
        with contextlib.suppress(Exception):
            _close_all(loggers)
        raise
    _close_all(loggers)


def _start(name: str, backend: type[Logger], workdir: pathlib.Path, config: ConfigDict, start_step: int) -> Logger:
    try:
        return backend(workdir, config.to_dict(), start_step)
    except Exception as error:  # each library raises its own errors
        if name == "tensorboard" and isinstance(error, OSError):  # explained by `Workdir.explaining_errors`
            raise
        raise UserError(
            f"the logger {name!r} of config.log.backends can't start ({type(error).__name__}: {error}); fix this, or"
            " remove it from config.log.backends"
        ) from error


def _close_all(loggers: Sequence[Logger]) -> None:
    """Closes every logger, even if closing another one fails, and then raises that error."""
    with contextlib.ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.close)


def _run_id(workdir: pathlib.Path) -> str:
    """Returns an identifier that stays the same when the run is resumed."""
    file = workdir / "run_id"
    if not file.exists():
        write_atomic(file, secrets.token_hex(4))
    return read_bytes(file).decode()


def _numbered(values: Values) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for name, value in values.items():
        scalars |= {f"{name}/{i}": x for i, x in enumerate(value)} if isinstance(value, Sequence) else {name: value}
    return scalars


def _draw_bars(values: Sequence[float], title: str) -> np.ndarray:
    """Draws a bar chart, uint8 [h, w, 3], of one bar for each value, with their mean as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 2.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(range(len(values)), values)
    axes.axhline(float(np.mean(values)), color="black", linewidth=0.8, linestyle="--")
    axes.set(title=title.replace("_", " "), xticks=range(len(values)))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
