"""Cases of `benchmark.py` for the pooling and the mixture, forward and backward."""

# pyright: reportMissingImports=false
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_timing import Case, Program, normal, torch_device, with_gradient

from gmsop_jax import ops
from gmsop_jax.ops.dispatch import Dispatch

WIDTH, POSITIONS = 128, 256
TRIANGLE = WIDTH * (WIDTH + 1) // 2
HIDDEN = 256  # channels between the two projections of a candidate
PROJECTION_FLOPS = 2 * POSITIONS * (WIDTH * HIDDEN + HIDDEN * WIDTH)  # forward
_DENSE = "mixture, dense"


def pooling_flops(positions: int, width: int) -> float:
    """Floating-point operations of one pooling, forward and backward.

    The covariance takes one product forward and one backward; three iterations of the root take 5 and 8.
    """
    return 2 * 2 * positions * width**2 + 13 * 2 * width**3


def pooling_cases(peer: str | None, batch: int = 64) -> list[Case]:
    """Covariance, square root and triangle, against plain JAX and PyTorch."""
    x, cotangent = normal(batch, POSITIONS, WIDTH), normal(batch, TRIANGLE)
    flops, bytes_ = batch * pooling_flops(POSITIONS, WIDTH), 3 * x.nbytes + 2 * cotangent.nbytes
    name = f"pooling {batch} × ({POSITIONS} × {WIDTH})"
    programs: dict[str, Callable[[], Any]] = {
        name: Program(with_gradient(ops.second_order_pool), (x,), cotangent),
        f"{name}, plain JAX": Program(with_gradient(_plain_pool), (x,), cotangent),
    }
    if peer:
        programs[f"{name}, PyTorch"] = _torch_pooling(x, cotangent)
    *_, versus = programs
    return [Case(key, run, flops, bytes_, versus if key == name else "") for key, run in programs.items()]


def _plain_pool(x: jax.Array) -> jax.Array:
    """Second-order pooling without this package: the paper's iteration, differentiated automatically."""
    centred = x - jnp.mean(x, -2, keepdims=True)
    sigma = jnp.swapaxes(centred, -1, -2) @ centred / x.shape[-2]
    trace = jnp.trace(sigma, axis1=-2, axis2=-1)[..., None, None]
    eye = jnp.eye(sigma.shape[-1], dtype=sigma.dtype)
    y, z = sigma / trace, eye
    for _ in range(3):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    rows, columns = np.triu_indices(x.shape[-1])
    return (jnp.sqrt(trace) * y)[..., rows, columns]


def _torch_pooling(x: jax.Array, cotangent: jax.Array) -> Callable[[], None]:
    import torch
    import torch_peer

    inputs, outputs = (torch.tensor(np.asarray(array), device=torch_device()) for array in (x, cotangent))
    inputs.requires_grad_()

    def run() -> None:
        torch.autograd.grad(torch_peer.second_order_pool(inputs), inputs, outputs)
        torch_peer.synchronize(torch_device())

    return run


def mixture_cases(batch: int) -> list[Case]:
    """K = 8 of 16 and of 128 candidates, with two kinds of dispatch, against computing all 16 candidates."""
    dispatches: tuple[Dispatch, ...] = ("gather", "loop")
    selected = [selected_case(batch, n, 8, dispatch) for n in (16, 128) for dispatch in dispatches]
    return [*selected, _all_candidates(batch, 16)]


def selected_case(batch: int, n: int, k: int, dispatch: Dispatch) -> Case:
    """Forward and backward pass of k candidates of n for each image, drawn at random."""
    random = np.random.default_rng(0)
    indices = jnp.asarray(np.stack([random.permutation(n)[:k] for _ in range(batch)]), jnp.int32)

    def run(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        return ops.apply_candidates(x, kernels, indices, ops.second_order_pool, dispatch)

    return _mixture_case(f"mixture N = {n}, K = {k}, {dispatch}", run, batch, n, k)


def _all_candidates(batch: int, n: int) -> Case:
    def run(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
        y = x[:, None]
        for kernel in kernels:
            y = jax.nn.relu(y @ kernel)
        return ops.second_order_pool(y)

    return _mixture_case(_DENSE, run, batch, n, n)


def _mixture_case(name: str, run: Callable[..., jax.Array], batch: int, n: int, k: int) -> Case:
    """The case of n candidates, of which each image selects k."""
    kernels = [normal(n, i, o) / 10 for i, o in ((WIDTH, HIDDEN), (HIDDEN, WIDTH))]
    x, cotangent = jax.nn.relu(normal(batch, POSITIONS, WIDTH)), normal(batch, k, TRIANGLE)
    flops = batch * k * (3 * PROJECTION_FLOPS + pooling_flops(POSITIONS, WIDTH))
    bytes_ = 3 * x.nbytes + 2 * cotangent.nbytes + 3 * sum(kernel.nbytes for kernel in kernels)
    program = Program(with_gradient(run), (x, kernels), cotangent)
    return Case(name, program, flops, bytes_, "" if name == _DENSE else _DENSE)
