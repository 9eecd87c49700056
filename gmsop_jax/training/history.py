"""The history of a run: reads `metrics.jsonl` and `result.json`, and draws `curves.png`."""

import contextlib
import io
import json
import pathlib
from typing import Any

from gmsop_jax.files import read_bytes, read_object, write_atomic

METRICS, RESULT = "metrics.jsonl", "result.json"
_RESULT_FIELDS = {"last_top1_error": float, "wall_seconds": float, "parameters": int, "feature_dimension": int}


def read_metrics(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of `metrics.jsonl`, without damaged lines, such as an incomplete last one."""
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
    return read_object(file, _RESULT_FIELDS, "delete it, and start the run again to recreate it")


def _is_record(value: Any) -> bool:
    """Whether a value has the fields and types of a record that `Writer.record` wrote."""
    if not isinstance(value, dict) or type(value.get("step")) is not int or "epoch" not in value:
        return False
    numbers = dict(value)
    kind, uses = numbers.pop("kind", None), numbers.pop("candidate_use", [])
    if not isinstance(kind, str) or not isinstance(uses, list):
        return False
    return all(type(number) in (int, float) for number in [*numbers.values(), *uses])


def plot_curves(workdir: pathlib.Path) -> None:
    """Draws loss, error, learning rate and balance loss over the epochs into `curves.png`."""
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
