"""Multi-head cross-covariance pooling with singular-value power normalisation (SoT, Xie et al. 2021)."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import PrecisionLike
from jaxtyping import Array, Float

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.covariance import Where, average_pool, clear_masked, position_weights
from gmsop_jax.ops.precision import matrix_precision

_HIGHEST = jax.lax.Precision.HIGHEST
_EPSILON = 1e-5  # added to the divisor, as in the authors' code


def cross_covariance_pool(
    queries: Float[AnyArray, "*b p r"],
    keys: Float[AnyArray, "*b p r"],
    *,
    where: Where | None = None,
    precision: PrecisionLike = None,
) -> Float[Array, "*b r r"]:
    """Cross-covariance of two sets of features over positions.

    C = (1/p) Σ (qₚ − mean q)(kₚ − mean k)ᵀ;  with weights, all means are weighted

    Args:
      queries, keys: features of p positions. Half precision is converted to float32.
      where: a mask or weights of the positions; see `covariance_pool`.
      precision: precision of the matrix product; the default depends on the device, see `ops.matrix_precision`.

    Returns: matrices, float32 or float64.

    Raises:
      ValueError: if there is no position, if queries and keys differ in shape, or if the precision does not accumulate
        in the dtype of the matrices.
    """
    if np.ndim(queries) < 2 or np.shape(queries)[-2] == 0 or np.shape(queries) != np.shape(keys):
        raise ValueError(
            "cross_covariance_pool needs queries and keys of one shape [..., p, r] with p ≥ 1 positions,"
            f" got {np.shape(queries)} and {np.shape(keys)}"
        )
    queries, keys = (jnp.asarray(x, jnp.promote_types(jnp.asarray(x).dtype, jnp.float32)) for x in (queries, keys))
    if where is None:
        shares = jnp.asarray(1 / queries.shape[-2], queries.dtype)
    else:
        weights = position_weights(queries, where)
        queries, keys = clear_masked(queries, weights), clear_masked(keys, weights)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        shares = (weights / jnp.where(total == 0, 1, total))[..., None]
    queries, keys = (x - average_pool(x, where=where)[..., None, :] for x in (queries, keys))
    precision = matrix_precision(precision, queries.dtype)
    return jnp.einsum("...pr,...ps->...rs", shares * queries, keys, precision=precision)


def multi_head_cross_covariance_pool(
    x: Float[AnyArray, "b p _"],
    start: Float[AnyArray, " r"],
    num_heads: int,
    alpha: float = 0.5,
    *,
    where: Where | None = None,
    precision: PrecisionLike = None,
) -> Float[Array, "b f"]:
    """Normalised cross-covariances of the queries and keys of several heads: f = num_heads · r².

    normalize_singular_value(cross_covariance_pool(qᵢ, kᵢ)) for each head i   (SoT, Xie et al. 2021)

    Args:
      x: the queries of all heads and then their keys, 2 · num_heads · r channels at p positions.
      start: the initial vector of the power iteration, which all heads share.
      num_heads: number of heads.
      alpha: see `normalize_singular_value`.
      where: a mask or weights of the positions, [b, p]; see `covariance_pool`.
      precision: see `cross_covariance_pool`.

    Returns: the matrices of all heads, row by row, as one vector for each image; float32 or float64.

    Raises:
      ValueError: if x does not have three axes, does not have 2 · num_heads · r channels, or has no position.
    """
    x, start = jnp.asarray(x), jnp.asarray(start)
    if x.ndim != 3:
        raise ValueError(f"multi_head_cross_covariance_pool needs tokens [b, p, c], got shape {x.shape}")
    b, p, channels = x.shape
    width = start.shape[0]
    if channels != (needed := 2 * num_heads * width):
        raise ValueError(
            f"queries and keys of {num_heads} heads of width {width} need {needed} channels, got {channels}"
        )
    queries, keys = jnp.moveaxis(x.reshape(b, p, 2, num_heads, width), 1, -2).swapaxes(0, 1)
    if where is not None:
        where = jnp.broadcast_to(jnp.asarray(where)[:, None], queries.shape[:-1])
    c = cross_covariance_pool(queries, keys, where=where, precision=precision)
    return normalize_singular_value(c, start, alpha).reshape(b, -1)


def normalize_singular_value(
    c: Float[AnyArray, "*b r r"], start: Float[AnyArray, " r"], alpha: float = 0.5
) -> Float[Array, "*b r r"]:
    """Power normalisation of the largest singular value, approximated by one step of power iteration.

    u = Cv₀/|Cv₀|,  v = Cᵀu/|Cᵀu|,  s = uᵀCv;  Ĉ = s^α u vᵀ + (C − s u vᵀ)/(s^(1−α) + 10⁻⁵)

    Args:
      c: C, for example from `cross_covariance_pool`.
      start: v₀, the initial vector, which SoT learns.
      alpha: the exponent α, in (0, 1].

    Returns: Ĉ. A zero matrix gives zero, with a finite gradient.
    """
    c, start = jnp.asarray(c), jnp.asarray(start)
    u = _unit(jnp.einsum("...rs,s->...r", c, start, precision=_HIGHEST))
    product = jnp.einsum("...rs,...r->...s", c, u, precision=_HIGHEST)
    v = _unit(product)
    s = jnp.sum(product * v, axis=-1)[..., None, None]
    largest = u[..., :, None] * v[..., None, :]
    return _power(s, alpha) * largest + (c - s * largest) / (_power(s, 1 - alpha) + _EPSILON)


def _unit(x: Array) -> Array:
    """x/|x|, and 0 for 0."""
    square = jnp.sum(x**2, axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _power(s: Array, exponent: float) -> Array:
    return jnp.where(s > 0, jnp.where(s > 0, s, 1) ** exponent, 0)
