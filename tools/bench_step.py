"""Cases of `benchmark.py` for the training step of ResNet-18 GM-SOP on 64×64 images, and its peak memory."""

# pyright: reportMissingImports=false
import ctypes
import gc
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import POSITIONS, PROJECTION_FLOPS, TRIANGLE, WIDTH, pooling_flops
from bench_timing import Case, Program, Worker, torch_device
from jax.sharding import Mesh

from gmsop_jax.config import ConfigDict, default_config
from gmsop_jax.models import create_model
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.parallel import AXIS, compile_train_step, replicate
from gmsop_jax.training.step import TrainState, create_state, make_train_step

_CLASSES = 1000


def step_cases(peer: str | None, batch: int, compute_dtype: str) -> list[Case]:
    """Training steps with 16 and with 128 candidates, of which each image selects 8.

    On a CPU, each case has a process of its own, as a run of `gmsop train` does.
    """
    flops = batch * step_flops()
    name, wide = (f"step, batch {batch}, N = {n}, K = 8" for n in (16, 128))
    cases = [
        Case(name, _create(gmsop_step, 16, batch, compute_dtype), flops, versus="step, PyTorch" if peer else ""),
        Case(wide, _create(gmsop_step, 128, batch, compute_dtype), flops, versus=name),
    ]
    if peer:
        cases.append(Case("step, PyTorch", _create(torch_step, batch), flops))
        if torch_device() == "cuda":
            cases.append(Case("step, torch.compile", torch_step(batch, "inductor"), flops))
    return cases


def _create(create: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], Any]:
    return Worker(create, *arguments) if torch_device() == "cpu" else create(*arguments)


def step_flops() -> float:
    """Floating-point operations of the training step with 16 candidates for one image.

    The backward pass of a product takes two products, so each product counts three times. The pooling is counted as in
    `pooling_flops`.
    """
    backbone = 9 * (64 * 64 * (3 * 16 + 4 * 16 * 16) + 32 * 32 * (16 * 32 + 3 * 32 * 32))
    backbone += 9 * 16 * 16 * (32 * 64 + 3 * 64 * 64 + 64 * 128 + 3 * 128 * 128)
    shortcuts = 32 * 32 * 16 * 32 + 16 * 16 * (32 * 64 + 64 * 128)
    classifiers = TRIANGLE * (_CLASSES + 2 * 16)  # and the two linear maps of the gate
    pooled = 8 + 1  # the selected candidates, and the gate
    products = 2 * (backbone + shortcuts + classifiers) + pooled * PROJECTION_FLOPS
    return 3 * products + pooled * pooling_flops(POSITIONS, WIDTH)


def _images(batch: int, side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)


def make_batch(config: ConfigDict, batch: int) -> dict[str, np.ndarray]:
    """Random images of the size in the configuration, and labels."""
    return {"image": _images(batch, config.data.image_size or 64), "label": np.arange(batch, dtype=np.int32) % 10}


def make_step(config: ConfigDict, axis_name: str | None = None) -> tuple[Callable, Callable[[], TrainState]]:
    """The training step of a configuration with `model.num_classes`, and the function that creates its state."""
    side = config.data.image_size or 64
    model = create_model(config.model, axis_name=axis_name)
    optimizer = create_optimizer(config.train, lambda _: 0.1, config.model.pixel_scale)

    def init() -> TrainState:
        variables = jax.jit(create_model(config.model).init)(jax.random.key(0), jnp.zeros((1, side, side, 3)))
        return create_state(variables, optimizer)

    mean_rgb, ddof = (120.0, 120.0, 120.0), config.model.balance_ddof
    step = make_train_step(
        model, optimizer, config.train, seed=0, mean_rgb=mean_rgb, balance_ddof=ddof, axis_name=axis_name
    )
    return step, init


class JaxStep:
    """A training step on one batch of random images. A call takes the step and waits for its result.

    Args:
      config: a configuration in which `model.num_classes` is set.
      batch: number of images.
      mesh: the devices to split the batch over; by default one device, without a mesh.
      options: options of XLA for one device; by default those of `gmsop train`.
    """

    def __init__(self, config: ConfigDict, batch: int, mesh: Mesh | None = None, options: dict[str, Any] | None = None):
        step, init = make_step(config, AXIS if mesh else None)
        self.state = init()
        self.batch: Any = make_batch(config, batch)
        if mesh:
            self.program, place = compile_train_step(step, mesh, "jit")
            self.state, self.batch = replicate(self.state, mesh), place(self.batch)
        else:
            self.program = Program(step, self.state, self.batch, donate=(0,), options=options)

    def __call__(self) -> None:
        """Takes one step."""
        self.state, metrics = self.program(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


def gmsop_step(num_candidates: int, batch: int, compute_dtype: str = "") -> JaxStep:
    """The step of ResNet-18 GM-SOP."""
    config = default_config()
    config.compute_dtype = compute_dtype
    config.model.num_classes, config.model.num_candidates = _CLASSES, num_candidates
    return JaxStep(config, batch)


def torch_step(batch: int, backend: str = "") -> Callable[[], None]:
    """The same step in PyTorch, with 16 candidates; `backend` is that of torch.compile, "" means eager."""
    import torch
    import torch_peer

    device = torch_device()
    trainer = torch_peer.Trainer(16, device, backend)
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
    step = torch_step(batch) if kind == "torch" else gmsop_step(16, batch)
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # return the memory that compilation needed
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    for _ in range(3):
        step()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """Resident memory of this process in MB, now (`VmRSS`) or at its peak (`VmHWM`). Linux states it in KiB."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) * 1024 / 1e6


if __name__ == "__main__":
    _print_peak_memory(sys.argv[1], int(sys.argv[2]))
