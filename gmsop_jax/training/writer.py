"""What a run logs: a progress line, `metrics.jsonl`, and the values that its loggers record."""

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from gmsop_jax.files import write_atomic
from gmsop_jax.training.history import METRICS, read_metrics
from gmsop_jax.training.loggers import Logger


class Writer:
    """Logs the progress of a run, in its first process only.

    On a terminal it shows a progress bar; otherwise, as in a log file, it prints a line every few seconds.

    Args:
      workdir, total_steps: the working directory and the number of steps of the whole run.
      start_step: number of steps that are already done. Records of later steps, which were written before an
        interruption and will be computed again, are removed.
      enabled: whether this process logs anything.
      loggers: further loggers, which this class does not close.
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
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}",  # the bar fills the line
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
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._jsonl.close()

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
    """Yields a function that returns, for a step, the context to run it in. The context traces the steps in `steps`.

    The trace is written for TensorBoard's profiler when the last of these steps, or the run, ends.
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
