"""Counts for `benchmark.py lowering`: products, copies and scatters of dispatch in the program for a GPU.

No GPU is needed, because the program is the StableHLO that JAX lowers for CUDA, before XLA's optimisation.
"""

import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from gmsop_jax import ops
from gmsop_jax.ops.dispatch import Dispatch

_POSITIONS, _CHANNELS = 64, (512, 256, 128)
_SHAPES = re.compile(r" : \((.*)\) -> (tensor<[^>]*>)")
_CONTRACTING = re.compile(r"contracting_dims = \[([\d, ]*)\] x")


def lowering_rows() -> list[dict[str, Any]]:
    """The counts of `gather` and `group` for 256 images, with 8 of 16 and 8 of 128 candidates."""
    dispatches: tuple[Dispatch, ...] = ("gather", "group")
    return [
        {"batch": 256, "n": n, "k": 8, "dispatch": dispatch, **count(lower(dispatch, 256, n, 8))}
        for n in (16, 128)
        for dispatch in dispatches
    ]


def lower(dispatch: Dispatch, batch: int, n: int, k: int) -> str:
    """StableHLO for CUDA of the candidates' layers with average pooling, and of their gradients."""

    def total(x: jax.Array, kernels: list[jax.Array], indices: jax.Array) -> jax.Array:
        return jnp.sum(ops.apply_candidates(x, kernels, indices, ops.average_pool, dispatch))

    def shape(*sides: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sides, dtype)

    kernels = [shape(n, i, o) for i, o in itertools.pairwise(_CHANNELS)]
    program = jax.jit(jax.value_and_grad(total, (0, 1)))
    arguments = shape(batch, _POSITIONS, _CHANNELS[0]), kernels, shape(batch, k, dtype="int32")
    return program.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def count(program: str) -> dict[str, float]:
    """Counts the products, copies and scatters of float32 numbers in StableHLO without loops.

    Returns: `gflop` of the products; `product_gb`, their operands and results; `copied_gb`, the results of gathers; and
      `scatters`.
    """
    counts = {"gflop": 0.0, "product_gb": 0.0, "copied_gb": 0.0, "scatters": 0}
    for operation in re.split(r"\n    (?=%)", program):
        name = re.search(r"stablehlo\.(dot_general|gather|scatter)\b", operation)
        shapes = _SHAPES.search(operation)
        if name is None or shapes is None or not shapes[2].endswith("xf32>"):
            continue
        *operands, result = [_sides(text) for text in re.findall(r"tensor<[^>]*>", shapes[0])]
        if name[1] == "dot_general":
            found = _CONTRACTING.search(operation)
            assert found is not None
            summed = math.prod(operands[0][int(axis)] for axis in found[1].split(","))
            counts["gflop"] += 2 * math.prod(result) * summed / 1e9
            counts["product_gb"] += 4 * sum(map(math.prod, [*operands, result])) / 1e9
        elif name[1] == "gather":
            counts["copied_gb"] += 4 * math.prod(result) / 1e9
        else:
            counts["scatters"] += 1
    return counts


def _sides(tensor: str) -> list[int]:
    return [int(side) for side in re.findall(r"(\d+)x", tensor)]


def lowering_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| images, N, K | dispatch | GFLOP | GB read and written by products | GB copied | scatters of numbers |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['batch']}, {row['n']}, {row['k']} | {row['dispatch']} | {row['gflop']:.1f} |"
            f" {row['product_gb']:.2f} | {row['copied_gb']:.2f} | {row['scatters']} |"
        )
    return "\n".join(lines)
