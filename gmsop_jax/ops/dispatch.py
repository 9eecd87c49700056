"""Exact dispatch: every candidate runs on the images that selected it, and on no others.

Each selected (image, candidate) pair is one tile: p rows against that candidate's weights. The work is
b·k tiles whatever n is, shapes are static, and nothing is dropped, padded or sorted.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmsop_jax.ops.arrays import AnyArray

_HIGHEST = jax.lax.Precision.HIGHEST

Dispatch = Literal["auto", "gather", "loop"]
Pool = Callable[[Array], Array]

_CACHE_BYTES = 4 << 20  # of activations, above which the loop was measured to be the faster one


def apply_candidates(
    x: Float[AnyArray, "b p c"],
    kernels: Sequence[Float[AnyArray, "n _ _"]],
    indices: Int[AnyArray, "b k"],
    pool: Pool,
    dispatch: Dispatch = "auto",
) -> Float[Array, "b k f"]:
    """Runs each image through its k selected candidates: 1×1 convolutions, each with ReLU, and pooling.

    y[b, j] = pool(ReLU(… ReLU(x[b] · W₁[i]) · W₂[i] …)),  i = indices[b, j]   (GM-SOP, section 2.1)

    Args:
      x: features of p positions.
      kernels: the bank's weights, layer by layer, from c to d channels.
      indices: selected candidates, within 0…n − 1.
      pool: of one tile or many, [*, p, d] → [*, f].
      dispatch: `gather` copies each pair's weights and runs all pairs as batched products: for
        accelerators. `loop` runs pair after pair, each in cache, and its backward pass computes a pair
        again instead of keeping anything of it: for a single CPU device. `auto` is `loop` there, if the
        pairs together don't fit into a cache, and `gather` elsewhere. Both give the same values and
        gradients, to rounding.

    Returns: the pooled vector of each pair.

    Raises:
      ValueError: if `dispatch` is unknown.
    """
    x, indices = jnp.asarray(x), jnp.asarray(indices)
    kernels = tuple(jnp.asarray(kernel) for kernel in kernels)
    if dispatch == "auto":
        dispatch = _choose(x, kernels, indices)
    if dispatch == "gather":
        return _tile(x[:, None], [_gather(kernel, indices) for kernel in kernels], pool)
    if dispatch == "loop":
        return _loop(x, kernels, indices, pool)
    raise ValueError(f"dispatch must be 'auto', 'gather' or 'loop', got {dispatch!r}")


def apply_all_candidates(
    x: Float[AnyArray, "b p c"], kernels: Sequence[Float[AnyArray, "n _ _"]], pool: Pool
) -> Float[Array, "b n f"]:
    """Runs every image through every candidate; arguments as in `apply_candidates`.

    Returns: the pooled vectors, in the bank's order.
    """
    return _tile(jnp.asarray(x)[:, None], kernels, pool)


def mix_candidates(
    pooled: Float[AnyArray, "b k f"], weights: Float[AnyArray, "b n"], indices: Int[AnyArray, "b k"]
) -> Float[Array, "b f"]:
    """Sums the selected candidates' vectors by their weights.

    z[b] = Σⱼ weights[b, i] · pooled[b, j],  i = indices[b, j]   (GM-SOP, eq. 2)

    Args:
      pooled: from `apply_candidates`.
      weights: of all candidates.
      indices: of the selected ones.

    Returns: one vector for each image.
    """
    # A product with one-hot rows rather than take_along_axis, whose gradient is a scatter.
    weights = jnp.asarray(weights)
    selected = jnp.sum(weights[:, None] * jax.nn.one_hot(indices, weights.shape[-1], dtype=weights.dtype), axis=-1)
    return jnp.einsum("bk,bkf->bf", selected, pooled, precision=_HIGHEST)


def _choose(x: Array, kernels: Sequence[Array], indices: Array) -> Dispatch:
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        return "gather"
    widths = sum(kernel.shape[-1] for kernel in kernels)
    return "loop" if indices.size * x.shape[-2] * widths * x.dtype.itemsize > _CACHE_BYTES else "gather"


@jax.custom_vjp
def _gather(kernel: Array, indices: Array) -> Array:
    """The weights of each selected pair, [b, k, in, out]."""
    return kernel[indices]


def _gather_forward(kernel, indices):
    return _gather(kernel, indices), (jnp.arange(kernel.shape[0]), indices)


def _gather_backward(residuals, g):
    # The gradient of indexing is a scatter that adds at repeated indices, in no fixed order on a GPU. A
    # product with one-hot rows is the same sum in a fixed order; it reads each pair's gradient once.
    candidates, indices = residuals
    selected = (indices[..., None] == candidates).astype(g.dtype)
    return jnp.einsum("bkn,bkio->nio", selected, g, precision=_HIGHEST), np.zeros(indices.shape, jax.dtypes.float0)


_gather.defvjp(_gather_forward, _gather_backward)


def _tile(x: Array, weights: Sequence[AnyArray], pool: Pool) -> Array:
    for w in weights:
        x = jax.nn.relu(jnp.matmul(x, w))
    return pool(x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _loop(x: Array, kernels: tuple[Array, ...], indices: Array, pool: Pool) -> Array:
    def turn(pairs):
        tiles = [_tile(x[i], [kernel[c] for kernel in kernels], pool) for i, c in zip(*pairs, strict=True)]
        return jnp.stack(tiles)

    return jax.lax.map(turn, _pairs(indices)).reshape(*indices.shape, -1)


def _pairs(indices: Array) -> tuple[Array, Array]:
    """Image and candidate of each pair, [turns, pairs a turn]: two, which XLA can run on two cores."""
    b, k = indices.shape
    pairs_a_turn = 2 - b * k % 2
    return (jnp.arange(b * k) // k).reshape(-1, pairs_a_turn), indices.reshape(-1, pairs_a_turn)


def _loop_forward(x, kernels, indices, pool):
    return _loop(x, kernels, indices, pool), (x, kernels, indices)


def _loop_backward(pool, residuals, g):
    x, kernels, indices = residuals

    def turn(carry, pairs):
        dx, dkernels = carry
        for image, candidate, g_tile in zip(*pairs, strict=True):
            weights = [kernel[candidate] for kernel in kernels]
            _, vjp = jax.vjp(lambda x, weights: _tile(x, weights, pool), x[image], weights)
            dx_tile, dweights = vjp(g_tile)
            dx = dx.at[image].add(dx_tile)
            dkernels = [dk.at[candidate].add(dw) for dk, dw in zip(dkernels, dweights, strict=True)]
        return (dx, dkernels), None

    pairs = _pairs(indices)
    g = g.reshape(*pairs[0].shape, g.shape[-1])
    zeros = jnp.zeros_like(x), [jnp.zeros_like(kernel) for kernel in kernels]
    (dx, dkernels), _ = jax.lax.scan(turn, zeros, (*pairs, g))
    return dx, tuple(dkernels), np.zeros(indices.shape, jax.dtypes.float0)


_loop.defvjp(_loop_forward, _loop_backward)
