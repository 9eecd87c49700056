"""Figures of results: the errors of the methods of a study, and comparisons of studies, as SVG files."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gmsop_jax.analysis.results import (
    COMPARED,
    Estimate,
    MethodResults,
    Results,
    by_name,
    collect,
    difference,
    gated_methods,
    in_all,
    kinds,
    use_by_kind,
)
from gmsop_jax.analysis.study import Study
from gmsop_jax.files import replacing


def plot(study: Study, results: Results, file: pathlib.Path) -> None:
    """Draws the error of each method in every run, and the mean with its 95 % interval, as an SVG file."""
    methods, split = collect(study, results), study.test_splits[0]
    figure = Figure(figsize=(7, 0.8 + 0.36 * len(methods)), layout="constrained")
    axes = figure.add_subplot()
    for row, method in enumerate(reversed(methods)):
        values = list(method.errors[split].values())
        estimate = Estimate.of(values)
        axes.plot(values, [row] * len(values), "o", color="#9ab", markersize=4)
        width = estimate.half_width if estimate.count > 1 else 0.0
        axes.errorbar(estimate.mean, row, xerr=width, fmt="D", color="#135", capsize=3, markersize=5)
    axes.set_yticks(range(len(methods)), [method.method for method in reversed(methods)])
    axes.set_xlabel("balanced error on the test images in %, by run, and mean with 95 % interval")
    axes.grid(axis="x", alpha=0.3)
    _save(figure, file, study.name)


def plot_gate(study: Study, results: Results, file: pathlib.Path) -> None:
    """Draws the share of each candidate in the weights of each kind of image, for the first seed of each gated method.

    Nothing is drawn if there is no gated method, or if the classes don't belong to several kinds.
    """
    split = study.test_splits[0]
    methods = gated_methods(study, collect(study, results))
    if not methods or not kinds(methods[0].runs[0]["classes"]):
        return
    figure = Figure(figsize=(7, 1 + 1.1 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), 1, sharex=True, squeeze=False)[:, 0]
    for axes, method in zip(panels, methods, strict=True):
        use = use_by_kind(method.runs[0], split)
        shares = np.array([100 * row / row.sum() for row in use.values()])
        # with K = 4, a candidate that is selected for every image of a kind has about a quarter of the weights
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=25, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 15 else "black")
        axes.set_yticks(range(len(use)), list(use))
        axes.set_title(method.method, fontsize=10)
    panels[-1].set_xlabel("candidate; share of the gate's weights in %, on the test images")
    _save(figure, file, f"{study.name}_gate")


def plot_overview(collected: Mapping[str, Sequence[MethodResults]], file: pathlib.Path) -> None:
    """Draws the difference of each method from average pooling, with its 95 % interval, for each study."""
    names, columns = COMPARED[1:], min(len(collected), 3)
    rows = math.ceil(len(collected) / columns)
    figure = Figure(figsize=(1.6 + 2.8 * columns, 0.4 + 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(collected) :]:
        axes.set_visible(False)
    for axes, (title, results) in zip(panels, collected.items(), strict=False):
        methods = by_name(results)
        for row, name in enumerate(reversed(names)):
            split = next(iter(methods["gap"].errors))
            delta = difference(methods[name], methods["gap"], split) if name in methods else None
            if delta is not None:
                sure = abs(delta.mean) > delta.half_width
                color = "#999" if not sure else "#17744f" if delta.mean < 0 else "#b3402a"
                axes.errorbar(delta.mean, row, xerr=delta.half_width, fmt="D", color=color, capsize=3, markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), reversed(names))
        axes.set_title(textwrap.fill(title, 28), fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("balanced error minus that of average pooling (gap), in percentage points", fontsize=9)
    _save(figure, file, "overview")


def plot_learning_curves(sizes: Mapping[int, Sequence[MethodResults]], file: pathlib.Path) -> None:
    """Draws the difference of each method from average pooling, with 95 % intervals, by number of training images."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    names = [name for name in in_all(sizes) if name != "gap"]
    for index, name in enumerate(names):
        found = [(methods[name], methods["gap"]) for methods in map(by_name, sizes.values())]
        deltas = [difference(method, gap, next(iter(method.errors))) for method, gap in found]
        means, widths = zip(*((delta.mean, delta.half_width) for delta in deltas if delta), strict=True)
        shifted = [size * 1.04 ** (index - (len(names) - 1) / 2) for size in sizes]
        axes.errorbar(shifted, means, yerr=widths, fmt="o-", capsize=3, markersize=5, linewidth=1.2, label=name)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("training images")
    axes.set_ylabel("balanced error minus that of gap,\nin percentage points")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=9, ncols=2)
    _save(figure, file, "learning_curves")


def _save(figure: Any, file: pathlib.Path, name: str) -> None:
    """Saves a figure as SVG, with the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": name}), replacing(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
