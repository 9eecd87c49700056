"""The selected candidates' second-order pooling, as one kernel forward and one backward."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gmsop_jax.ops.triangle import triangle_vector

_ROWS = 64  # positions that a program takes at a time


def second_order_candidates(
    x: Float[Array, "b p c"],
    kernels: Sequence[Float[Array, "n _ _"]],
    indices: Int[Array, "b k"],
    num_iters: int = 3,
) -> Float[Array, "b k t"]:
    """`apply_candidates` with `second_order_pool`, as one Pallas program for each (image, candidate) pair.

    y[b, j] = triangle(√cov(ReLU(… ReLU(x[b] · W₁[i]) · W₂[i] …))),  i = indices[b, j]   (GM-SOP, section 2)

    A program reads its image and its candidate's weights where they lie, and writes the d × d root; the
    triangle is gathered outside. The backward pass keeps the inputs alone and computes the rest again. It
    writes a gradient of image and weights for every pair, 4(pc + Σ in·out) bytes, summed outside.

    **It was neither run nor timed on an accelerator**, only interpreted, and compiled for TPUs and GPUs
    (docs/performance.md), so `dispatch="auto"` never chooses it. On a CPU it is interpreted, slowly. XLA
    can't split it over devices: call it inside pmap or shard_map (with `check_vma=False`) there.

    Args:
      x: features of p positions, float32 or bfloat16.
      kernels: the bank's weights, layer by layer, from c to d channels, in x's dtype; may be none.
      indices: selected candidates, within 0…n − 1.
      num_iters: Newton–Schulz steps n ≥ 1.

    Returns: the pooled vector of each pair, t = d(d + 1)/2, float32 whatever x is.

    Raises:
      ValueError: if num_iters < 1 or x has no position.
      TypeError: for other dtypes.
      NotImplementedError: when compiled for anything but CPU, TPU and CUDA.
    """
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    _, p, c = x.shape
    if p == 0:
        raise ValueError(f"second_order_candidates needs [b, p, c] with p ≥ 1 positions, got {x.shape}")
    dtypes = {jnp.dtype(array.dtype).name for array in (x, *kernels)}
    if dtypes not in ({"float32"}, {"bfloat16"}):
        raise TypeError(f"second_order_candidates needs all in float32 or all in bfloat16, got {sorted(dtypes)}")
    d = kernels[-1].shape[-1] if kernels else c
    # Triton knows powers of two from 16 on. Channels of zeros give rows of zeros in Σ and in its root.
    rows = min(_ROWS, _power_of_two(p))
    x = jnp.pad(x, ((0, 0), (0, -p % rows), (0, _power_of_two(c) - c)))
    padded = [jnp.pad(w, [(0, 0), *((0, _power_of_two(size) - size) for size in w.shape[1:])]) for w in kernels]
    roots: Array = _roots(x, tuple(padded), indices.astype(jnp.int32), _Sizes(p, rows, num_iters))
    return triangle_vector(roots[..., :d, :d])


class _Sizes(NamedTuple):
    p: int
    rows: int
    num_iters: int


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _roots(x: Array, kernels: tuple[Array, ...], indices: Array, sizes: _Sizes) -> Any:
    from gmsop_jax.ops.kernels import launch, tile  # Pallas takes a while to import

    d = kernels[-1].shape[-1] if kernels else x.shape[-1]
    out = [jax.ShapeDtypeStruct((*indices.shape, d, d), jnp.float32)]
    return launch.launch(functools.partial(tile.root, **sizes._asdict()), indices, x, kernels, (), out)[0]


def _forward(x, kernels, indices, sizes):
    return _roots(x, kernels, indices, sizes), (x, kernels, indices)


def _backward(sizes, residuals, g):
    from gmsop_jax.ops.kernels import launch, tile

    x, kernels, indices = residuals
    out = [jax.ShapeDtypeStruct((*indices.shape, *x.shape[1:]), x.dtype)]
    out += [jax.ShapeDtypeStruct((*indices.shape, *kernel.shape[1:]), jnp.float32) for kernel in kernels]
    program = functools.partial(tile.root_gradients, **sizes._asdict())
    dx, *dweights = launch.launch(program, indices, x, kernels, (g,), out)
    dx = jnp.sum(dx, axis=1, dtype=jnp.float32).astype(x.dtype)
    dkernels = tuple(_sum_by_candidate(dw, indices, kernel) for dw, kernel in zip(dweights, kernels, strict=True))
    return dx, dkernels, np.zeros(indices.shape, jax.dtypes.float0)


def _sum_by_candidate(dweights: Array, indices: Array, kernel: Array) -> Array:
    of_pairs = dweights.reshape(-1, *kernel.shape[1:])
    return jax.ops.segment_sum(of_pairs, indices.reshape(-1), kernel.shape[0]).astype(kernel.dtype)


_roots.defvjp(_forward, _backward)
