"""Symmetric matrices as vectors: the upper triangle with its diagonal, in the order of `numpy.triu_indices`."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gmsop_jax.ops.arrays import AnyArray


@functools.cache
def _positions(d: int) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of the triangle's entries in the matrix, and of the matrix's entries in the triangle."""
    rows, cols = np.triu_indices(d)
    to_vector = rows * d + cols
    to_matrix = np.zeros((d, d), np.int32)
    to_matrix[rows, cols] = to_matrix[cols, rows] = np.arange(rows.size)
    return to_vector.astype(np.int32), to_matrix.reshape(-1)


def _take(x: Array, positions: np.ndarray) -> Array:
    return jnp.take(x, positions, axis=-1, mode="clip")


def triangle_vector(m: Shaped[AnyArray, "*b d d"]) -> Shaped[Array, "*b t"]:
    """Upper triangles with the diagonal, row by row: t = d(d + 1)/2, off-diagonals unscaled.

    v = m[triu_indices(d)]   (GM-SOP, section 2.2; MATLAB's order, column by column, is different)

    Args:
      m: square matrices; only the upper triangle is read.

    Returns: vectors of the same dtype; 8256 entries for d = 128.

    Raises:
      ValueError: if the last two axes differ.

    Example:
      >>> triangle_vector(jnp.array([[1, 2], [2, 5]]))
      Array([1, 2, 5], dtype=int32)
    """
    m = jnp.asarray(m)
    if m.ndim < 2 or m.shape[-1] != m.shape[-2]:
        raise ValueError(f"triangle_vector needs square matrices [..., d, d], got shape {m.shape}")
    return _vector(m)


def triangle_matrix(v: Shaped[AnyArray, "*b t"]) -> Shaped[Array, "*b d d"]:
    """Symmetric matrices from their upper triangles: the inverse of `triangle_vector`.

    Args:
      v: vectors of t = d(d + 1)/2 entries.

    Returns: symmetric matrices of the same dtype.

    Raises:
      ValueError: if t is not a triangular number.

    Example:
      >>> triangle_matrix(jnp.array([1, 2, 5]))
      Array([[1, 2],
             [2, 5]], dtype=int32)
    """
    return _matrix(jnp.asarray(v))


def triangle_side(t: int) -> int:
    """The side d of the matrix whose triangle has t = d(d + 1)/2 entries.

    Raises:
      ValueError: if t is not a triangular number.
    """
    d = (math.isqrt(8 * t + 1) - 1) // 2
    if t < 1 or d * (d + 1) // 2 != t:
        raise ValueError(f"a triangle has d(d + 1)/2 entries (1, 3, 6, 10, …), got {t}")
    return d


# The adjoint of a gather is a scatter, which is slow to compile and to run. Here the adjoint of each function is the
# gather of the other one, with weights for the entries off the diagonal, so both directions are gathers.


@jax.custom_vjp
def _vector(m: Array) -> Any:
    d = m.shape[-1]
    return _take(m.reshape(*m.shape[:-2], d * d), _positions(d)[0])


@jax.custom_vjp
def _matrix(v: Array) -> Any:
    d = triangle_side(v.shape[-1])
    return _take(v, _positions(d)[1]).reshape(*v.shape[:-1], d, d)


def _vector_backward(_, g):
    return (jnp.triu(_matrix(g)),)


def _matrix_backward(_, g):
    return (_vector(g + jnp.swapaxes(jnp.tril(g, -1), -1, -2)),)


_vector.defvjp(lambda m: (_vector(m), None), _vector_backward)
_matrix.defvjp(lambda v: (_matrix(v), None), _matrix_backward)
