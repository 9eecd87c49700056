"""What a run logs: a progress line, `metrics.jsonl`, `curves.png`, and what its loggers write."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from gmsop_jax.files import read_bytes, read_object, write_atomic
from gmsop_jax.training.loggers import Logger, close_all

METRICS, RESULT = "metrics.jsonl", "result.json"
_RESULT_FIELDS = {"last_top1_error": float, "wall_seconds": float, "parameters": int, "feature_dimension": int}


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of `metrics.jsonl`, without damaged lines, such as a last one that a kill cut off."""
    file = workdir / METRICS
    records = []
    for line in read_bytes(file).splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if _is_record(record):
                records.append(record)
    return records


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Returns the contents of `result.json`, or None if the run is not finished.

    Raises:
      UserError: if the file is damaged.
    """
    file = workdir / RESULT
    if not file.exists():
        return None
    return read_object(file, _RESULT_FIELDS, "delete it, and start the run again to write it again")


def _is_record(value: Any) -> bool:
    """Whether a value has the fields and types of a record that `Writer.record` wrote."""
    if not isinstance(value, dict) or type(value.get("step")) is not int or "epoch" not in value:
        return False
    numbers = dict(value)
    kind, uses = numbers.pop("kind", None), numbers.pop("candidate_use", [])
    if not isinstance(kind, str) or not isinstance(uses, list):
        return False
    return all(type(number) in (int, float) for number in [*numbers.values(), *uses])


class Writer:
    """Logs the progress of a run, in its first process only.

    On a terminal it shows a progress bar; otherwise, as in a log file, it prints a line every few seconds.

    Args:
      workdir: the working directory, in which the files are written.
      total_steps: number of steps of the whole run.
      start_step: number of steps that are already done. Records of later steps, which were written before an
        interruption and will be computed again, are removed.
      enabled: whether this process logs anything.
      loggers: further places to log to.
    """

    SECONDS_PER_LINE = 10  # where standard error is not a terminal

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
        loggers: Sequence[Logger] = (),
    ):
        self._enabled, self._loggers = enabled, loggers
        self._total_steps, self._step = total_steps, start_step
        self._next_line = 0.0
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps,
            initial=start_step,
            unit="step",
            disable=not (enabled and terminal),
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",  # the bar takes what is left
        )
        if not enabled:
            return
        kept = [r for r in read_metrics(workdir) if r["step"] <= start_step]
        write_atomic(workdir / METRICS, "".join(json.dumps(r) + "\n" for r in kept))
        self._jsonl = (workdir / METRICS).open("a")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self._bar.close()
        if self._enabled:
            # if an error is already being raised, closing often fails for the same reason; the first error is reported
            with contextlib.suppress(Exception) if kind else contextlib.nullcontext(), contextlib.closing(self._jsonl):
                close_all(self._loggers)

    def advance(self) -> None:
        """Counts one more step."""
        self._step += 1
        self._bar.update()

    def record(self, kind: str, step: int, epoch: float, values: Mapping[str, Any]) -> None:
        """Writes one record, of kind `train` or `eval`, to `metrics.jsonl` and to the loggers."""
        if not self._enabled:
            return
        line = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
        self._jsonl.write(json.dumps(line) + "\n")
        self._jsonl.flush()
        for logger in self._loggers:
            logger.record(step, {f"{kind}/{name}": value for name, value in values.items()})

    def show(self, values: Mapping[str, float]) -> None:
        """Shows loss, error and speed on the progress line."""
        text = (
            f"loss {values['loss']:.3f}, error {values['top1_error']:.1f} %, {values['images_per_second']:.0f} images/s"
        )
        if not self._bar.disable:
            self._bar.set_postfix_str(text, refresh=False)
        elif time.monotonic() >= self._next_line:
            self.say(f"step {self._step}/{self._total_steps}: {text}")
            self._next_line = time.monotonic() + self.SECONDS_PER_LINE

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if not self._enabled:
            return
        if self._bar.disable:
            print(text, file=sys.stderr, flush=True)
        else:
            tqdm.write(text, file=sys.stderr)


@contextlib.contextmanager
def profile_steps(
    directory: pathlib.Path, steps: range
) -> Iterator[Callable[[int], contextlib.AbstractContextManager]]:
    """Yields a function that maps a step to the context to run it in, which traces it if it is one of `steps`.

    The traces are written for TensorBoard's profiler when the last of the steps, or the run, ends.
    """
    with contextlib.ExitStack() as trace:

        @contextlib.contextmanager
        def profiled(step: int) -> Iterator[None]:
            if step not in steps:
                yield
                return
            if not tracing:
                tracing.append(step)
                trace.enter_context(jax.profiler.trace(str(directory)))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                yield
            if step == steps[-1]:
                jax.block_until_ready(jax.live_arrays())
                trace.close()

        tracing: list[int] = []
        yield profiled


def plot_curves(workdir: pathlib.Path) -> None:
    """Draws loss, error, learning rate and balance loss over the epochs into `curves.png`."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read_metrics(workdir)
    panels = {
        "loss": "cross entropy [nats]",
        "top1_error": "top-1 error [%]",
        "learning_rate": "learning rate",
        "balance_loss": "balance loss",
    }
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for kind, label in (("train", "training"), ("eval", "evaluation")):
            points = [(r["epoch"], r[name]) for r in records if r["kind"] == kind and name in r]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if name == "learning_rate":
            axes.set_yscale("log")
        else:
            highest = axes.dataLim.y1  # -inf without any point
            axes.set_ylim(0, 1.05 * highest if highest > 0 else None)
    figure.axes[0].legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomic(workdir / "curves.png", buffer.getvalue())
