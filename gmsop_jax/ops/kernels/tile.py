"""What one program computes: a tile of positions through one candidate to its covariance's root, and back.

Plain functions of references to memory, in operations that Pallas lowers for TPUs and GPUs. Positions come in
blocks of rows, so that what is wider than a block has the size of a layer's weights or of Σ. Rows past the last
position are zero, stay so in every layer for want of a bias, and don't count in the covariance.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from gmsop_jax.ops.matrix_sqrt import square_root, square_root_adjoint

Weights = Sequence[Callable[[], jax.Array]]

_WIDEST = 128  # channels of a part of the weights' gradients
_AB = (((1,), (0,)), ((), ()))
_ATB = (((0,), (0,)), ((), ()))
_ABT = (((1,), (1,)), ((), ()))


def root(x: Any, weights: Weights, y: Any, *, precision: Any, p: int, rows: int, num_iters: int) -> None:
    """Writes the square root of a tile's covariance after its projection.

    y = √tr Σ · Yₙ(Σ/tr Σ),  Σ = cov(ReLU(… ReLU(x W₁) W₂ …))   (GM-SOP, sections 2.1 and 2.2)

    Args:
      x: reference to the tile, [q, c]: q ≥ p in whole blocks, zero from row p on; float32 or bfloat16.
      weights: what reads the candidate's layers, [c, …] … […, d].
      y: reference to the result, [d, d] float32.
      precision: of the products of covariance and root.
      p: positions that count.
      rows: of a block.
      num_iters: Newton–Schulz steps.
    """
    _, sigma = _moments(x, weights, y.shape[-1], precision, p, rows)
    y[...] = square_root(sigma, num_iters, precision)


def root_gradients(
    x: Any, weights: Weights, g: Any, dx: Any, *dweights: Any, precision: Any, p: int, rows: int, num_iters: int
) -> None:
    """Writes a tile's gradients from the inputs alone: projection and covariance are computed again.

    dΣ = D√(Σ)ᵀ[½(g + gᵀ)],  dY = (2/p)(Y − μ) dΣ,  then layer by layer dW = Hᵀ dZ and dH = dZ Wᵀ

    Args:
      x: reference to the tile, as in `root`.
      weights: what reads the candidate's layers.
      g: reference to the root's cotangent, [d, d] float32.
      dx: reference to the tile's gradient, [q, c] in x's dtype.
      *dweights: references to the layers' gradients by this tile alone, float32.
      precision: as in `root`; so are p, rows and num_iters.
      p: positions.
      rows: of a block.
      num_iters: Newton–Schulz steps.
    """
    mean, sigma = _moments(x, weights, g.shape[-1], precision, p, rows)
    cotangent = (g[...] + g[...].T) / 2
    dsigma = square_root_adjoint(sigma, cotangent, num_iters, precision)
    for dweight in dweights:
        dweight[...] = jnp.zeros(dweight.shape, dweight.dtype)

    def block(i, carry):
        *inputs, y = _project(x[_block(i, rows), :], weights)
        slope, output = _product(_centre(y, mean, i, p), dsigma, precision) * (2 / p), y
        for layer in reversed(range(len(weights))):
            slope = jnp.where(output.astype(jnp.float32) > 0, slope, 0).astype(output.dtype)
            output = inputs[layer]
            _add_product(dweights[layer], output, slope)
            slope = _dot(slope, weights[layer](), _ABT)
        dx[_block(i, rows), :] = slope.astype(dx.dtype)
        return carry

    jax.lax.fori_loop(0, x.shape[0] // rows, block, 0)


def _moments(x: Any, weights: Weights, d: int, precision: Any, p: int, rows: int) -> tuple[jax.Array, jax.Array]:
    """Mean [1, d] and covariance [d, d] of the projected positions, block after block (Chan et al., 1979)."""

    def block(i, moments):
        mean, scatter = moments
        y = _project(x[_block(i, rows), :], weights)[-1].astype(jnp.float32)
        before = (i * rows).astype(jnp.float32)
        count = jnp.minimum(before + rows, p) - before
        block_mean = jnp.sum(y, axis=0, keepdims=True) / count
        delta = block_mean - mean
        # The scatter of a and b together is that of each, and ab/(a + b)·δδᵀ (a, b their counts). Centred
        # rows sum to zero, so b rows moved by √(a/(a + b))·δ have the last two of these in one product.
        moved = _centre(y, block_mean - jnp.sqrt(before / (before + count)) * delta, i, p)
        scatter += _product(moved, moved, precision, _ATB)
        return mean + delta * (count / (before + count)), scatter

    zeros = jnp.zeros((1, d), jnp.float32), jnp.zeros((d, d), jnp.float32)
    mean, scatter = jax.lax.fori_loop(0, x.shape[0] // rows, block, zeros)
    return mean, scatter / p


def _project(x: jax.Array, weights: Weights) -> list[jax.Array]:
    """A block and its layers' outputs, rounded to the features' dtype like the plain version's."""
    layers = [x]
    for weight in weights:
        layers.append(jnp.maximum(_dot(layers[-1], weight()), 0).astype(x.dtype))
    return layers


def _add_product(total: Any, a: jax.Array, b: jax.Array) -> None:
    """Adds aᵀ b, in parts of at most 128 × 128: the whole would fill a GPU's shared memory on its way."""
    for i, rows in enumerate(_parts(a)):
        for j, columns in enumerate(_parts(b)):
            part = pl.ds(i * rows.shape[1], rows.shape[1]), pl.ds(j * columns.shape[1], columns.shape[1])
            total[part] += _dot(rows, columns, _ATB)


def _parts(x: jax.Array) -> list[jax.Array]:
    return jnp.split(x, max(1, x.shape[1] // _WIDEST), axis=1)


def _centre(y: jax.Array, mean: jax.Array, i: Any, p: int) -> jax.Array:
    position = i * y.shape[0] + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
    return jnp.where(position < p, y.astype(jnp.float32) - mean, 0)


def _block(i: Any, rows: int) -> Any:
    return pl.ds(pl.multiple_of(i * rows, rows), rows)


def _dot(a: jax.Array, b: jax.Array, dimensions: Any = _AB) -> jax.Array:
    """The projection's products, at JAX's default precision like the plain version's, summed in float32."""
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _product(a: jax.Array, b: jax.Array, precision: Any, dimensions: Any = _AB) -> jax.Array:
    return jax.lax.dot_general(a, b, dimensions, precision=precision)
