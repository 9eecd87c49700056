"""Gathers the contents of the report and renders `page.html.jinja`."""

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

from gmsop_jax.analysis.report import charts
from gmsop_jax.analysis.report.runs import Run, configuration_table, read_runs
from gmsop_jax.analysis.report.study import Study, study_run
from gmsop_jax.errors import CheckpointError, DataError

_GALLERY = 12  # images in each gallery
_HEAVIEST = 8  # images for each candidate
_PAIRS = 10  # confused pairs of classes
_CLASSES = 60  # rows of the table of classes and candidates
_THUMBNAIL = 96  # largest side in pixels


def build_report(workdirs: Sequence[Path], *, data: Path | None = None, max_images: int = 5000) -> str:
    """Returns the report of one or several runs as HTML that needs no other file.

    Args:
      workdirs: the working directories.
      data: folder of the data set; None means that of each run's configuration. If the data set or the checkpoint of a
        run is missing, the report omits what needs it and says so.
      max_images: largest number of images of each evaluation split.

    Raises:
      CheckpointError: if a folder is not a working directory.
    """
    runs = read_runs(list(workdirs))
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
        title=" · ".join(run.name for run in runs),
        runs=runs,
        facts=_facts,
        curves=charts.curves(runs),
        configuration=configuration_table(runs),
        sections=[_section(run, data, max_images) for run in runs],
        palette=charts.PALETTE,
        style=(folder / "style.css").read_text("utf-8"),
        script=(folder / "script.js").read_text("utf-8"),
        vega=charts.script().replace("</script", "<\\/script"),
    )


def _facts(run: Run) -> list[str]:
    """The cells of a run in the table of results, in the order of its columns."""
    best, result, published = run.best or {}, run.result, run.published

    def number(values: dict[str, Any], name: str, form: str) -> str:
        return format(values[name], form) if name in values else "–"

    both = (published.top1_error, published.top5_error) if published else ()
    return [
        run.network,
        number(best, "top1_error", ".2f") + " %",
        number(best, "top5_error", ".2f") + " %",
        " / ".join("–" if error is None else f"{error:.2f} %" for error in both) or "–",
        number(best, "epoch", "g"),
        number(result, "parameters", ","),
        number(result, "feature_dimension", ","),
        format(run.images_per_second, ",.0f") if run.images_per_second else "–",
        number(result, "wall_seconds", ",.0f"),
        result.get("device", "unfinished"),
    ]


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
    """The section of one run. `study` is None if it can't be shown, and `missing` says why."""
    section: dict[str, Any] = {"run": run, "use": charts.candidate_use(run)}
    try:
        study = study_run(run.workdir, data, max_images)
    except (CheckpointError, DataError) as error:
        return section | {"study": None, "missing": str(error)}
    gated = study.gate_weights.shape[1] > 1
    return section | {
        "study": study,
        "confusion": charts.confusion(study),
        "pairs": [_pair(study, *pair) for pair in study.worst_pairs(_PAIRS)],
        "galleries": _galleries(study),
        "mixture": _mixture(study, run.config.model.num_selected) if gated else {},
    }


def _pair(study: Study, true: int, predicted: int) -> dict[str, Any]:
    rows = np.flatnonzero((study.labels == true) & (study.predicted == predicted))
    surest = rows[np.argsort(-study.confidence[rows], kind="stable")][:3]
    return {
        "true": study.classes[true],
        "predicted": study.classes[predicted],
        "count": len(rows),
        "percent": 100 * len(rows) / int(study.confusion[true].sum()),
        "cards": _cards(study, surest),
    }


def _galleries(study: Study) -> list[tuple[str, list[Card]]]:
    right = study.labels == study.predicted
    order = np.argsort(-study.confidence, kind="stable")
    chosen = (
        ("Most certain, and right", order[right[order]]),
        ("Most certain, and wrong", order[~right[order]]),
        ("Least certain", order[::-1]),
    )
    return [(title, _cards(study, rows[:_GALLERY])) for title, rows in chosen]


def _mixture(study: Study, num_selected: int) -> dict[str, Any]:
    use = study.by_class(study.gate_weights)
    # If there are many classes, show those whose use differs most from the average.
    distance = np.nan_to_num(np.abs(use - study.gate_weights.mean(0)).sum(1), nan=-1)
    rows = np.sort(np.argsort(-distance, kind="stable")[:_CLASSES])
    return {
        "use": [(study.classes[i], use[i].tolist()) for i in rows if not math.isnan(use[i, 0])],
        "scale": float(np.nanmax(use)),
        "share": study.selected.mean(0).tolist(),
        "mean": study.gate_weights.mean(0).tolist(),
        "together": charts.together(study),
        "entropy": charts.entropy(study, num_selected),
        "heaviest": [_cards(study, study.heaviest(i, _HEAVIEST)) for i in range(study.gate_weights.shape[1])],
    }


def _cards(study: Study, rows: Iterable[int]) -> list[Card]:
    cards = []
    for row in rows:
        weights = study.gate_weights[row]
        used = [i for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
        gate = [(int(i), float(weights[i])) for i in used] if len(weights) > 1 else []
        label, predicted = (study.classes[int(values[row])] for values in (study.labels, study.predicted))
        cards.append(Card(_thumbnail(study.image(row)), label, predicted, 100 * float(study.confidence[row]), gate))
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
