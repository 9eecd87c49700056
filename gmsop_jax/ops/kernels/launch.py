"""How a kernel is started: one program for each (image, candidate) pair, with that candidate's weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as pltriton

Platform = Literal["tpu", "cuda"]


def launch(
    kernel: Callable[..., None],
    indices: jax.Array,
    x: jax.Array,
    weights: Sequence[jax.Array],
    pairs: Sequence[jax.Array],
    out: Sequence[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Runs a kernel for all pairs: by Mosaic on TPUs, by Triton on CUDA; interpreted, slowly, on CPUs.

    Args:
      kernel: of a reference to the image, what reads each of the candidate's layers, references to the
        pair's parts of `pairs` and `out`, and `precision`, that of float32's own products.
      indices: candidate of each pair, [b, k] int32.
      x: the images, [b, q, c].
      weights: the bank, layer by layer [n, …, …]. No pair's weights are copied in the device's memory.
      pairs: further inputs, [b, k, …].
      out: shapes and dtypes of the outputs, [b, k, …].

    Returns: the outputs.

    Raises:
      NotImplementedError: when compiled for any other platform.
    """

    def branch(platform: Platform, interpret: bool = False):
        return functools.partial(call, kernel, platform, interpret, out)

    return jax.lax.platform_dependent(
        indices, x, tuple(weights), tuple(pairs), cpu=branch("tpu", True), tpu=branch("tpu"), cuda=branch("cuda")
    )


def call(
    kernel: Callable[..., None],
    platform: Platform,
    interpret: bool,
    out: Sequence[jax.ShapeDtypeStruct],
    indices: jax.Array,
    x: jax.Array,
    weights: Sequence[jax.Array],
    pairs: Sequence[jax.Array],
) -> list[jax.Array]:
    """`launch` for a platform that is known, or its interpretation."""
    run = _tpu if platform == "tpu" else _cuda
    return run(kernel, interpret, out, indices, x, weights, pairs)


def _tpu(kernel, interpret, out, indices, x, weights, pairs):
    """Indices are prefetched, so that a pair's weights come while the pair before it is computed."""
    k = indices.shape[1]

    def program(_, x, *refs):
        weight_refs, others = refs[: len(weights)], refs[len(weights) :]
        readers = [functools.partial(_read, ref) for ref in weight_refs]
        kernel(x, readers, *others, precision=jax.lax.Precision.HIGHEST)

    specs = [pl.BlockSpec((None, *w.shape[1:]), lambda i, j, indices: (indices[i * k + j], 0, 0)) for w in weights]
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=indices.shape,
        in_specs=[_of_image(x), *specs, *(_of_pair(pair) for pair in pairs)],
        out_specs=[_of_pair(shape) for shape in out],
    )
    return pl.pallas_call(program, out, grid_spec=grid, interpret=interpret)(indices.reshape(-1), x, *weights, *pairs)


def _cuda(kernel, interpret, out, indices, x, weights, pairs):
    """A program reads its index, then its weights where they lie, again for every block of positions.

    Once read, Triton would keep all layers in shared memory, which is too small. Float32's own products are
    made of six of bfloat16 (TPUs' way too): at full precision Triton has no tensor cores, and spills.
    """
    k = indices.shape[1]
    precision = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X6

    def program(indices, x, *refs):
        weight_refs, others = refs[: len(weights)], refs[len(weights) :]
        candidate = indices[pl.program_id(0) * k + pl.program_id(1)]
        readers = [functools.partial(pltriton.load, ref.at[candidate], volatile=True) for ref in weight_refs]
        kernel(x, readers, *others, precision=precision)

    where_it_lies = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        program,
        out,
        grid=indices.shape,
        in_specs=[where_it_lies, _of_image(x), *(where_it_lies for _ in weights), *(_of_pair(p) for p in pairs)],
        out_specs=[_of_pair(shape) for shape in out],
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
    )(indices.reshape(-1), x, *weights, *pairs)


def _read(ref: Any) -> jax.Array:
    return ref[...]


def _of_image(x: jax.Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, *x.shape[1:]), lambda i, j, *_: (i, 0, 0))


def _of_pair(pair: Any) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *pair.shape[2:]), lambda i, j, *_: (i, j, 0, 0))
