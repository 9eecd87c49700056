"""Charts in Vega-Lite, each as a specification and as an SVG for readers without JavaScript."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import vl_convert

from gmsop_jax.analysis.report.runs import Run
from gmsop_jax.analysis.report.study import Study

Spec = dict[str, Any]

PALETTE = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#8a8a86",
    "#a0cbe8", "#ffbe7d", "#ff9d9a", "#86bcb6", "#8cd17d", "#b6992d", "#d4a6c8", "#d37295", "#d7b5a6", "#499894",
)  # fmt: skip
_POINTS = 400  # per line; more cannot be distinguished
_VERSION = "v6.1"

# Text and rules have the colour of the page, so that they suit light and dark pages.
_CONFIG: Spec = {
    "background": None,
    "view": {"stroke": None},
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "domainColor": "currentColor",
        "tickColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15, "titleFontWeight": "normal",
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"},
    "title": {"color": "currentColor", "anchor": "start", "fontSize": 13},
    "range": {"category": list(PALETTE)},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart for the page.

    Attributes:
      title: above it.
      svg: its picture.
      spec: its Vega-Lite specification, which may be made interactive.
    """

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
    svg = vl_convert.vegalite_to_svg({**whole, "width": 520}, vl_version=_VERSION)
    return Chart(title, svg, {**whole, "width": "container"})


def script() -> str:
    """Vega, Vega-Lite and vega-embed in one script, which sets `window.vegaEmbed`."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VERSION)


def _thin(points: list[Spec]) -> list[Spec]:
    if len(points) <= _POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, _POINTS).round().astype(int)]


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Loss, error, learning rate, balance loss and speed over the epochs; each chart shows all runs."""
    panels = (
        ("loss", "Cross entropy", "nats per image", "linear"),
        ("top1_error", "Top-1 error", "%", "linear"),
        ("learning_rate", "Learning rate", "", "log"),
        ("balance_loss", "Balance loss", "", "linear"),
        ("images_per_second", "Throughput", "images/s", "linear"),
    )
    charts = []
    for name, title, unit, scale in panels:
        points: list[Spec] = []
        for run in runs:
            for kind, label in (("train", "training"), ("eval", "evaluation")):
                records = [r for r in run.records if r["kind"] == kind and name in r]
                records = [r for r in records if scale != "log" or r[name] > 0]
                points += _thin(
                    [{"epoch": r["epoch"], "value": r[name], "on": label, "run": run.name} for r in records]
                )
        if points:
            charts.append(_chart(title, points, _lines(unit, scale, len(runs) > 1, {p["on"] for p in points})))
    return charts


def _lines(unit: str, scale: str, several: bool, kinds: set[str]) -> Spec:
    colour = "run" if several else "on"
    encoding: Spec = {
        "x": {"field": "epoch", "type": "quantitative", "title": "epoch"},
        "y": {"field": "value", "type": "quantitative", "title": unit or None, "scale": {"type": scale}},
        "tooltip": [{"field": name} for name in ("run", "on", "epoch")]
        + [{"field": "value", "type": "quantitative", "format": ".4g"}],
    }
    if scale == "log":
        encoding["y"]["axis"] = {"tickCount": 4, "format": "~g", "labelOverlap": True}
    if several or len(kinds) > 1:
        encoding["color"] = {"field": colour, "type": "nominal", "title": None, "legend": {"orient": "top"}}
        encoding["opacity"] = {"condition": {"param": "shown", "value": 1}, "value": 0.1}
    if several and len(kinds) > 1:
        dash = {"domain": ["training", "evaluation"], "range": [[1, 0], [4, 3]]}
        encoding["strokeDash"] = {"field": "on", "scale": dash, "title": None, "legend": {"orient": "top"}}
    spec: Spec = {"mark": {"type": "line", "point": {"size": 14, "filled": True}}, "encoding": encoding}
    if "opacity" in encoding:
        spec["params"] = [{"name": "shown", "select": {"type": "point", "fields": [colour]}, "bind": "legend"}]
    return spec


def candidate_use(run: Run) -> Chart | None:
    """The mean gate weight of each candidate at each evaluation; None for a run without a gate."""
    points: list[Spec] = []
    evaluations = [r for r in run.records if r["kind"] == "eval" and len(r.get("candidate_use", ())) > 1]
    for record in evaluations:
        for i, use in enumerate(record["candidate_use"]):
            points.append({"epoch": record["epoch"], "candidate": i, "use": use})
    if not points:
        return None
    count = len(evaluations[0]["candidate_use"])
    colour = {"domain": list(range(count)), "range": [PALETTE[i % len(PALETTE)] for i in range(count)]}
    return _chart(
        "Use of each candidate over training",
        points,
        {
            "mark": {"type": "line", "point": {"size": 14, "filled": True}},
            "params": [{"name": "shown", "select": {"type": "point", "fields": ["candidate"]}, "bind": "legend"}],
            "encoding": {
                "x": {"field": "epoch", "type": "quantitative"},
                "y": {"field": "use", "type": "quantitative", "title": "mean gate weight"},
                "color": {
                    "field": "candidate", "type": "nominal", "scale": colour,
                    "legend": {"orient": "top", "columns": 8, "symbolType": "square"},
                },
                "opacity": {"condition": {"param": "shown", "value": 1}, "value": 0.1},
                "tooltip": [{"field": "candidate"}, {"field": "epoch"}, {"field": "use", "format": ".4f"}],
            },
        },
    )  # fmt: skip


def _heat_map(title: str, cells: list[Spec], x: Spec, y: Spec, value: str, size: int, labelled: bool) -> Chart:
    """A matrix in which the opacity of a cell shows its value, on any background."""
    axes = {"type": "nominal", "sort": None}
    encoding = {
        "x": {**axes, **x, "axis": {"orient": "top", "labelAngle": x.get("angle", 0), "grid": False}},
        "y": {**axes, **y, "axis": {"grid": False, "labelLimit": 110}},
    }
    encoding["x"].pop("angle", None)
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "color": "#2f7ed8", "tooltip": {"content": "data"}},
            "encoding": {
                "opacity": {"field": value, "type": "quantitative", "legend": None, "scale": {"range": [0, 1]}}
            },
        }
    ]
    if labelled:
        text = {"field": "text", "type": "nominal"}
        layers.append({"mark": {"type": "text", "fill": "currentColor", "fontSize": 10}, "encoding": {"text": text}})
    rows = len({cell[y["field"]] for cell in cells})
    return _chart(title, cells, {"height": max(120, size * rows), "encoding": encoding, "layer": layers})


def confusion(study: Study, most: int = 30) -> Chart:
    """The share of each true class (row) predicted as each class; if there are many, only the most confused."""
    counts = study.confusion
    errors = counts.sum(1) - np.diag(counts)
    chosen = np.sort(np.argsort(-errors, kind="stable")[:most])
    cells = []
    for i in chosen:
        total = int(counts[i].sum())
        for j in chosen:
            share = 100 * int(counts[i, j]) / max(total, 1)
            text = f"{share:.0f}" if share >= 0.5 else ""
            row = {"true": study.classes[i], "predicted": study.classes[j], "percent": round(share, 1)}
            cells.append({**row, "images": int(counts[i, j]), "text": text})
    title = "Confusion, % of the true class"
    if len(chosen) < len(study.classes):
        title += f": the {len(chosen)} classes with the most errors"
    x, y = {"field": "predicted", "angle": -60}, {"field": "true"}
    return _heat_map(title, cells, x, y, "percent", 26 if len(chosen) <= 12 else 16, len(chosen) <= 12)


def together(study: Study) -> Chart:
    """The share of the images that select a candidate (row) that also select another (column)."""
    cells = []
    for i, row in enumerate(study.together):
        for j, share in enumerate(row):
            if not math.isnan(share):
                cell = {"candidate": str(i), "with": str(j), "percent": round(100 * float(share), 1)}
                cells.append({**cell, "text": f"{100 * share:.0f}"})
    n = len(study.together)
    title = "Which candidates go together, % of the row's images"
    return _heat_map(title, cells, {"field": "with"}, {"field": "candidate"}, "percent", 26, n <= 16)


def entropy(study: Study, num_selected: int, most: int = 40) -> Chart:
    """The mean entropy of the gate weights by class in ascending order; if there are many classes, both ends."""
    values = study.by_class(study.entropy)
    order = [int(i) for i in np.argsort(values, kind="stable") if not math.isnan(values[i])]
    maximum = math.log2(num_selected)
    title = f"Gate entropy by class (equal weights: {maximum:.2f} bits)"
    if len(order) > most:
        title += f": the {most // 2} lowest and the {most // 2} highest"
        order = order[: most // 2] + order[-most // 2 :]
    bars = [{"class": study.classes[i], "bits": round(float(values[i]), 4)} for i in order]
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
