"""Exact dispatch: every candidate runs on the images that selected it, and on no others.

Each selected pair (image, candidate) is one tile: the p rows of the image times the weights of the candidate. The cost
is that of b·k tiles and does not depend on n. All shapes are static, and no pair is dropped.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.covariance import Where, clear_masked, position_weights

_HIGHEST = jax.lax.Precision.HIGHEST

Dispatch = Literal["auto", "gather", "group", "loop"]
Pool = Callable[..., Array]

_CACHE_BYTES = 4 << 20  # above this size of the activations of all pairs, the loop is faster


def apply_candidates(
    x: Float[AnyArray, "b p c"],
    kernels: Sequence[Float[AnyArray, "n _ _"]],
    indices: Int[AnyArray, "b k"],
    pool: Pool,
    dispatch: Dispatch = "auto",
    *,
    where: Where | None = None,
) -> Float[Array, "b k f"]:
    """Runs each image through its k selected candidates: 1×1 convolutions, each followed by ReLU, and pooling.

    y[b, j] = pool(ReLU(… ReLU(x[b] · W₁[i]) · W₂[i] …)),  i = indices[b, j]   (GM-SOP, section 2.1)

    Args:
      x: features of p positions.
      kernels: the weights of all candidates, layer by layer, from c to d channels.
      indices: the selected candidates, from 0 to n − 1.
      pool: pools one or more tiles, [*, p, d] → [*, f], such as `functools.partial(second_order_pool, precision=…)`. If
        there is a mask, it also receives `where`, weights [*, p].
      dispatch: `gather` copies the weights for each pair and computes all pairs as batched products. `group` sorts
        the pairs by candidate into blocks of b·k/(8n) pairs and copies the weights for each block, so that it needs
        much less memory; empty slots in the blocks make the products larger by one eighth. `loop` computes one or two
        pairs at a time, which fit in the cache, and computes them again in the backward pass instead of storing them.
        `auto` selects `loop` on a single CPU device if the activations of all pairs exceed the cache, `group` on
        accelerators if the blocks have at least two pairs, and `gather` otherwise. Values and gradients are the same
        up to rounding.
      where: a mask or weights of the positions; see `covariance_pool`.

    Returns: the pooled vector of each pair.

    Raises:
      ValueError: if `dispatch` is unknown, if the shapes of x, the kernels and the indices do not fit together, or if
        the indices are not ints.
    """
    _check_shapes(x, kernels)
    x, where = _masked(x, where)
    indices = jnp.asarray(indices)
    if indices.ndim != 2 or indices.shape[0] != x.shape[0] or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(
            f"indices must be ints [b, k], the candidates of each of the {x.shape[0]} images, got {indices.dtype}"
            f" {indices.shape}"
        )
    kernels = tuple(jnp.asarray(kernel) for kernel in kernels)
    if dispatch == "auto":
        dispatch = _choose(x, kernels, indices)
    if dispatch == "gather":
        return _tiles(x, where, [_gather(kernel, indices) for kernel in kernels], pool)
    if dispatch == "group":
        return _grouped(x, where, kernels, indices, pool)
    if dispatch == "loop":
        return _loop(x, where, kernels, indices, pool)
    raise ValueError(f"dispatch must be 'auto', 'gather', 'group' or 'loop', got {dispatch!r}")


def apply_all_candidates(
    x: Float[AnyArray, "b p c"], kernels: Sequence[Float[AnyArray, "n _ _"]], pool: Pool, *, where: Where | None = None
) -> Float[Array, "b n f"]:
    """Runs every image through every candidate. The arguments are those of `apply_candidates`.

    Returns: the pooled vectors, in the order of the candidates.

    Raises:
      ValueError: if the shapes of x and the kernels do not fit together.
    """
    _check_shapes(x, kernels)
    return _tiles(*_masked(x, where), kernels, pool)


def mix_candidates(
    pooled: Float[AnyArray, "b k f"], weights: Float[AnyArray, "b n"], indices: Int[AnyArray, "b k"]
) -> Float[Array, "b f"]:
    """Weighted sum of the vectors of the selected candidates.

    z[b] = Σⱼ weights[b, i] · pooled[b, j],  i = indices[b, j]   (GM-SOP, eq. 2)

    Args:
      pooled: the result of `apply_candidates`.
      weights: the weights of all candidates.
      indices: the selected candidates.

    Returns: one vector for each image.

    Raises:
      ValueError: if the shapes do not fit together.
    """
    shapes = np.shape(pooled), np.shape(weights), np.shape(indices)
    if len(shapes[0]) != 3 or len(shapes[1]) != 2 or shapes[0][:2] != shapes[2] or shapes[1][:1] != shapes[2][:1]:
        raise ValueError(
            "mix_candidates needs pooled vectors [b, k, f], weights [b, n] and indices [b, k], got"
            f" {', '.join(map(str, shapes))}"
        )
    # A product with one-hot rows, because the gradient of take_along_axis is a scatter.
    weights = jnp.asarray(weights)
    selected = jnp.sum(weights[:, None] * jax.nn.one_hot(indices, weights.shape[-1], dtype=weights.dtype), axis=-1)
    return jnp.einsum("bk,bkf->bf", selected, pooled, precision=_HIGHEST)


def _check_shapes(x: AnyArray, kernels: Sequence[AnyArray]) -> None:
    shapes = [np.shape(kernel) for kernel in kernels]
    channels = [np.shape(x)[-1:], *(shape[2:] for shape in shapes)]
    fits = all(len(shape) == 3 and shape[1:2] == given for shape, given in zip(shapes, channels, strict=False))
    if np.ndim(x) != 3 or not shapes or not fits or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "candidates need features [b, p, c] and kernels [n, c, d], [n, d, e], … with the same n, got"
            f" {np.shape(x)} and {', '.join(map(str, shapes)) or 'no kernel'}"
        )


def _masked(x: AnyArray, where: Where | None) -> tuple[Array, Array | None]:
    x = jnp.asarray(x)
    if where is None:
        return x, None
    weights = position_weights(x, where)
    return clear_masked(x, weights), weights


def _choose(x: Array, kernels: Sequence[Array], indices: Array) -> Dispatch:
    if jax.default_backend() != "cpu":
        return "group" if _block_size(indices.size, kernels[0].shape[0]) > 1 else "gather"
    if jax.device_count() > 1:
        return "gather"
    widths = sum(kernel.shape[-1] for kernel in kernels)
    return "loop" if indices.size * x.shape[-2] * widths * x.dtype.itemsize > _CACHE_BYTES else "gather"


@jax.custom_vjp
def _gather(kernel: Array, indices: Array) -> Array:
    """The candidate's weights for each selected pair, [b, k, in, out]."""
    return kernel[indices]


def _gather_forward(kernel, indices):
    return _gather(kernel, indices), (jnp.arange(kernel.shape[0]), indices)


def _gather_backward(residuals, g):
    # The gradient of indexing is a scatter, which adds in no fixed order on a GPU. A product with one-hot rows computes
    # the same sums in a fixed order, and reads the gradient of each pair once.
    candidates, indices = residuals
    selected = (indices[..., None] == candidates).astype(g.dtype)
    return jnp.einsum("bkn,bkio->nio", selected, g, precision=_HIGHEST), np.zeros(indices.shape, jax.dtypes.float0)


_gather.defvjp(_gather_forward, _gather_backward)


def _tiles(x: Array, where: Array | None, weights: Sequence[AnyArray], pool: Pool) -> Array:
    """Runs each image [p, c] through several candidates; `weights` are [*, n, in, out]."""
    return _tile(x[:, None], None if where is None else where[:, None], weights, pool)


def _tile(x: Array, where: Array | None, weights: Sequence[AnyArray], pool: Pool) -> Array:
    for w in weights:
        x = jax.nn.relu(jnp.matmul(x, w))
    return pool(x) if where is None else pool(x, where=jnp.broadcast_to(where, x.shape[:-1]))


class _Groups(NamedTuple):
    """An arrangement of the pairs in blocks of equal size, with one candidate in each block.

    Attributes:
      slot: the slot of each pair, [b, k].
      pair: the pair in each slot, [blocks · size]; 0 in an empty slot.
      used: whether a slot holds a pair, bool [blocks · size].
      candidate: the candidate of each block, [blocks].
    """

    slot: Array
    pair: Array
    used: Array
    candidate: Array


_BLOCKS_PER_CANDIDATE = 8  # more blocks need more copies of weights, and fewer blocks have more empty slots


def _block_size(num_pairs: int, n: int) -> int:
    """The number of pairs in a block; 0 if there are fewer pairs than blocks."""
    return num_pairs // (_BLOCKS_PER_CANDIDATE * n)


def _arrange(indices: Array, n: int) -> _Groups:
    """Sorts the pairs into blocks by candidate; a candidate's blocks are adjacent, and all but its last are full."""
    flat = indices.ravel()
    size = max(1, _block_size(flat.size, n))
    num_blocks = flat.size // size + n  # enough for any selection
    selected = jax.nn.one_hot(flat, n, dtype=jnp.int32)
    before = jnp.cumsum(selected, axis=0) - selected
    ends = jnp.cumsum(-(-selected.sum(0) // size))  # the number of blocks up to the end of each candidate
    starts = jnp.concatenate([jnp.zeros(1, ends.dtype), ends[:-1]])
    slot = jnp.sum(selected * (starts * size + before), axis=1)
    pair = (
        jnp.zeros(num_blocks * size, jnp.int32)
        .at[slot]
        .set(jnp.arange(flat.size, dtype=jnp.int32), unique_indices=True)
    )
    used = slot[pair] == jnp.arange(num_blocks * size)
    candidate = jnp.minimum(jnp.searchsorted(ends, jnp.arange(num_blocks), side="right"), n - 1)
    return _Groups(slot.reshape(indices.shape), pair, used, candidate)


def _grouped(x: Array, where: Array | None, kernels: Sequence[Array], indices: Array, pool: Pool) -> Array:
    groups = _arrange(indices, kernels[0].shape[0])
    num_blocks = groups.candidate.size
    y = _to_slots(x, groups).reshape(num_blocks, -1, x.shape[-1])
    for kernel in kernels:
        y = jax.nn.relu(jnp.matmul(y, _gather(kernel, groups.candidate[:, None])[:, 0]))
    y = _to_pairs(y.reshape(groups.pair.size, x.shape[1], -1), groups)
    return pool(y) if where is None else pool(y, where=jnp.broadcast_to(where[:, None], y.shape[:-1]))


@jax.custom_vjp
def _to_slots(x: Array, groups: _Groups) -> Array:
    """Copies the image of each pair to the slot of the pair, [b, *] → [slots, *]."""
    return x[groups.pair // groups.slot.shape[1]]


@jax.custom_vjp
def _to_pairs(y: Array, groups: _Groups) -> Array:
    """Reorders slots to pairs, [slots, *] → [b, k, *]."""
    return y[groups.slot]


# These gradients are gathers. JAX's gradient of indexing is a scatter, which adds in no fixed order on a GPU.
def _to_slots_backward(groups: _Groups, g: Array) -> tuple[Array, _Groups]:
    return g[groups.slot].sum(axis=1), _no_gradients(groups)


def _to_pairs_backward(groups: _Groups, g: Array) -> tuple[Array, _Groups]:
    rows = g.reshape(-1, *g.shape[2:])[groups.pair]
    used = groups.used.reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(used, rows, 0), _no_gradients(groups)


def _no_gradients(groups: _Groups) -> _Groups:
    return jax.tree.map(lambda array: np.zeros(array.shape, jax.dtypes.float0), groups)


_to_slots.defvjp(lambda x, groups: (_to_slots(x, groups), groups), _to_slots_backward)
_to_pairs.defvjp(lambda y, groups: (_to_pairs(y, groups), groups), _to_pairs_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loop(x: Array, where: Array | None, kernels: tuple[Array, ...], indices: Array, pool: Pool) -> Array:
    def step(pairs):
        tiles = [_tile(*_pair(x, where, kernels, i, c), pool) for i, c in zip(*pairs, strict=True)]
        return jnp.stack(tiles)

    return jax.lax.map(step, _pairs(indices)).reshape(*indices.shape, -1)


def _pair(
    x: Array, where: Array | None, kernels: tuple[Array, ...], image: Array, candidate: Array
) -> tuple[Array, Array | None, list[Array]]:
    """Features, mask and weights of one pair."""
    return x[image], None if where is None else where[image], [kernel[candidate] for kernel in kernels]


def _pairs(indices: Array) -> tuple[Array, Array]:
    """Image and candidate of each pair, [steps, 1 or 2]: XLA can run two pairs of a step on two cores."""
    b, k = indices.shape
    pairs_per_step = 2 - b * k % 2
    return (jnp.arange(b * k) // k).reshape(-1, pairs_per_step), indices.reshape(-1, pairs_per_step)


def _loop_forward(x, where, kernels, indices, pool):
    return _loop(x, where, kernels, indices, pool), (x, where, kernels, indices)


def _loop_backward(pool, residuals, g):
    x, where, kernels, indices = residuals

    def step(carry, pairs):
        dx, dwhere, dkernels = carry
        for image, candidate, g_tile in zip(*pairs, strict=True):
            _, vjp = jax.vjp(
                lambda x, mask, weights: _tile(x, mask, weights, pool), *_pair(x, where, kernels, image, candidate)
            )
            dx_tile, dwhere_tile, dweights = vjp(g_tile)
            dx = dx.at[image].add(dx_tile)
            dwhere = None if dwhere is None else dwhere.at[image].add(dwhere_tile)
            dkernels = [dk.at[candidate].add(dw) for dk, dw in zip(dkernels, dweights, strict=True)]
        return (dx, dwhere, dkernels), None

    pairs = _pairs(indices)
    g = g.reshape(*pairs[0].shape, g.shape[-1])
    zeros = jax.tree.map(jnp.zeros_like, (x, where, list(kernels)))
    (dx, dwhere, dkernels), _ = jax.lax.scan(step, zeros, (*pairs, g))
    return dx, dwhere, tuple(dkernels), np.zeros(indices.shape, jax.dtypes.float0)


_loop.defvjp(_loop_forward, _loop_backward)
