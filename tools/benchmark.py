"""Measures the pooling, the mixture, the training step and the data pipeline against what the machine can do.

    python tools/benchmark.py {ops,mixture,step,pipeline,all} [--peer torch] [--json FILE]

Everything in a table is measured in one process, in turns, and given as the median of the turns with the lower and
upper quartile. Operations (a multiply-add counts two) and bytes are those that the work needs, not those that the code
makes; the share is of the ceiling measured beside it: the faster of a large matrix product's rate and a copy's.
"""

# pyright: reportMissingImports=false
import argparse
import ctypes
import dataclasses
import gc
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gmsop_jax import ops
from gmsop_jax.config import default_config
from gmsop_jax.conversion.convert import convert
from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.models import create_model
from gmsop_jax.ops.dispatch import Dispatch
from gmsop_jax.training.optimizer import create_optimizer
from gmsop_jax.training.parallel import compiler_options
from gmsop_jax.training.step import create_state, make_train_step

WIDTH, POSITIONS, TRIANGLE = 128, 256, 8256


@dataclasses.dataclass
class Case:
    """One thing to time.

    `run` does the work once and returns when it is done; `flops` and `bytes` are what the work needs; `versus` names
    the case of the same table that it is compared with.
    """

    name: str
    run: Callable[[], Any]
    flops: float = 0.0
    bytes: float = 0.0
    versus: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))


def measure(cases: list[Case], repeats: int) -> None:
    """Runs the cases in turns; the first turn warms up and is not counted."""
    for turn in range(repeats + 1):
        for i, case in enumerate(cases):
            tell(f"{turn}/{repeats} {i + 1}/{len(cases)} {case.name}")
            started = time.perf_counter()
            case.run()
            if turn:
                case.seconds.append(time.perf_counter() - started)
    tell("")


def tell(text: str) -> None:
    """Shows progress where someone is watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def compiled(function: Callable, *arguments: Any) -> Callable[[], Any]:
    """Compiles for these arguments, and returns what runs it to its end."""
    program = jax.jit(function, compiler_options=compiler_options()).lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def normal(*shape: int) -> jax.Array:
    """Standard normal float32 numbers, the same for each shape."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def ceilings() -> list[Case]:
    """What the machine can do at best: a large product, a batch of small ones, a copy."""
    large, batch, memory = normal(2048, 2048), normal(256, WIDTH, WIDTH), normal(1 << 24)
    return [
        Case("ceiling: 2048² product", compiled(jnp.matmul, large, large), 2 * 2048**3),
        Case("ceiling: 256 × 128² products", compiled(jnp.matmul, batch, batch), 256 * 2 * WIDTH**3),
        Case("ceiling: copy", compiled(jnp.negative, memory), 0, 2 * memory.nbytes),
    ]


def plain_sqrt(sigma: jax.Array, num_iters: int = 3) -> jax.Array:
    """The iteration as the paper writes it, differentiated automatically."""
    trace = jnp.trace(sigma, axis1=-2, axis2=-1)[..., None, None]
    eye = jnp.eye(sigma.shape[-1], dtype=sigma.dtype)
    y, z = sigma / trace, eye
    for _ in range(num_iters):
        t = (3 * eye - z @ y) / 2
        y, z = y @ t, t @ z
    return jnp.sqrt(trace) * y


def plain_pool(x: jax.Array) -> jax.Array:
    """Second-order pooling with nothing of ours in it."""
    centred = x - jnp.mean(x, -2, keepdims=True)
    root = plain_sqrt(jnp.swapaxes(centred, -1, -2) @ centred / x.shape[-2])
    rows, columns = np.triu_indices(x.shape[-1])
    return root[..., rows, columns]


def with_gradient(function: Callable) -> Callable:
    """(arguments, cotangent) → value and gradients."""

    def both(arguments, cotangent):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(cotangent)

    return both


def pool_flops(positions: int, width: int) -> float:
    """Of one pooling forward and backward: covariance 1 + 1 products, n = 3 iterations 5 + 10."""
    return 2 * 2 * positions * width**2 + 15 * 2 * width**3


def ops_cases(peer: str | None, batch: int) -> list[Case]:
    """Covariance, square root and triangle, forward and backward."""
    x, g = normal(batch, POSITIONS, WIDTH), normal(batch, TRIANGLE)
    flops, bytes_ = batch * pool_flops(POSITIONS, WIDTH), 3 * x.nbytes + 2 * g.nbytes
    name = f"pooling {batch} × ({POSITIONS} × {WIDTH})"
    versus = f"{name}, PyTorch" if peer else f"{name}, plain JAX"
    cases = [
        Case(name, compiled(with_gradient(ops.second_order_pool), (x,), g), flops, bytes_, versus),
        Case(f"{name}, plain JAX", compiled(with_gradient(plain_pool), (x,), g), flops, bytes_),
    ]
    if peer:
        import torch
        import torch_peer

        tx, tg = (torch.tensor(np.asarray(a), device=torch_device()) for a in (x, g))
        tx.requires_grad_()

        def run():
            torch.autograd.grad(torch_peer.second_order_pool(tx), tx, tg)
            synchronize()

        cases.append(Case(f"{name}, PyTorch", run, flops, bytes_))
    return cases


def mixture_cases(batch: int) -> list[Case]:
    """The candidates, forward and backward: each dispatch, against all of them computed densely."""
    random = np.random.default_rng(0)
    cases = []
    for n, k in ((16, 8), (128, 8)):
        kernels = [normal(n, i, o) / 10 for i, o in ((128, 256), (256, 128))]
        x, g = jax.nn.relu(normal(batch, POSITIONS, WIDTH)), normal(batch, k, TRIANGLE)
        chosen = jnp.asarray(np.stack([random.permutation(n)[:k] for _ in range(batch)]), jnp.int32)
        projections = 3 * 2 * POSITIONS * (128 * 256 + 256 * 128)
        flops = batch * k * (projections + pool_flops(POSITIONS, WIDTH))
        bytes_ = 3 * x.nbytes + 2 * g.nbytes + 3 * sum(kernel.nbytes for kernel in kernels)
        dispatches: tuple[Dispatch, ...] = ("gather", "loop")
        for dispatch in dispatches:

            def run(x, kernels, dispatch: Dispatch = dispatch, chosen=chosen):
                return ops.apply_candidates(x, kernels, chosen, ops.second_order_pool, dispatch)

            program = compiled(with_gradient(run), (x, kernels), g)
            cases.append(Case(f"mixture N = {n}, K = {k}, {dispatch}", program, flops, bytes_, "mixture, dense"))
        if n == 16:
            program = compiled(with_gradient(dense_mixture), (x, kernels), normal(batch, n, TRIANGLE))
            cases.append(Case("mixture, dense", program, n / k * flops, bytes_))
    return cases


def dense_mixture(x: jax.Array, kernels: list[jax.Array]) -> jax.Array:
    """All candidates of all images."""
    y = x[:, None]
    for kernel in kernels:
        y = jax.nn.relu(y @ kernel)
    return ops.second_order_pool(y)


class JaxTrainer:
    """Our network, optimiser and training step on one batch."""

    def __init__(self, num_candidates: int, batch: int, compute_dtype: str):
        config = default_config()
        config.compute_dtype = compute_dtype
        config.model.num_classes, config.model.num_candidates = 1000, num_candidates
        model, optimizer = (
            create_model(config.model),
            create_optimizer(config.train, lambda _: 0.1, config.model.pixel_scale),
        )
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        self.batch = {"image": images(batch), "label": np.arange(batch, dtype=np.int32)}
        self.state = create_state(variables, optimizer)
        mean_rgb, ddof = (120.0, 120.0, 120.0), config.model.balance_ddof
        step = make_train_step(model, optimizer, config.train, seed=0, mean_rgb=mean_rgb, balance_ddof=ddof)
        program = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
        self.program = program.lower(self.state, self.batch).compile()

    def step(self) -> None:
        """One step, to its end."""
        self.state, metrics = self.program(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))


def images(batch: int) -> np.ndarray:
    """Random uint8 images [b, 64, 64, 3]."""
    return np.random.default_rng(0).integers(0, 256, (batch, 64, 64, 3), np.uint8)


def torch_step(num_candidates: int, batch: int, compiled: bool = False) -> Callable[[], None]:
    """One step of the peer, to its end."""
    import torch
    import torch_peer

    device = torch_device()
    trainer = torch_peer.Trainer(num_candidates, device, compiled)
    pixels = torch.tensor(images(batch)).permute(0, 3, 1, 2).float() - 120
    pixels = pixels.to(device, memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device)

    def run():
        trainer.step(pixels, labels)
        synchronize()

    return run


def torch_device() -> str:
    """The peer's device: the kind that JAX runs on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def synchronize() -> None:
    """Waits for the peer's device."""
    if torch_device() == "cuda":
        import torch

        torch.cuda.synchronize()


def step_flops() -> float:
    """Of one image's training step, ResNet-18 GM-SOP-16-8: three times the forward products, but for the pooling."""
    backbone = 2 * 9 * (64 * 64 * (3 * 16 + 4 * 16 * 16) + 32 * 32 * (16 * 32 + 3 * 32 * 32))
    backbone += 2 * 9 * 16 * 16 * (32 * 64 + 3 * 64 * 64 + 64 * 128 + 3 * 128 * 128)
    backbone += 2 * (32 * 32 * 16 * 32 + 16 * 16 * (32 * 64 + 64 * 128))
    projections = 9 * 2 * POSITIONS * (128 * 256 + 256 * 128)  # of 8 candidates and the gate
    classifier = 2 * TRIANGLE * (1000 + 2 * 16)
    return 3 * (backbone + projections + classifier) + 9 * pool_flops(POSITIONS, WIDTH)


def step_cases(peer: str | None, batch: int, compute_dtype: str) -> list[Case]:
    """Training steps of ResNet-18 GM-SOP."""
    name = f"step, batch {batch}, N = {{}}, K = 8"
    flops = batch * step_flops()
    wide = JaxTrainer(128, batch, compute_dtype).step
    cases = [
        Case(name.format(16), JaxTrainer(16, batch, compute_dtype).step, flops, 0, "step, PyTorch" if peer else ""),
        Case(name.format(128), wide, flops, 0, name.format(16)),
    ]
    if peer:
        cases.append(Case("step, PyTorch", torch_step(16, batch), flops))
        if torch_device() == "cuda":
            cases.append(Case("step, torch.compile", torch_step(16, batch, compiled=True), flops))
    return cases


def peak_memory(kind: str, batch: int) -> float:
    """MB that parameters, optimiser and steps add to a fresh process with its libraries loaded; on Linux, on a CPU."""
    command = [sys.executable, __file__, "step", "--batch", str(batch), "--peak-of", kind]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def print_peak(kind: str, batch: int) -> None:
    """What `peak_memory` runs in a process of its own."""
    if kind == "torch":
        import torch

        torch.ones(1).sum()
    jnp.ones(1).block_until_ready()
    before = resident("VmRSS")
    step = torch_step(16, batch) if kind == "torch" else JaxTrainer(16, batch, "").step
    step()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what compiling needed
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(3):
        step()
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MB of this process in memory: now (`VmRSS`) or at most (`VmHWM`); from Linux's /proc."""
    status = pathlib.Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def table(cases: list[Case]) -> list[dict[str, Any]]:
    """Prints the cases, and returns their rows."""
    gflops = max(case.flops / case.median for case in cases if case.name.startswith("ceiling"))
    bandwidth = max(case.bytes / case.median for case in cases if case.name.startswith("ceiling"))
    by_name = {case.name: case for case in cases}
    rows = []
    print(f"{'':44}{'GFLOP':>8}{'MB':>8}{'ms':>9}{'quartiles':>17}{'share':>7}{'ratio':>7}")
    for case in cases:
        low, high = np.percentile(case.seconds, (25, 75)) * 1e3
        floor = max(case.flops / gflops, case.bytes / bandwidth)
        ratio = by_name[case.versus].median / case.median if case.versus in by_name else None
        rows.append(
            {
                "name": case.name,
                "gflop": case.flops / 1e9,
                "mb": case.bytes / 1e6,
                "ms": case.median * 1e3,
                "quartiles_ms": [low, high],
                "share_of_ceiling": floor / case.median,
                "times_faster_than": {case.versus: ratio} if ratio else {},
            }
        )
        against = f"{ratio:6.2f}× {case.versus}" if ratio else ""
        print(
            f"{case.name:44}{case.flops / 1e9:8.2f}{case.bytes / 1e6:8.1f}{case.median * 1e3:9.1f}"
            f"{f'{low:.1f}–{high:.1f}':>17}{floor / case.median:7.0%}{against}"
        )
    return rows


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description="Measures speed against the machine's ceilings and PyTorch.")
    parser.add_argument("what", choices=("ops", "mixture", "step", "pipeline", "all"))
    parser.add_argument("--peer", choices=("torch",), help="compare with PyTorch (pip install '.[bench]')")
    parser.add_argument("--batch", type=int, default=16, help="images in a mixture's and a step's batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--compute-dtype", default="", choices=("", "bfloat16"), help="of our step's convolutions")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    parser.add_argument("--peak-of", choices=("jax", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of, options.batch)
        return
    kinds = ("ops", "mixture", "step", "pipeline") if options.what == "all" else (options.what,)
    print(f"{device()}, jax {jax.__version__}, Python {platform.python_version()}")
    report: dict[str, Any] = {}
    for kind in kinds:
        print(f"\n{kind}")
        report[kind] = run(kind, options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


def device() -> str:
    """The accelerator's name, or the processor's as Linux tells it."""
    kind = jax.devices()[0].device_kind
    info = pathlib.Path("/proc/cpuinfo")
    if kind != "cpu" or not info.exists():
        return kind
    model = next(line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line)
    return f"{model}, {os.cpu_count()} cores"


def measure_pipeline() -> None:
    """Reads 20,000 synthetic 64×64 images, against the plain chain of Grain and a memory copy."""
    import bench_data

    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder, "source"), pathlib.Path(folder, "shards")
        bench_data.make(source, 20_000)
        convert("imagenet64", source, output, progress=False)
        bench_data.measure_reading(output, batch_size=256, rounds=5, seconds=2)


def run(kind: str, options: argparse.Namespace) -> Any:
    """One table."""
    if kind == "pipeline":
        return measure_pipeline()
    cases = ceilings()
    if kind == "ops":
        cases += ops_cases(options.peer, 64)
    elif kind == "mixture":
        cases += mixture_cases(options.batch)
    else:
        cases += step_cases(options.peer, options.batch, options.compute_dtype)
    measure(cases, options.repeats)
    rows: Any = table(cases)
    if kind == "step" and torch_device() == "cpu":
        peaks = {who: peak_memory(who, options.batch) for who in (("jax", "torch") if options.peer else ("jax",))}
        print("peak memory of the step: " + ", ".join(f"{who} {mb:.0f} MB" for who, mb in peaks.items()))
        rows = {"rows": rows, "peak_mb": peaks}
    return rows


if __name__ == "__main__":
    sys.exit(run_command(main))
