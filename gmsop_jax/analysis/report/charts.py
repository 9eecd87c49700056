"""Charts in Vega-Lite, each as a specification and as an SVG for browsers without JavaScript."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import vl_convert

from gmsop_jax.analysis.report.gate_errors import GateErrors
from gmsop_jax.analysis.report.predictions import Predictions
from gmsop_jax.analysis.report.runs import Run
from gmsop_jax.analysis.report.significance import proportion_interval

Spec = dict[str, Any]

PALETTE = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#8a8a86",
    "#a0cbe8", "#ffbe7d", "#ff9d9a", "#86bcb6", "#8cd17d", "#b6992d", "#d4a6c8", "#d37295", "#d7b5a6", "#499894",
)  # fmt: skip
_POINTS = 400  # per line; more can't be distinguished
_WIDTH = 520  # pixels of a chart, where the page does not adapt it
_VERSION = "v6.1"

# Text and rules use the text colour of the page, so that they suit its light and its dark scheme.
_CONFIG: Spec = {
    "background": None,
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "domainColor": "currentColor",
        "tickColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15, "titleFontWeight": "normal",
    },
    "legend": {
        "labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal", "labelLimit": 400,
        "layout": {"top": {"direction": "vertical", "anchor": "start"}},
    },
    "title": {"color": "currentColor", "anchor": "start", "fontSize": 13},
    "range": {"category": list(PALETTE)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart as a picture, and as a Vega-Lite specification, from which the page draws an interactive chart."""

    title: str
    svg: str
    spec: Spec


def _chart(title: str, values: list[Spec], spec: Spec) -> Chart:
    whole = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": _CONFIG,
        "data": {"values": values},
        "height": 220,
        "autosize": {"type": "fit-x", "contains": "padding"},
        **spec,
    }
    svg = vl_convert.vegalite_to_svg({**whole, "width": _WIDTH}, vl_version=_VERSION)
    return Chart(title, svg, {**whole, "width": "container"})


@functools.cache
def script() -> str:
    """Vega, Vega-Lite and vega-embed in one script, which sets `window.vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VERSION)


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Loss, error, learning rate, balance loss and speed over the epochs. Each chart shows all runs that logged it."""
    panels = (
        ("loss", "Cross entropy", "nats per image", "linear"),
        ("top1_error", "Top-1 error", "%", "linear"),
        ("learning_rate", "Learning rate", "", "log"),
        ("balance_loss", "Balance loss", "", "linear"),
        ("images_per_second", "Throughput", "images/s", "linear"),
    )
    charts = []
    for name, title, unit, scale in panels:
        shown = [run for run in runs if run.is_gated or name != "balance_loss"]
        points = [point for run in shown for point in _points(run, name, positive=scale == "log")]
        if points:
            y: Spec = {"field": "value", "title": unit or None, "scale": {"type": scale}}
            if scale == "log":
                y["axis"] = {"tickCount": 4, "format": "~g", "labelOverlap": True}
            charts.append(_line_chart(title, points, y, {"field": "run" if len(runs) > 1 else "on", "title": None}))
    return charts


def _points(run: Run, name: str, positive: bool) -> list[Spec]:
    """The logged values of a metric in training and in evaluation, at most `_POINTS` of each."""
    points: list[Spec] = []
    for kind, label in (("train", "training"), ("eval", "evaluation")):
        records = [r for r in run.records if r["kind"] == kind and name in r and (r[name] > 0 or not positive)]
        if len(records) > _POINTS:
            records = [records[i] for i in np.linspace(0, len(records) - 1, _POINTS).round().astype(int)]
        points += [{"epoch": r["epoch"], "value": r[name], "on": label, "run": run.name} for r in records]
    return points


def _line_chart(title: str, points: list[Spec], y: Spec, colour: Spec) -> Chart:
    """A value over the epochs, with one line per colour. A click on the legend highlights one of them."""
    min_step = int(max(point["epoch"] for point in points) >= 2)
    encoding: Spec = {
        "x": {"field": "epoch", "type": "quantitative", "axis": {"format": "~g", "tickMinStep": min_step}},
        "y": {"type": "quantitative", **y},
        "tooltip": [{"field": name} for name in points[0] if name != y["field"]]
        + [{"field": y["field"], "type": "quantitative", "format": ".4g"}],
    }
    spec: Spec = {"mark": {"type": "line", "point": {"size": 14, "filled": True}}, "encoding": encoding}
    top = {"orient": "top"}
    names = {str(point[colour["field"]]) for point in points}
    if len(names) > 1:
        columns = max(1, _WIDTH // (6 * max(map(len, names)) + 35))
        encoding["color"] = {"type": "nominal", "sort": None, "legend": {**top, "columns": columns}, **colour}
        encoding["opacity"] = {"condition": {"param": "shown", "value": 1}, "value": 0.1}
        selection = {"type": "point", "fields": [colour["field"]]}
        spec["params"] = [{"name": "shown", "select": selection, "bind": "legend"}]
    if colour["field"] == "run" and len({point["on"] for point in points}) > 1:
        dash = {"domain": ["training", "evaluation"], "range": [[1, 0], [4, 3]]}
        legend = {**top, "symbolType": "stroke"}
        encoding["strokeDash"] = {"field": "on", "scale": dash, "title": None, "legend": legend}
    return _chart(title, points, spec)


def candidate_use(run: Run) -> Chart | None:
    """The mean gate weight of each candidate at each evaluation, or None if the run did not log any."""
    evaluations = [r for r in run.records if r["kind"] == "eval" and len(r.get("candidate_use", ())) > 1]
    points = [
        {"epoch": record["epoch"], "candidate": i, "use": use}
        for record in evaluations
        for i, use in enumerate(record["candidate_use"])
    ]
    if not points:
        return None
    count = len(evaluations[0]["candidate_use"])
    scale = {"domain": list(range(count)), "range": [PALETTE[i % len(PALETTE)] for i in range(count)]}
    legend = {"orient": "top", "columns": 8, "symbolType": "square"}
    colour = {"field": "candidate", "scale": scale, "legend": legend}
    use = {"field": "use", "title": "mean gate weight"}
    return _line_chart("Use of each candidate over training", points, use, colour)


def _heat_map(title: str, cells: list[Spec], x: str, y: str, size: int, labelled: bool, angle: int = 0) -> Chart:
    """A matrix whose cells are more opaque for a larger `percent`, which suits any background."""
    opacity = {"field": "percent", "type": "quantitative", "legend": None, "scale": {"range": [0, 1]}}
    mark = {"type": "rect", "color": "#2f7ed8", "tooltip": {"content": "data"}}
    layers: list[Spec] = [{"mark": mark, "encoding": {"opacity": opacity}}]
    if labelled:
        text = {"field": "text", "type": "nominal"}
        layers.append({"mark": {"type": "text", "fill": "currentColor", "fontSize": 10}, "encoding": {"text": text}})
    axes = {x: {"orient": "top", "labelAngle": angle, "grid": False}, y: {"grid": False, "labelLimit": 110}}
    encoding = {
        channel: {"field": field, "type": "nominal", "sort": None, "axis": axes[field]}
        for channel, field in (("x", x), ("y", y))
    }
    height = max(120, size * len({cell[y] for cell in cells}))
    return _chart(title, cells, {"height": height, "encoding": encoding, "layer": layers})


def confusion(predictions: Predictions, most: int = 30) -> Chart:
    """The percentage of each true class (row) that is predicted as each class; at most `most` classes."""
    counts = predictions.confusion
    errors = counts.sum(1) - np.diag(counts)
    chosen = np.sort(np.argsort(-errors, kind="stable")[:most])
    labelled = len(chosen) <= 12
    cells = []
    for i, j in itertools.product(chosen, chosen):
        share = 100 * int(counts[i, j]) / max(int(counts[i].sum()), 1)
        row = {"true": predictions.classes[i], "predicted": predictions.classes[j], "percent": round(share, 1)}
        cells.append({**row, "images": int(counts[i, j]), "text": f"{share:.0f}" if share >= 0.5 else ""})
    title = "Confusion, % of the true class"
    if len(chosen) < len(predictions.classes):
        title += f": the {len(chosen)} classes with the most errors"
    return _heat_map(title, cells, "predicted", "true", 26 if labelled else 16, labelled, angle=-60)


def together(predictions: Predictions) -> Chart:
    """The percentage of the images selecting a candidate (row) that also select another one (column)."""
    cells = [
        {"candidate": str(i), "with": str(j), "percent": round(100 * float(share), 1), "text": f"{100 * share:.0f}"}
        for (i, j), share in np.ndenumerate(predictions.together)
        if not math.isnan(share)
    ]
    title = "Candidates that are selected together, % of the row's images"
    return _heat_map(title, cells, "with", "candidate", 26, len(predictions.together) <= 16)


def error_by_selected(errors: GateErrors, num_selected: int) -> Chart:
    """The error for each number of selected candidates, with 95 % intervals."""
    points = []
    for k, wrong in enumerate(errors.top_k, 1):
        low, high = proportion_interval(int(wrong.sum()), len(wrong))
        trained = "as trained" if k == num_selected else "other"
        points.append({"K": k, "error": 100 * float(wrong.mean()), "low": low, "high": high, "on": trained})
    axis = {"values": [point["K"] for point in points], "format": "d", "grid": False}
    x: Spec = {"field": "K", "type": "quantitative", "axis": axis, "scale": {"domain": [0.5, len(points) + 0.5]}}
    y: Spec = {"type": "quantitative", "scale": {"zero": False}, "title": "top-1 error, %"}
    scale = {"domain": ["as trained", "other"], "range": [PALETTE[1], PALETTE[0]]}
    colour = {"field": "on", "type": "nominal", "scale": scale, "legend": None}
    layers = [
        {
            "mark": {"type": "rule", "color": PALETTE[0]},
            "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1, "tooltip": {"content": "data"}},
            "encoding": {"y": {**y, "field": "error"}, "color": colour},
        },
    ]
    title = f"Error if the gate selects K candidates (trained with {num_selected})"
    return _chart(title, points, {"encoding": {"x": x}, "layer": layers})


def entropy(predictions: Predictions, num_selected: int, most: int = 40) -> Chart:
    """The mean entropy of the gate weights by class, in ascending order; of many classes, the lowest and highest."""
    values = predictions.by_class(predictions.entropy)
    order = [int(i) for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
    maximum = math.log2(num_selected)
    title = f"Gate entropy by class (equal weights: {maximum:.2f} bits)"
    if len(order) > most:
        title += f": the {most // 2} lowest and the {most // 2} highest"
        order = order[: most // 2] + order[-most // 2 :]
    bars = [{"class": predictions.classes[i], "bits": round(float(values[i]), 4)} for i in order]
    return _chart(
        title,
        bars,
        {
            "height": 18 * len(bars),
            "mark": {"type": "bar", "color": PALETTE[0], "height": {"band": 0.7}, "tooltip": {"content": "data"}},
            "encoding": {
                "y": {"field": "class", "type": "nominal", "sort": None, "title": None, "axis": {"labelLimit": 110}},
                "x": {"field": "bits", "type": "quantitative", "scale": {"domain": [0, max(maximum, 0.1)]}},
            },
        },
    )
