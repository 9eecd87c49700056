"""Updates docs/accuracy.md and its pictures: the errors of the square root and of its gradient, for each precision.

python tools/precision.py

An accelerator can compute a product of float32 matrices in several ways, which `jax.lax.DotAlgorithmPreset` lists. This
tool emulates them in NumPy. Each input is split into one, two or three parts of 8 (bfloat16) or 11 (TF32) significant
bits, each rounded to nearest, ties to even. The products of parts are exact in float32, and their sums are rounded to
float32 after each addition, in the order of NumPy's matrix product. The sums for the smaller parts are added first.
"""

import functools
import pathlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sections import write_section

import gmsop_jax
from gmsop_jax.config import load
from gmsop_jax.conversion.prepare import prepare_data
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.files import replacing
from gmsop_jax.ops.coefficients import Coefficients, Steps, iteration_steps, two_step_factors
from gmsop_jax.ops.matrix_sqrt import SYMMETRIC_STEPS
from gmsop_jax.training.loop import train_and_evaluate
from gmsop_jax.training.step import normalize

ROOT = pathlib.Path(__file__).parents[1]
MATRICES = 2  # of each kind
SIDES = 64, 256
CONDITIONS = {"κ = 10": 10.0, "κ = 1000": 1e3, "κ = 10⁵": 1e5}  # condition numbers
ITERATIONS = range(1, 13)
TABULATED = 3, 5, 12
QUANTITIES = "root", "gradient"
COEFFICIENTS: tuple[Coefficients, ...] = "newton_schulz", "minimax"
STYLES = {"newton_schulz": "-", "minimax": "--"}
# significant bits of a part, and number of parts of each input; the suffix X3 or X6 is the number of their products
PRESETS = {
    "BF16_BF16_F32": (8, 1),
    "BF16_BF16_F32_X3": (8, 2),
    "BF16_BF16_F32_X6": (8, 3),
    "TF32_TF32_F32": (11, 1),
    "TF32_TF32_F32_X3": (11, 2),
}
PRECISIONS = (*PRESETS, "float32")
GOAL = 1e-5  # the default precision of an accelerator keeps errors below this

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]
Key = tuple[str, int, Coefficients]  # kind of matrix, side, coefficients
Samples = dict[tuple[str, int], np.ndarray]  # kind, side → float32 matrices or features


def round_significand(x: np.ndarray, bits: int) -> np.ndarray:
    """Rounds finite float32 numbers to `bits` significant bits, ties to even."""
    dropped = 24 - bits
    pattern = x.view(np.uint32)
    to_even = (pattern >> np.uint32(dropped)) & np.uint32(1)
    pattern = pattern + to_even + np.uint32((1 << (dropped - 1)) - 1)
    return (pattern & ~np.uint32((1 << dropped) - 1)).view(np.float32)


def split(x: np.ndarray, bits: int, parts: int) -> list[np.ndarray]:
    """Splits x into parts, the largest first. They do not overlap, and what remains after the last one is dropped."""
    result = []
    for _ in range(parts):
        result.append(round_significand(x, bits))
        x = x - result[-1]  # exact
    return result


def product_of(precision: str) -> Product:
    """The matrix product of float32 matrices in a precision."""
    if precision == "float32":
        return np.matmul
    bits, parts = PRESETS[precision]

    def product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        xs, ys = split(x, bits, parts), split(y, bits, parts)
        pairs = sorted(((i, j) for i in range(parts) for j in range(parts - i)), key=sum, reverse=True)
        return functools.reduce(np.add, [np.matmul(xs[i], ys[j]) for i, j in pairs])

    return product


def root_and_gradient(
    sigma: np.ndarray, g: np.ndarray, steps: Steps, product: Product
) -> tuple[np.ndarray, np.ndarray]:
    """The root and its gradient for the symmetric cotangent g, computed as in `ops.second_order_pool`."""
    trace = np.trace(sigma, axis1=-2, axis2=-1)[..., None, None]
    a = sigma / trace
    y, da = polynomial(np.stack([a, g]), steps, product)
    root = np.sqrt(trace)
    through_trace = inner(g, y) / 2 - inner(da, a)
    return root * y, (da + through_trace * np.eye(a.shape[-1], dtype=a.dtype)) / root


def inner(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The sum of the elementwise product of each pair of matrices."""
    return np.sum(x * y, axis=(-2, -1), keepdims=True)


def polynomial(a: np.ndarray, steps: Steps, product: Product) -> np.ndarray:
    """The last iterate Y, in arithmetic with pairs (value, derivative) of symmetric matrices, stacked on axis 0."""
    eye = np.zeros_like(a)
    eye[0] = np.eye(a.shape[-1])

    def times(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.stack([product(x[0], y[0]), product(x[1], y[0]) + product(x[0], y[1])])

    def derivative_of_square(x: np.ndarray) -> np.ndarray:
        half = product(x[0], x[1])
        return half + half.mT

    def symmetric_quartic(w: np.ndarray, p1: float, q1: float, p2: float, q2: float, gain: float) -> np.ndarray:
        square = np.stack([product(w[0], w[0]), derivative_of_square(w)])
        value = product((square + p1 * w + q1 * eye)[0], gain * (square + p2 * w + q2 * eye)[0])
        # (w² + p₁w + q₁)·(w² + p₂w + q₂) is s² + γw + δ with s = w² + αw + β
        alpha = (p1 + p2) / 2
        beta = (q1 + q2 + p1 * p2 - alpha**2) / 2
        gamma = p1 * q2 + p2 * q1 - 2 * alpha * beta
        return np.stack([value, gain * (derivative_of_square(square + alpha * w + beta * eye) + gamma * w[1])])

    def quartic(w: np.ndarray, p1: float, q1: float, p2: float, q2: float, gain: float) -> np.ndarray:
        square = times(w, w)
        return times(square + p1 * w + q1 * eye, gain * (square + p2 * w + q2 * eye))

    if len(steps) <= SYMMETRIC_STEPS:
        quartic = symmetric_quartic
    w = result = a
    for i in range(1, len(steps), 2):
        first, second, gain = two_step_factors(steps[i - 1], steps[i])
        q = quartic(w, *first, *second, gain)
        wq = times(w, q)
        result = wq if result is w else times(result, q)
        if i < len(steps) - 1:
            w = times(wq, q)
    if len(steps) % 2:
        scale, b = steps[-1]
        result = scale * result - b * times(result, w)
    return result


def covariance(x: np.ndarray, product: Product) -> np.ndarray:
    """Covariances of features [b, p, c], computed as by `ops.covariance_pool`."""
    rows = x - np.mean(x, axis=-2, keepdims=True)
    return product(np.ascontiguousarray(rows.mT), rows) / np.asarray(x.shape[-2], x.dtype)


def exact_root_and_gradient(sigma: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact root and its gradient, by eigendecomposition; the gradient is NaN for singular matrices."""
    values, vectors = np.linalg.eigh(sigma)
    values[values < 1e-12 * values[..., -1:]] = 0
    roots = np.sqrt(values)
    root = (vectors * roots[..., None, :]) @ vectors.mT
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = vectors.mT @ g @ vectors / (roots[..., :, None] + roots[..., None, :])
        return root, vectors @ inside @ vectors.mT


def synthetic(d: int, condition: float) -> np.ndarray:
    """Matrices with random eigenvectors and evenly spaced logarithms of eigenvalues, float32 [MATRICES, d, d]."""
    basis = np.linalg.qr(np.random.default_rng(d).normal(size=(MATRICES, d, d)))[0]
    sigma = (basis * np.geomspace(1, 1 / condition, d)) @ basis.mT
    return ((sigma + sigma.mT) / 2).astype(np.float32)


def network_features() -> dict[int, np.ndarray]:
    """Features of test images of Fashion-MNIST in a small network, float32 [MATRICES, 49, d] for each side d.

    A network with covariance pooling is trained for 3 epochs on the embedded sample. The features of its backbone
    have d = 64 channels, and those of the projection before its pooling have 256, both after ReLU.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"data.dir={folder}/data", "model.head=sop", "model.stage_widths=(16, 32, 64)"]
        overrides += ["model.projection_widths=(256,)", "model.projection_batch_norm=true", "parallel.cpu_devices=1"]
        overrides += ["train.num_epochs=3", "train.learning_rates=((0.02, 3),)", "train.weight_decay=0.0001"]
        config = load("quickstart", overrides)
        prepare_data(config.data)
        train_and_evaluate(config, f"{folder}/run")
        model, variables, info = gmsop_jax.load(f"{folder}/run")
        reader = ShardReader(pathlib.Path(config.data.dir), Manifest.load(config.data.dir).split("val").shards)
        images = np.stack([record["image"] for record in map(decode, reader.read(np.arange(MATRICES)))])
    x = normalize(jnp.asarray(np.broadcast_to(images, (*images.shape[:-1], 3))), info.inputs.mean_rgb)
    maps: Any = model.apply(variables, x, capture_intermediates=True)[1]["intermediates"]
    found = maps["backbone"]["__call__"][0], np.maximum(maps["head"]["projection1_bn"]["__call__"][0], 0)
    return {m.shape[-1]: np.asarray(m).reshape(MATRICES, -1, m.shape[-1]) for m in found}


def relative_error(x: Any, expected: np.ndarray) -> float:
    """The largest error of a matrix, relative to the expected matrix, both in the Frobenius norm."""
    difference = np.linalg.norm(x - expected, axis=(-2, -1))
    return float(np.max(difference / np.linalg.norm(expected, axis=(-2, -1))))


def exactly(sample: np.ndarray) -> np.ndarray:
    """Float32 matrices [n, d, d] as float64, or the covariances in float64 of float32 features [n, p, d]."""
    sample = sample.astype(np.float64)
    return sample if sample.shape[-1] == sample.shape[-2] else covariance(sample, np.matmul)


def cotangent(shape: tuple[int, ...]) -> np.ndarray:
    """Symmetric float64 matrices of random numbers that float32 represents exactly."""
    g = np.random.default_rng(0).normal(size=shape)
    return (g + g.mT).astype(np.float32).astype(np.float64)


def rounding_errors(sample: np.ndarray, coefficients: Coefficients, num_iters: int) -> np.ndarray:
    """Errors of root and gradient that each precision causes, relative to the same iteration in float64.

    Args:
      sample: float32 matrices, or features, whose covariance is then computed in the precision too.
      coefficients, num_iters: those of the iteration.

    Returns: [precision, root or gradient]; NaN or a large number where the iteration diverges.
    """
    steps, sigma = iteration_steps(num_iters, coefficients), exactly(sample)
    g = cotangent(sigma.shape)
    expected = root_and_gradient(sigma, g, steps, np.matmul)
    errors = []
    with np.errstate(over="ignore", invalid="ignore"):
        for product in map(product_of, PRECISIONS):
            rounded = sample if sample.shape == sigma.shape else covariance(sample, product)
            found = root_and_gradient(rounded, g.astype(np.float32), steps, product)
            errors.append(list(map(relative_error, found, expected)))
    return np.array(errors)


def iteration_errors(sigma: np.ndarray, coefficients: Coefficients, num_iters: int) -> list[float]:
    """Errors of root and gradient of the iteration in float64, relative to the exact root and its gradient."""
    g = cotangent(sigma.shape)
    found = root_and_gradient(sigma, g, iteration_steps(num_iters, coefficients), np.matmul)
    return list(map(relative_error, found, exact_root_and_gradient(sigma, g)))


def measure(samples: Samples) -> tuple[dict[Key, np.ndarray], dict[Key, np.ndarray]]:
    """The errors of all samples: (those of the iteration [n, 2], those of each precision [n, precision, 2])."""
    of_iteration, of_rounding = {}, {}
    for name, d in samples:
        for coefficients in COEFFICIENTS:
            key, sample = (name, d, coefficients), samples[name, d]
            print(*key, flush=True)
            of_iteration[key] = np.array([iteration_errors(exactly(sample), coefficients, n) for n in ITERATIONS])
            of_rounding[key] = np.array([rounding_errors(sample, coefficients, n) for n in ITERATIONS])
    return of_iteration, of_rounding


def synthetic_samples() -> Samples:
    """The synthetic matrices by their names and sides."""
    return {(name, d): synthetic(d, condition) for d in SIDES for name, condition in CONDITIONS.items()}


def draw_iterations(of_iteration: dict[Key, np.ndarray]) -> Figure:
    """The errors of the iteration by the number of iterations: root and gradient for each side."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    axes = figure.subplots(2, len(SIDES), sharex=True, sharey="row")
    for (name, d, coefficients), errors in of_iteration.items():
        color = f"C{list(dict.fromkeys(key[0] for key in of_iteration)).index(name)}"
        for row, quantity in enumerate(QUANTITIES):
            if np.all(np.isfinite(errors[:, row])):
                label = name if coefficients == COEFFICIENTS[0] else None
                axes[row, SIDES.index(d)].plot(
                    ITERATIONS, errors[:, row], STYLES[coefficients], color=color, label=label
                )
            axes[row, 0].set_ylabel(f"relative error of the {quantity}")
    for column, d in enumerate(SIDES):
        axes[0, column].set_title(f"d = {d}")
        axes[1, column].set_xlabel("iterations n")
    finish(figure, axes, (1e-6, 2))
    return figure


def draw_precisions(of_rounding: dict[Key, np.ndarray], d: int) -> Figure:
    """The errors of each precision by the number of iterations: root and gradient for each kind of matrix."""
    names = list(dict.fromkeys(key[0] for key in of_rounding))
    figure = Figure(figsize=(13, 6.4), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, sharey=True, squeeze=False)
    for column, name in enumerate(names):
        axes[0, column].set_title(name)
        axes[1, column].set_xlabel("iterations n")
        for coefficients in COEFFICIENTS:
            for i, precision in enumerate(PRECISIONS):
                errors = of_rounding[name, d, coefficients][:, i]
                label = precision if coefficients == COEFFICIENTS[0] else None
                for row in range(2):
                    axes[row, column].plot(ITERATIONS, errors[:, row], STYLES[coefficients], color=f"C{i}", label=label)
        for row in range(2):
            axes[row, column].axhline(GOAL, color="black", linewidth=0.8)
    for row, quantity in enumerate(QUANTITIES):
        axes[row, 0].set_ylabel(f"relative error of the {quantity}")
    finish(figure, axes, (3e-8, 2))
    return figure


def finish(figure: Figure, axes: np.ndarray, limits: tuple[float, float]) -> None:
    """Sets the scales, and adds a grid and a legend, which names the styles of the lines too."""
    for axis in axes.flat:
        axis.set(yscale="log", ylim=limits, xticks=list(ITERATIONS))
        axis.grid(alpha=0.3)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    for coefficients in COEFFICIENTS:
        handles += axes[0, 0].plot([], [], STYLES[coefficients], color="gray")
        labels.append(coefficients)
    figure.legend(handles, labels, loc="outside lower center", ncols=4)


def rounding_table(of_rounding: dict[Key, np.ndarray]) -> str:
    """The table of rounding errors; root / gradient in each cell."""
    header = [
        "| matrices | d | coefficients | n | BF16 | BF16 × 3 | BF16 × 6 | TF32 | TF32 × 3 | float32 |",
        "|---" * 10 + "|",
    ]
    rows = [rounding_row(key, n, errors[n - 1]) for key, errors in of_rounding.items() for n in TABULATED]
    return "\n".join(header + rows)


def rounding_row(key: Key, num_iters: int, errors: np.ndarray) -> str:
    """One row of the table of rounding errors."""
    cells = [" / ".join(written(error) for error in pair) for pair in errors]
    return f"| {key[0]} | {key[1]} | {key[2]} | {num_iters} | {' | '.join(cells)} |"


def written(error: float) -> str:
    """An error with two digits, or "> 1", because larger errors are meaningless."""
    return f"{error:.1e}" if error <= 1 else "> 1"


def iteration_table(of_iteration: dict[Key, np.ndarray]) -> str:
    """The table of the iteration's errors."""
    numbers = " | ".join(map(str, ITERATIONS))
    rows = [f"| matrices | d | coefficients | error of the | {numbers} |", "|---" * (4 + len(ITERATIONS)) + "|"]
    for (name, d, coefficients), errors in of_iteration.items():
        for row, quantity in enumerate(QUANTITIES):
            if np.all(np.isfinite(errors[:, row])):
                cells = " | ".join(f"{errors[n - 1, row]:.2g}" for n in ITERATIONS)
                rows.append(f"| {name} | {d} | {coefficients} | {quantity} | {cells} |")
    return "\n".join(rows)


def save(figure: Figure, file: pathlib.Path) -> None:
    """Writes the figure as SVG, with the same bytes each time."""
    with matplotlib.rc_context({"svg.hashsalt": "gmsop_jax"}), replacing(file) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def main() -> None:
    """Parses the command line, and updates the page and its pictures."""
    parser = ArgumentParser(description="Updates the tables of docs/accuracy.md and its pictures.")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs", help="folder of the page (default: docs)")
    output = parser.parse_args().output
    features = {("features", d): x for d, x in network_features().items()}
    of_iteration, of_rounding = measure({**synthetic_samples(), **features})
    save(draw_iterations(of_iteration), output / "accuracy-iterations.svg")
    save(draw_precisions(of_rounding, SIDES[0]), output / "accuracy-precision.svg")
    write_section(output / "accuracy.md", "iterations", iteration_table(of_iteration))
    write_section(output / "accuracy.md", "precision", rounding_table(of_rounding))


if __name__ == "__main__":
    sys.exit(run_command(main))
