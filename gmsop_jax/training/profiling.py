"""A profile of some training steps, for TensorBoard's profiler or Perfetto."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax


class StepProfiler:
    """Traces some steps into `plugins/profile` of a folder; a context manager, so that none is cut off.

    Args:
      directory: where TensorBoard looks.
      steps: that are traced; none if empty.
    """

    def __init__(self, directory: pathlib.Path, steps: range):
        self._directory, self._steps = directory, steps
        self._tracing = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def run(self, step: int, function: Callable, *args: Any) -> Any:
        """Calls `function(*args)`, traced if the step is one of those; waits for the last of them."""
        if step not in self._steps:
            return function(*args)
        if not self._tracing:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        if step == self._steps[-1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
