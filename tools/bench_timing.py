"""Timing for `benchmark.py`: cases, the machine's ceilings, interleaved runs, and tables of the results."""

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gmsop_jax.training.parallel import compiler_options

CEILING = "ceiling: "


@dataclasses.dataclass
class Case:
    """One computation to time.

    Attributes:
      name: its name in the table.
      run: runs the computation once, and returns when it is done. It can be a `Worker`.
      flops: floating-point operations that the computation needs; a multiply-add counts as two.
      bytes: bytes that the computation must read and write.
      versus: the name of the case in the same table that it is compared with, or "".
      seconds: the measured times.
    """

    name: str
    run: Callable[[], Any]
    flops: float = 0.0
    bytes: float = 0.0
    versus: str = ""
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        """The median time in seconds."""
        return float(np.median(self.seconds))

    def time(self, clock: Callable[[], float]) -> float:
        """Runs the computation once. Returns the seconds that it took."""
        return self.run(clock) if isinstance(self.run, Worker) else _time(self.run, clock)


class Worker:
    """A computation in a process of its own, so that no other library or computation affects its memory and threads.

    Args:
      create: a function at the top of a module, which returns the computation.
      arguments: its arguments.
    """

    def __init__(self, create: Callable[..., Callable[[], Any]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, create, arguments), daemon=True)
        self._process.start()
        other.close()  # so that the death of the process ends the pipe

    def __call__(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """Runs the computation once. Returns the seconds that it took in its process.

        Raises:
          EOFError: if the process died; it has then printed why.
        """
        self._connection.send(clock)
        return self._connection.recv()


def _serve(connection: Any, create: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    run = create(*arguments)
    while True:
        try:
            clock = connection.recv()
        except EOFError:  # the benchmark has ended
            return
        connection.send(_time(run, clock))


def _time(run: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    run()
    return clock() - started


class Program:
    """A function that is compiled for its arguments. A call runs it and waits for the result.

    Args:
      function: the function.
      *arguments: its arguments.
      donate: the positions of arguments whose memory it may overwrite.
      options: options of XLA; by default those of `gmsop train`.
    """

    def __init__(
        self,
        function: Callable,
        *arguments: Any,
        donate: tuple[int, ...] = (),
        options: dict[str, Any] | None = None,
    ):
        options = compiler_options() if options is None else options
        jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
        self._program, self._arguments = jitted.lower(*arguments).compile(), arguments

    def __call__(self, *arguments: Any) -> Any:
        """Runs the function with the arguments that it was compiled for, or with others of the same shapes."""
        return jax.block_until_ready(self._program(*(arguments or self._arguments)))

    @property
    def peak_mb(self) -> float:
        """The memory in MB that XLA plans for arguments, results and everything in between."""
        plan: Any = self._program.memory_analysis()
        sizes = plan.argument_size_in_bytes, plan.output_size_in_bytes, plan.temp_size_in_bytes
        return (sum(sizes) - plan.alias_size_in_bytes) / 1e6


def with_gradient(function: Callable) -> Callable:
    """Returns a function (arguments, cotangent) → value and gradients."""

    def value_and_gradients(arguments, cotangent):
        value, pullback = jax.vjp(function, *arguments)
        return value, pullback(cotangent)

    return value_and_gradients


def normal(*shape: int) -> jax.Array:
    """Standard normal float32 numbers, which depend on the shape alone."""
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def torch_device() -> str:
    """PyTorch's name for the kind of device that JAX runs on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def ceilings(width: int = 128) -> list[Case]:
    """The ceilings of the machine: a large matrix product, a batch of small ones, and a copy."""
    large, batch, memory = normal(2048, 2048), normal(256, width, width), normal(1 << 24)
    return [
        # the copy comes first, because freeing its memory would slow down the case after it
        Case(f"{CEILING}copy", Program(jnp.negative, memory), 0, 2 * memory.nbytes),
        Case(f"{CEILING}256 × {width}² products", Program(jnp.matmul, batch, batch), 256 * 2 * width**3),
        Case(f"{CEILING}2048² product", Program(jnp.matmul, large, large), 2 * 2048**3),
    ]


def measure(cases: list[Case], repeats: int, clock: Callable[[], float] = time.perf_counter) -> None:
    """Runs all cases in turn, `repeats` times, after a warm-up round that is not counted."""
    for turn in range(repeats + 1):
        for i, case in enumerate(cases, 1):
            _show_progress(f"round {turn}/{repeats}, case {i}/{len(cases)}: {case.name}")
            seconds = case.time(clock)
            if turn:
                case.seconds.append(seconds)
    _show_progress("")


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def report(cases: list[Case]) -> list[dict[str, Any]]:
    """Prints a table of measured cases, and returns its rows for JSON."""
    ceilings = [case for case in cases if case.name.startswith(CEILING)]
    flops_per_second = max(case.flops / case.median for case in ceilings)
    bytes_per_second = max(case.bytes / case.median for case in ceilings)
    medians = {case.name: case.median for case in cases}
    rows = []
    for case in cases:
        least = max(case.flops / flops_per_second, case.bytes / bytes_per_second)
        speedup = medians[case.versus] / case.median if case.versus in medians else None
        row = {
            "name": case.name,
            "gflop": case.flops / 1e9,
            "mb": case.bytes / 1e6,
            "ms": case.median * 1e3,
            "quartiles_ms": (np.percentile(case.seconds, (25, 75)) * 1e3).tolist(),
            "share_of_ceiling": least / case.median,
            "times_faster_than": {case.versus: speedup} if speedup else {},
        }
        rows.append(row)
    _print_table(rows)
    return rows


def _print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'':44}{'GFLOP':>8}{'MB':>8}{'ms':>9}{'quartiles':>17}{'share':>7}  speed-up")
    for row in rows:
        low, high = row["quartiles_ms"]
        speedup = "".join(f"{ratio:.2f}× {name}" for name, ratio in row["times_faster_than"].items())
        line = (
            f"{row['name']:44}{row['gflop']:8.2f}{row['mb']:8.1f}{row['ms']:9.1f}"
            f"{f'{low:.1f}–{high:.1f}':>17}{row['share_of_ceiling']:7.0%}  {speedup}"
        )
        print(line.rstrip())


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `report` as a table in Markdown. Rows that occur in several reports, the ceilings, are listed once."""
    lines = ["| work | GFLOP | ms, median (quartiles) | share of the ceiling | speed-up |", "|---|---|---|---|---|"]
    for row in {row["name"]: row for row in rows}.values():
        low, high = row["quartiles_ms"]
        speedup = ", ".join(f"{ratio:.2f}× {name}" for name, ratio in row["times_faster_than"].items())
        lines.append(
            f"| {row['name']} | {row['gflop']:.1f} | {row['ms']:.3g} ({low:.3g}–{high:.3g}) |"
            f" {row['share_of_ceiling']:.0%} | {speedup} |"
        )
    return "\n".join(lines)
