"""Draws the computation of a trained GM-SOP on one image.

python tools/draw_method.py runs/quickstart --output docs/method.svg
"""

import dataclasses
import functools
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import FancyArrowPatch

import gmsop_jax
from gmsop_jax.data.augment import evaluation_image
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import ArgumentParser, ConfigError, UserError, run_command
from gmsop_jax.inference.predict import read_image
from gmsop_jax.ops import apply_candidates, second_order_pool, triangle_matrix
from gmsop_jax.training.step import normalize

_BLUE, _GRAY = "#2f6fb2", "#c3c9cf"


@dataclasses.dataclass(frozen=True)
class Steps:
    """The intermediate results of GM-SOP for one image. k of n candidates with d channels each are selected.

    Attributes:
      image: the image, uint8 [h, w, 3].
      maps: the feature map of the backbone [h', w', c].
      weights: the gate's weights [n].
      selected: the selected candidates, in descending order of their weights [k].
      roots: the square roots of the covariances of these candidates [k, d, d].
      fused: the weighted sum of the roots [d, d].
      probabilities: the probabilities of the classes [classes].
      classes: the names of the classes.
    """

    image: np.ndarray
    maps: np.ndarray
    weights: np.ndarray
    selected: np.ndarray
    roots: np.ndarray
    fused: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]


def follow(workdir: pathlib.Path, image: int | pathlib.Path) -> Steps:
    """Runs the network of a run on one image.

    Args:
      workdir: the working directory of a GM-SOP run.
      image: a file, or a position in the run's evaluation split.

    Raises:
      UserError: if there is no such run or image, or the network has another head.
    """
    model, variables, info = gmsop_jax.load(workdir)
    if info.config.model.head != "gmsop":
        raise ConfigError(
            f"{workdir} has the head {info.config.model.head!r}; only networks with the head 'gmsop' can be drawn"
        )
    size, shorter_side = info.inputs.image_size, info.config.eval.resize
    if isinstance(image, int):
        pixels = evaluation_image(_stored(info, image), size, shorter_side)
    else:
        pixels = read_image(image, size, shorter_side)
    x = normalize(jnp.asarray(pixels[None]), info.inputs.mean_rgb)
    output: Any = model.apply(variables, x)
    maps: Any = model.apply(variables, x, method=lambda network, x: network.backbone(x, train=False))
    logits, aux = output
    weights = aux["gate_weights"]
    selected = jnp.argsort(-weights, axis=-1)[:, : info.config.model.num_selected]
    mixture = variables["params"]["head"]["mixture"]
    kernels = [mixture[f"candidates{i + 1}"] for i in range(len(info.config.model.candidate_widths))]
    pool = functools.partial(
        second_order_pool, num_iters=info.config.model.num_iters, coefficients=info.config.model.coefficients
    )
    pooled = apply_candidates(maps.reshape(1, -1, maps.shape[-1]), kernels, selected, pool)
    roots = triangle_matrix(pooled)
    return Steps(
        pixels,
        np.asarray(maps[0]),
        np.asarray(weights[0]),
        np.asarray(selected[0]),
        np.asarray(roots[0]),
        np.asarray(triangle_matrix(aux["features"])[0]),
        np.asarray(jax.nn.softmax(logits)[0]),
        info.inputs.classes,
    )


def _stored(info: Any, position: int) -> np.ndarray:
    folder, split = pathlib.Path(info.config.data.dir), info.config.eval.split
    reader = ShardReader(folder, Manifest.load(folder, splits=[split]).split(split).shards)
    if not 0 <= position < len(reader):
        raise ConfigError(f"--image {position} is outside 0…{len(reader) - 1}")
    return decode(reader.read(np.array([position]))[0])["image"]


def draw(steps: Steps) -> Figure:
    """Draws the picture."""
    figure = Figure(figsize=(11.5, 3.6), facecolor="white")
    widths = (1.3, 1.5, 3.2, 1.6, 1.7)
    parts: Any = figure.subfigures(1, 5, width_ratios=widths, wspace=0.02)
    _picture(parts[0], steps.image, "image", f"{steps.image.shape[0]} × {steps.image.shape[1]}")
    h, w, c = steps.maps.shape
    _picture(parts[1], _tiles(steps.maps), "backbone", f"feature map, {h} × {w} × {c}", cmap="viridis")
    _draw_gate(parts[2], steps)
    d = len(steps.fused)
    below = f"{d} × {d}; the upper triangle\nis the feature: {d * (d + 1) // 2} numbers"
    _picture(parts[3], steps.fused, "weighted sum", below, **_matrix(steps))
    _draw_classes(parts[4], steps)
    edges = np.cumsum(widths) / sum(widths)
    for edge in edges[:-1]:
        ends = ((edge - 0.013, 0.5), (edge + 0.013, 0.5))
        arrow = FancyArrowPatch(*ends, transform=figure.transFigure, arrowstyle="-|>", mutation_scale=16, color="#444")
        figure.add_artist(arrow)
    return figure


def _picture(part: SubFigure, image: np.ndarray, title: str, below: str, **options: Any) -> None:
    axes = part.add_axes((0.12, 0.15, 0.76, 0.7))
    axes.imshow(image, interpolation="nearest", **options)
    axes.set_axis_off()
    axes.set_title(title, fontsize=12, fontweight="bold")
    axes.text(0.5, -0.06, below, transform=axes.transAxes, ha="center", va="top", fontsize=8.5)


def _tiles(maps: np.ndarray) -> np.ndarray:
    """The first 16 channels as 4 × 4 tiles with gaps, each scaled to its own range."""
    tiles = []
    for channel in np.moveaxis(maps, -1, 0)[:16]:
        low, high = channel.min(), channel.max()
        tiles.append(np.pad((channel - low) / max(high - low, 1e-9), 1, constant_values=np.nan))
    tiles += [np.full_like(tiles[0], np.nan)] * (16 - len(tiles))
    return np.block([tiles[row : row + 4] for row in range(0, 16, 4)])


def _matrix(steps: Steps) -> dict[str, Any]:
    limit = float(np.quantile(np.abs(steps.roots), 0.995))
    return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}


def _draw_gate(part: SubFigure, steps: Steps) -> None:
    n, k = len(steps.weights), len(steps.selected)
    bars = part.add_axes((0.08, 0.59, 0.84, 0.26))
    bars.bar(range(n), steps.weights, color=[_BLUE if i in steps.selected else _GRAY for i in range(n)])
    bars.set_title(f"gate: the image selects {k} of {n} candidates", fontsize=11, fontweight="bold")
    bars.set_xticks(range(n))
    bars.tick_params(labelsize=8, length=0)
    bars.set_yticks([])
    bars.spines[["top", "left", "right"]].set_visible(False)
    for i in steps.selected:
        bars.text(int(i), float(steps.weights[i]), f"{steps.weights[i]:.2f}", ha="center", va="bottom", fontsize=8)
    bars.set_ylim(0, 1.25 * float(steps.weights.max()))
    columns = min(k, 4)
    rows = -(-k // columns)
    for place, (i, root) in enumerate(zip(steps.selected, steps.roots, strict=True)):
        row, column = divmod(place, columns)
        height = 0.34 / rows
        axes = part.add_axes((0.04 + 0.94 * column / columns, 0.45 - (row + 1) * height, 0.86 / columns, 0.82 * height))
        axes.imshow(root, interpolation="nearest", **_matrix(steps))
        axes.set_axis_off()
        axes.set_title(f"candidate {i}", fontsize=8.5, pad=3)
    part.text(0.5, 0.03, "each: 1×1 convolutions → covariance → matrix square root", ha="center", fontsize=8.5)


def _draw_classes(part: SubFigure, steps: Steps) -> None:
    best = np.argsort(-steps.probabilities)[:5][::-1]
    axes = part.add_axes((0.42, 0.3, 0.5, 0.4))
    axes.barh(range(len(best)), 100 * steps.probabilities[best], color=_BLUE)
    axes.set_yticks(range(len(best)), [steps.classes[i] for i in best], fontsize=8.5)
    axes.set_xlim(0, 100)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("%", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("classifier", fontsize=12, fontweight="bold")


def main() -> None:
    """Parses the command line and writes the picture."""
    parser = ArgumentParser(description="Draws the steps that a trained GM-SOP computes for one image.")
    parser.add_argument(
        "workdir", type=pathlib.Path, help="working directory of a run with the head gmsop, such as the quickstart"
    )
    parser.add_argument("--image", default="0", help="file, or position in the evaluation split (default: 0)")
    parser.add_argument(
        "--output", type=pathlib.Path, default=pathlib.Path("method.svg"), help="SVG or PNG file (default: method.svg)"
    )
    args = parser.parse_args()
    image = int(args.image) if args.image.isdigit() else pathlib.Path(args.image)
    figure = draw(follow(args.workdir, image))
    try:
        with matplotlib.rc_context({"svg.hashsalt": "gmsop_jax"}):  # the same bytes each time
            figure.savefig(args.output, dpi=150, metadata={"Date": None} if args.output.suffix == ".svg" else None)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture can't be written to {args.output} ({error}); give another --output") from error
    print(f"{args.output}: {args.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(run_command(main))
