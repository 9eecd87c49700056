"""Collects the contents of the report and renders `page.html.jinja`."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from gmsop_jax.analysis.report import charts, findings
from gmsop_jax.analysis.report.predictions import Predictions, predict_split
from gmsop_jax.analysis.report.runs import Run, configuration_table, group_by_data, read_runs
from gmsop_jax.analysis.report.significance import (
    LEVEL,
    class_information,
    permutation_test,
    significant_pairs,
    stands_out,
    variance_between_classes,
)
from gmsop_jax.errors import CheckpointError, DataError

_GALLERY = 12  # images in each gallery
_HEAVIEST = 8  # images for each candidate
_PAIRS = 10  # confused pairs of classes
_CLASSES = 60  # rows of the table of classes and candidates
_MISSING = "–"  # a value that a run does not have
_TITLE = 60  # maximum length of a title that lists the names of the runs
_THUMBNAIL = 96  # largest side in pixels


def build_report(workdirs: Sequence[Path], *, data: Path | None = None, max_images: int = 5000) -> str:
    """Returns the report of one or more runs as self-contained HTML.

    Args:
      workdirs: the working directories.
      data: folder of the data set; None means that of each run's configuration. If the data set or the checkpoint of a
        run is missing, the report omits what needs it and says so.
      max_images: maximum number of images of each evaluation split.

    Raises:
      UserError: if a folder is not a working directory, or a file in it is damaged.
    """
    groups = group_by_data(read_runs(workdirs))
    runs = [run for group in groups for run in group]
    title = " · ".join(run.name for run in runs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gmsop_jax.analysis.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["json"] = _safe_json
    folder = Path(__file__).parent
    return environment.get_template("page.html.jinja").render(
        title=title if len(runs) == 1 or len(title) <= _TITLE else f"{len(runs)} runs",
        runs=runs,
        groups=[
            {"data": group[0].data, "runs": group, "facts": _facts(group), "curves": charts.curves(group)}
            for group in groups
        ],
        configuration=configuration_table(runs),
        sections=[_section(run, data, max_images) for run in runs],
        palette=charts.PALETTE,
        style=(folder / "style.css").read_text("utf-8"),
        script=(folder / "script.js").read_text("utf-8"),
        vega=charts.script().replace("</script", "<\\/script"),
    )


def _facts(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The columns of the table of results: a cell for each run. Columns without any value are left out."""
    rows = [_facts_of(run) for run in runs]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {name: cells for name, cells in columns.items() if set(cells) != {_MISSING}}


def _facts_of(run: Run) -> dict[str, str]:
    last, result, published = run.last, run.result, run.published

    def number(values: dict[str, Any], name: str, form: str, unit: str = "") -> str:
        return format(values[name], form) + unit if name in values else _MISSING

    both = (published.top1_error, published.top5_error) if published else ()
    top5_says_something = len(run.inputs.classes) > 5
    return {
        "network": run.network,
        "top-1 error": number(last, "top1_error", ".2f", " %"),
        "top-5 error": number(last, "top5_error", ".2f", " %") if top5_says_something else _MISSING,
        "published": " / ".join(_MISSING if error is None else f"{error:.2f} %" for error in both) or _MISSING,
        "epoch": number(last, "epoch", "g"),
        "training images": f"{int(run.training_images):,}" if run.training_images else _MISSING,
        "parameters": number(result, "parameters", ","),
        "dimension": number(result, "feature_dimension", ","),
        "images/s": format(run.images_per_second, ",.0f") if run.images_per_second else _MISSING,
        "seconds": number(result, "wall_seconds", ",.0f"),
        "device": result.get("device", "unfinished"),
    }


def _safe_json(value: Any) -> str:
    """JSON that can be placed in a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


@dataclasses.dataclass(frozen=True)
class Card:
    """An image with its prediction; `gate` lists (candidate, weight) in descending order of weight."""

    source: str
    label: str
    predicted: str
    percent: float
    gate: list[tuple[int, float]]


def _section(run: Run, data: Path | None, max_images: int) -> dict[str, Any]:
    """The section of one run. `predictions` is None if they can't be shown, and `missing` says why."""
    section: dict[str, Any] = {"run": run, "use": charts.candidate_use(run)}
    try:
        predictions = predict_split(run.workdir, data, max_images)
    except (CheckpointError, DataError) as error:
        return section | {"predictions": None, "missing": str(error)}
    num_selected = run.config.model.num_selected
    return section | {
        "predictions": predictions,
        "findings": findings.describe(predictions, num_selected),
        "confusion": charts.confusion(predictions),
        "pairs": [_pair(predictions, *pair) for pair in significant_pairs(predictions.confusion)[:_PAIRS]],
        "galleries": _galleries(predictions),
        "mixture": _mixture(predictions, num_selected) if predictions.errors else {},
    }


def _pair(predictions: Predictions, true: int, predicted: int) -> dict[str, Any]:
    rows = np.flatnonzero((predictions.labels == true) & (predictions.predicted == predicted))
    surest = rows[np.argsort(-predictions.confidence[rows], kind="stable")][:3]
    return {
        "true": predictions.classes[true],
        "predicted": predictions.classes[predicted],
        "count": len(rows),
        "percent": 100 * len(rows) / int(predictions.confusion[true].sum()),
        "cards": _cards(predictions, surest),
    }


def _galleries(predictions: Predictions) -> list[tuple[str, list[Card]]]:
    """Galleries of images ranked by the probability of their prediction; empty if the ranking is not above noise."""
    right = predictions.labels == predictions.predicted
    order = np.argsort(-predictions.confidence, kind="stable")
    chosen = (
        ("Most confident, correct", order[right[order]]),
        ("Most confident, wrong", order[~right[order]]),
        ("Least confident", order[::-1]),
    )
    return [
        (title, _ranked(predictions, predictions.confidence, predictions.mirrored_confidence, rows, _GALLERY))
        for title, rows in chosen
    ]


def _ranked(
    predictions: Predictions, values: np.ndarray, mirrored: np.ndarray, rows: np.ndarray, count: int
) -> list[Card]:
    """The cards of the first ranked images; none if they do not stand out from the other images."""
    place = np.arange(min(count, len(rows)))
    return _cards(predictions, rows[place]) if stands_out(values[rows], mirrored[rows], place) else []


def _mixture(predictions: Predictions, num_selected: int) -> dict[str, Any]:
    weights, errors = predictions.gate_weights, predictions.errors
    assert errors is not None
    use = predictions.by_class(weights)
    # If there are many classes, show those whose use differs most from the average.
    distance = np.nan_to_num(np.abs(use - weights.mean(0)).sum(1), nan=-1)
    rows = np.sort(np.argsort(-distance, kind="stable")[:_CLASSES])
    specialised = permutation_test(class_information, weights, predictions.labels)[2] <= LEVEL
    uneven = permutation_test(variance_between_classes, predictions.entropy, predictions.labels)[2] <= LEVEL
    candidates = [
        {
            "alone": 100 * errors.alone[i].mean(),
            "without": findings.change(errors.without[i], errors.gate),
            "uses": ", ".join(f"{name} {lift:.1f}" for name, lift in used[:3]) or "–",
        }
        for i, used in enumerate(findings.uses(predictions))
    ]
    return {
        "use": [(predictions.classes[i], use[i].tolist()) for i in rows if specialised and not math.isnan(use[i, 0])],
        "scale": float(np.nanmax(use)),
        "share": predictions.selected.mean(0).tolist(),
        "mean": weights.mean(0).tolist(),
        "candidates": candidates,
        "top_k": charts.error_by_selected(errors, num_selected),
        "together": charts.together(predictions),
        "entropy": charts.entropy(predictions, num_selected) if uneven else None,
        "heaviest": [_heaviest(predictions, i) for i in range(weights.shape[1])],
    }


def _heaviest(predictions: Predictions, candidate: int) -> list[Card]:
    """The images with the largest weights for a candidate, among those that select it both as they are and mirrored."""
    weights, mirrored = predictions.gate_weights[:, candidate], predictions.mirrored_weights[:, candidate]
    order = np.argsort(-weights, kind="stable")
    rows = order[(weights[order] > 0) & (mirrored[order] > 0)]
    return _ranked(predictions, weights, mirrored, rows, _HEAVIEST)


def _cards(predictions: Predictions, rows: Iterable[int]) -> list[Card]:
    cards = []
    for row in rows:
        weights = predictions.gate_weights[row]
        used = [i for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
        gate = [(int(i), float(weights[i])) for i in used] if len(weights) > 1 else []
        label, predicted = (
            predictions.classes[int(values[row])] for values in (predictions.labels, predictions.predicted)
        )
        percent = 100 * float(predictions.confidence[row])
        cards.append(Card(_thumbnail(predictions.image(row)), label, predicted, percent, gate))
    return cards


def _thumbnail(image: np.ndarray) -> str:
    """A small JPEG of the image as a data URI."""
    picture = Image.fromarray(image)
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    if (image == image[..., :1]).all():
        picture = picture.convert("L")
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
