"""Metrics as sums and counts, which can be added over steps and devices; the host computes ratios from them."""

import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gmsop_jax.errors import UserError


class NonFiniteError(UserError):
    """The loss, its gradient or the state became infinite or NaN, or the loss exceeded `divergence.MAX_LOSS`.

    Attributes:
      step: the first step where this was detected, counted from 1.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def count_errors(
    logits: Float[Array, "b classes"], labels: Int[Array, "b"], mask: Bool[Array, "b"] | None = None
) -> dict[str, Int[Array, ""]]:
    """Counts the top-1 and top-5 errors of a batch.

    If logits are equal, the class with the lower index ranks first. With at most five classes, the label is always
    among the first five. A row with an infinite or NaN logit counts as an error.

    Returns: `top1_errors`, `top5_errors` and `count`, leaving out the rows that `mask` marks as padding.

    Example:
      >>> count_errors(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0]))["top1_errors"]
      Array(1, dtype=int32)
    """
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & lower), axis=-1)
    finite = jnp.isfinite(logits).all(axis=-1)
    return {
        "top1_errors": jnp.sum(mask & ~(finite & (rank < 1))),
        "top5_errors": jnp.sum(mask & ~(finite & (rank < 5))),
        "count": jnp.sum(mask),
    }


def add_up(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds the metrics of several steps, in order and in float64.

    A total can be added to later steps; the result is the same as if all steps were added at once.

    Returns: the sum of each metric as floats (or lists of floats), and the number of `steps`.
    """
    total: dict[str, np.ndarray] = {}
    for step in sums:
        for name, value in {"steps": 1, **step}.items():
            total[name] = total.get(name, np.float64(0)) + np.asarray(value, np.float64)
    return {name: value.tolist() for name, value in total.items()}


def summarize(sums: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Computes ratios from the sums of some steps.

    Args:
      sums: `loss_sum`, `top1_errors`, `top5_errors`, `count` and optionally `gate_weight_sum` [n] of each
        step or total of steps (`add_up`); any other metric is averaged over the steps.

    Returns: `loss` (nats per image), `top1_error` and `top5_error` (percent), `candidate_use` (list of
      n mean gate weights), and the averages.

    Raises:
      ValueError: if there are no images.
    """
    total = add_up(sums)
    count, steps = total.pop("count", 0), total.pop("steps", 0)
    if not count:
        raise ValueError("there are no images to compute metrics of")
    ratios: dict[str, Any] = {"loss": total.pop("loss_sum") / count}
    ratios["top1_error"] = 100 * total.pop("top1_errors") / count
    ratios["top5_error"] = 100 * total.pop("top5_errors") / count
    if "gate_weight_sum" in total:
        ratios["candidate_use"] = [weight / count for weight in total.pop("gate_weight_sum")]
    return ratios | {name: value / steps for name, value in total.items()}


def error_text(values: Mapping[str, float], num_classes: int) -> str:
    """Formats the errors; with at most five classes, without the top-5 error, which is then always 0.

    Example:
      >>> error_text({"top1_error": 8.0, "top5_error": 0.15}, num_classes=10)
      'top-1 error 8.00 %, top-5 error 0.15 %'
    """
    ranks = (1, 5) if num_classes > 5 else (1,)
    return ", ".join(f"top-{rank} error {values[f'top{rank}_error']:.2f} %" for rank in ranks)


def check_metrics(step: int, metrics: Mapping[str, np.ndarray]) -> None:
    """Raises NonFiniteError unless the loss and the gradient of a step are finite."""
    names = {"loss_sum": "the loss", "balance_loss": "the balance loss", "grad_norm": "the norm of the gradient"}
    bad = [shown for name, shown in names.items() if not np.isfinite(metrics[name])]
    if bad:
        raise NonFiniteError(f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} not finite at step {step}", step)


class MetricsBuffer:
    """Training metrics since the last record.

    The metrics of a step stay on the device until `drain`, so that the host does not wait for each step.
    The host runs at most `MAX_STEPS_AHEAD` steps ahead of the device.

    Attributes:
      total: `add_up` of the steps that were drained since the last record.
    """

    MAX_STEPS_AHEAD = 2

    def __init__(self, total: Mapping[str, Any]):
        self.total = dict(total)
        self._steps: list[tuple[int, dict[str, Array]]] = []
        self._clock = time.monotonic()

    def add(self, step: int, metrics: dict[str, Array]) -> None:
        """Keeps the metrics of a step, which may still be running."""
        self._steps.append((step, metrics))
        if len(self._steps) > self.MAX_STEPS_AHEAD:
            jax.block_until_ready(self._steps[-1 - self.MAX_STEPS_AHEAD])

    def restart_clock(self) -> None:
        """Excludes the time since the last `drain` from the speed; to be called when the buffer is empty."""
        self._clock = time.monotonic()

    def drain(self) -> float:
        """Adds all steps to `total`, and returns the images per second since the last `drain` or `restart_clock`.

        Raises:
          NonFiniteError: if the loss or the gradient of a step is not finite.
        """
        steps = jax.device_get(self._steps)
        for step, metrics in steps:
            check_metrics(step, metrics)
        done = [metrics for _, metrics in steps]
        images = sum(int(metrics["count"]) for metrics in done)
        seconds = max(time.monotonic() - self._clock, 1e-9)
        self.total = add_up([self.total, *done] if self.total else done)
        self._steps = []
        self.restart_clock()
        return images / seconds

    def summarize(self) -> dict[str, Any]:
        """Returns ratios over the drained steps and resets them; returns an empty dict if no step was drained."""
        total, self.total = self.total, {}
        return summarize([total]) if total else {}
