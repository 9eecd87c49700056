"""Cases of `benchmark.py` for the training step of ResNet-18 GM-SOP on 64×64 images, and its peak memory."""

# pyright: reportMissingImports=false
import ctypes
import gc
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import POSITIONS, PROJECTION_FLOPS, TRIANGLE, WIDTH, pooling_flops
from bench_timing import Case, torch_device

from gmsop_jax.config import default_config
from gmsop_jax.models import create_model
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.parallel import compiler_options
from gmsop_jax.training.step import create_state, make_train_step

_CLASSES = 1000


def step_cases(peer: str | None, batch: int, compute_dtype: str) -> list[Case]:
    """Training steps with 16 and with 128 candidates, of which each image selects 8."""
    flops = batch * step_flops()
    name, wide = (f"step, batch {batch}, N = {n}, K = 8" for n in (16, 128))
    cases = [
        Case(name, jax_step(16, batch, compute_dtype), flops, versus="step, PyTorch" if peer else ""),
        Case(wide, jax_step(128, batch, compute_dtype), flops, versus=name),
    ]
    if peer:
        cases.append(Case("step, PyTorch", torch_step(batch), flops))
        if torch_device() == "cuda":
            cases.append(Case("step, torch.compile", torch_step(batch, compiled=True), flops))
    return cases


def step_flops() -> float:
    """Operations of the training step for one image.

    The backward pass of a product takes two products, so these count three times. The pooling counts as in
    `pooling_flops`.
    """
    backbone = 9 * (64 * 64 * (3 * 16 + 4 * 16 * 16) + 32 * 32 * (16 * 32 + 3 * 32 * 32))
    backbone += 9 * 16 * 16 * (32 * 64 + 3 * 64 * 64 + 64 * 128 + 3 * 128 * 128)
    shortcuts = 32 * 32 * 16 * 32 + 16 * 16 * (32 * 64 + 64 * 128)
    classifiers = TRIANGLE * (_CLASSES + 2 * 16)  # and the two linear maps of the gate
    pooled = 8 + 1  # the selected candidates, and the gate
    products = 2 * (backbone + shortcuts + classifiers) + pooled * PROJECTION_FLOPS
    return 3 * products + pooled * pooling_flops(POSITIONS, WIDTH)


def _images(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, 64, 64, 3), np.uint8)


def jax_step(num_candidates: int, batch: int, compute_dtype: str = "") -> Callable[[], None]:
    """Returns a function that takes one training step and waits for its result."""
    config = default_config()
    config.compute_dtype = compute_dtype
    config.model.num_classes, config.model.num_candidates = _CLASSES, num_candidates
    model = create_model(config.model)
    optimizer = create_optimizer(config.train, lambda _: 0.1, config.model.pixel_scale)
    state = create_state(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3))), optimizer)
    examples = {"image": _images(batch), "label": np.arange(batch, dtype=np.int32)}
    mean_rgb, ddof = (120.0, 120.0, 120.0), config.model.balance_ddof
    step = make_train_step(model, optimizer, config.train, seed=0, mean_rgb=mean_rgb, balance_ddof=ddof)
    program = jax.jit(step, donate_argnums=0, compiler_options=compiler_options()).lower(state, examples).compile()

    def run() -> None:
        nonlocal state
        state, metrics = program(state, examples)
        jax.block_until_ready((state, metrics))

    return run


def torch_step(batch: int, compiled: bool = False) -> Callable[[], None]:
    """The same in PyTorch, with 16 candidates."""
    import torch
    import torch_peer

    device = torch_device()
    trainer = torch_peer.Trainer(16, device, compiled)
    pixels = torch.tensor(_images(batch)).permute(0, 3, 1, 2).float() - 120
    pixels = pixels.to(device, memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device)

    def run() -> None:
        trainer.step(pixels, labels)
        torch_peer.synchronize(device)

    return run


def peak_memory(kind: str, batch: int) -> float:
    """Peak memory in MB that parameters, optimiser and steps add to a process in which the library is loaded.

    It is measured in a new process, on a CPU under Linux.

    Args:
      kind: `jax` or `torch`.
      batch: images in a batch.
    """
    output = subprocess.run([sys.executable, __file__, kind, str(batch)], check=True, capture_output=True, text=True)
    return float(output.stdout.split()[-1])


def _print_peak_memory(kind: str, batch: int) -> None:
    if kind == "torch":
        import torch

        torch.ones(1).sum()
    jnp.ones(1).block_until_ready()
    before = _resident("VmRSS")
    step = torch_step(batch) if kind == "torch" else jax_step(16, batch)
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # return the memory that compilation needed
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    for _ in range(3):
        step()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """Resident memory of this process in MB, now (`VmRSS`) or at its peak (`VmHWM`), from Linux's /proc."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


if __name__ == "__main__":
    _print_peak_memory(sys.argv[1], int(sys.argv[2]))
