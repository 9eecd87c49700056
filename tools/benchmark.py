"""Compares the speed of the pooling, the mixture, the training step and the data pipeline with the machine's ceilings.

    python tools/benchmark.py {ops,roots,mixture,step,pipeline,all} [--peer torch] [--json FILE] [--docs PAGE]
    python tools/benchmark.py accelerator --out FILE [--docs docs/performance.md]
    python tools/benchmark.py {lowering,compiled} [--docs docs/performance.md]

All cases of a table are run in turn, in one process, except that on a CPU each case of `step` has its own process.
The table shows the median time and the quartiles. Operations (a multiply-add counts as two) and bytes are those that
the work needs, not those that the code performs. The share is the time that the work would take at the measured
ceilings (the fastest matrix product and a copy), divided by the median.

`roots` compares the square root with those of other libraries that are installed. `accelerator` measures correctness,
speed and memory on a GPU or TPU in at most 8 minutes; run it again to continue, or to repeat what failed. `lowering`
and `compiled` measure nothing and need no GPU: the first counts products and copies in programs that JAX lowers for a
GPU, and the second compiles training steps for an H100, and shows the memory that XLA plans and the memory traffic.
"""

import argparse
import os
import pathlib
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import bench_data
import jax
from bench_lowering import lowering_rows, lowering_table
from bench_ops import mixture_cases, pooling_cases
from bench_roots import root_cases, root_table
from bench_step import peak_memory, step_cases
from bench_timing import ceilings, measure, report, speed_table, torch_device
from sections import write_section

from gmsop_jax.conversion.convert import convert
from gmsop_jax.errors import ArgumentParser, UserError, run_command
from gmsop_jax.files import write_json

_PACKAGES = {"jax": ("jax", "jax"), "PyTorch": ("torch", "torch"), "OTT-JAX": ("ott", "ott-jax")}  # module, package
_KINDS = ("ops", "roots", "mixture", "step", "pipeline")
_ALONE = ("accelerator", "lowering", "compiled")


def main() -> None:
    """Parses the command line and prints the tables."""
    parser = ArgumentParser(description="Measures speed, and compares it with the machine's ceilings and with PyTorch.")
    parser.add_argument("what", nargs="+", choices=(*_KINDS, "all", *_ALONE), help="tables; see the top of this file")
    parser.add_argument("--peer", choices=("torch",), help="compare with PyTorch (pip install '.[bench]')")
    parser.add_argument(
        "--batch", type=int, default=16, help="images in a batch of roots, mixture and step (default: 16)"
    )
    parser.add_argument("--pool-batch", type=int, default=64, help="images in a batch of the pooling (default: 64)")
    parser.add_argument("--images", type=int, default=20_000, help="images that the pipeline reads (default: 20000)")
    parser.add_argument("--repeats", type=int, default=10, help="number of measurements of each case (default: 10)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure the processor time of all threads, for one core (taskset) of a machine that runs other programs",
    )
    parser.add_argument("--compute-dtype", default="", choices=("", "bfloat16"), help="dtype of the convolutions")
    parser.add_argument("--json", "--out", metavar="FILE", type=pathlib.Path, help="write the results to this file")
    parser.add_argument("--docs", metavar="PAGE", type=pathlib.Path, help="put the tables into this page")
    parser.add_argument("--toy", action="store_true", help="accelerator: tiny sizes, to try the tool on a CPU")
    options = parser.parse_args()
    if len(options.what) > 1 and set(_ALONE) & set(options.what):
        parser.error(f"{', '.join(_ALONE[:-1])} and {_ALONE[-1]} can't be combined with other tables")
    if options.what == ["accelerator"]:
        return measure_accelerator(options)
    if options.what[0] in ("lowering", "compiled"):
        return show_programs(options.what[0], options)
    print(machine())
    results: dict[str, Any] = {}
    for kind in _KINDS if "all" in options.what else options.what:
        print(f"\n{kind}")
        results[kind] = run(kind, options)
    if options.json:
        write_json(options.json, results)
    if options.docs:
        for name, text in sections(results).items():
            write_section(options.docs, name, f"{machine()}{', processor times' * options.processor_time}\n\n{text}")


def sections(results: dict[str, Any]) -> dict[str, str]:
    """The tables of the documentation by the names of their sections."""
    texts = {}
    if "roots" in results:
        texts["roots"] = root_table(results["roots"])
    if "pipeline" in results:
        texts["reading"] = bench_data.reading_table(results["pipeline"])
    if {"ops", "mixture", "step"} <= results.keys():
        step = results["step"]
        rows = step["rows"] if isinstance(step, dict) else step
        texts["speed"] = speed_table([*results["ops"], *results["mixture"], *rows])
        if isinstance(step, dict):
            texts["speed"] += f"\n\n{peak_memory_text(step['peak_mb'])}"
    return texts


def measure_accelerator(options: argparse.Namespace) -> None:
    """Measures what the file does not contain yet, and writes the table."""
    from bench_accelerator import measure_all, table

    if options.json is None:
        raise UserError("accelerator needs --out FILE, to which it writes each result so that a later call continues")
    text = table(measure_all(options.json, toy=options.toy, isolated=not options.toy))
    print(f"\n{text}")
    if options.docs:
        write_section(options.docs, "accelerator", text)


def show_programs(what: str, options: argparse.Namespace) -> None:
    """Prints the table of `lowering` or `compiled`, which need no GPU."""
    if what == "lowering":
        rows = lowering_rows()
        text = lowering_table(rows)
    else:
        from bench_compiled import compiled_rows, compiled_table

        rows = compiled_rows()
        text = f"jax {version('jax')}\n\n{compiled_table(rows)}"
    print(text)
    if options.json:
        write_json(options.json, rows)
    if options.docs:
        write_section(options.docs, what, text)


def machine() -> str:
    """The device, and the versions of the libraries."""
    versions = [f"{title} {version(package)}" for title, (module, package) in _PACKAGES.items() if find_spec(module)]
    return ", ".join([device(), *versions, f"Python {platform.python_version()}"])


def device() -> str:
    """The name of the accelerator, or of the processor under Linux."""
    kind = jax.devices()[0].device_kind
    info = pathlib.Path("/proc/cpuinfo")
    if kind != "cpu" or not info.exists():
        return kind
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else kind}, {os.cpu_count()} cores"


def run(kind: str, options: argparse.Namespace) -> Any:
    """Measures and prints one table, and returns its results."""
    if kind == "pipeline":
        return measure_pipeline(options.images)
    if kind == "ops":
        cases = pooling_cases(options.peer, options.pool_batch)
    elif kind == "roots":
        cases = [case for width in (64, 128, 256) for case in root_cases(width, options.batch)]
    elif kind == "mixture":
        cases = mixture_cases(options.batch)
    else:
        cases = step_cases(options.peer, options.batch, options.compute_dtype)
    cases = [*ceilings(), *cases]
    measure(cases, options.repeats, time.process_time if options.processor_time else time.perf_counter)
    rows = report(cases)
    if kind != "step" or torch_device() != "cpu":
        return rows
    peaks = {kind: peak_memory(kind, options.batch) for kind in ("jax", *([options.peer] if options.peer else []))}
    print(peak_memory_text(peaks))
    return {"rows": rows, "peak_mb": peaks}


def peak_memory_text(peaks: dict[str, float]) -> str:
    """A sentence with the peak memory of the step in each library."""
    return "Peak memory of the step: " + ", ".join(f"{kind} {mb:.0f} MB" for kind, mb in peaks.items()) + "."


def measure_pipeline(num_images: int) -> dict[str, list[float]]:
    """Compares reading synthetic 64×64 images with a plain Grain chain and with a memory copy."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = pathlib.Path(folder, "source"), pathlib.Path(folder, "shards")
        bench_data.make(source, num_images)
        convert("imagenet64", source, output, progress=False)
        return bench_data.measure_reading(output, batch_size=256, rounds=5, seconds=2)


if __name__ == "__main__":
    sys.exit(run_command(main))
