"""Reference values, and the comparison with them.

The values lie in tests/goldens (see its README); the environment variable GMSOP_GOLDENS names another
folder laid out like it, with more cases or fewer.
"""

import os
import pathlib

import numpy as np
from numpy.typing import ArrayLike

GOLDENS = pathlib.Path(os.environ.get("GMSOP_GOLDENS") or pathlib.Path(__file__).parents[1] / "goldens")

# relative bounds: computed in double; computed in double and stored in single; single throughout
DOUBLE, STORED_SINGLE, SINGLE = 1e-9, 1e-6, 1e-4

measured: dict[str, float] = {}  # kind of value → largest relative error of this session


def cases(pattern: str) -> list[pathlib.Path]:
    """Files of reference values, in order."""
    paths = sorted(GOLDENS.glob(pattern))
    assert paths, f"no reference values {GOLDENS / pattern}"
    return paths


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def column_order(d: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of an upper triangle, column by column, as MATLAB's code writes it."""
    columns, rows = np.tril_indices(d)
    return rows, columns


def to_matrix(vector: np.ndarray) -> np.ndarray:
    """The upper triangle of a matrix from a vector in MATLAB's order, zeros below."""
    d = int((8 * vector.shape[-1] + 1) ** 0.5) // 2
    matrix = np.zeros((*vector.shape[:-1], d, d), vector.dtype)
    matrix[..., *column_order(d)] = vector
    return matrix


def to_ours(vector: np.ndarray) -> np.ndarray:
    """A vector in MATLAB's order as one in the order of `triu_indices`."""
    matrix = to_matrix(vector)
    return matrix[..., *np.triu_indices(matrix.shape[-1])]


def part(actual: ArrayLike, expected: np.ndarray) -> np.ndarray:
    """All of `actual`, or the entries that `expected` holds if it is a sample (see the README)."""
    flat = np.asarray(actual).ravel()
    if flat.size == expected.size:
        return flat.reshape(expected.shape)
    return flat[(np.arange(expected.size) * 2654435761 + 12345) % flat.size]


def assert_close(kind: str, actual: ArrayLike, expected: ArrayLike, bound: float | None = None) -> None:
    """Asserts that |actual − expected| ≤ bound · max|expected|, and records the largest error of each kind.

    Args:
      kind: of the value, for the summary at the end.
      actual: ours.
      expected: theirs; perhaps a sample.
      bound: DOUBLE if not given, or STORED_SINGLE where `expected` is float32.
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    if bound is None:
        bound = STORED_SINGLE if expected.dtype == np.float32 else DOUBLE
    actual = part(actual, expected)
    difference = np.max(np.abs(actual - expected), initial=0)
    largest = np.max(np.abs(expected), initial=0)
    assert largest or not difference, f"{kind}: {difference} where it should be 0"
    error = float(difference / largest) if largest else 0.0
    label = f"{kind} (bound {bound:.0e})"
    measured[label] = max(error, measured.get(label, 0.0))
    assert error <= bound, f"{kind}: relative error {error:.2e} exceeds {bound:.0e}"
