"""Benchmarks conversion and reading on synthetic images in the layout of downsampled ImageNet.

python tools/bench_data.py make /tmp/bench/in --images 200000     # writes ten pickles and val_data
python tools/bench_data.py convert /tmp/bench/in /tmp/bench/out   # images/s, peak memory; --kills 4 kills and resumes
python tools/bench_data.py read /tmp/bench/out                    # compared with a plain Grain chain and a memory copy
python tools/bench_data.py codecs /tmp/bench/out                  # size and speed of each codec
"""

import itertools
import pickle
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gmsop_jax.config import default_config
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import train_batches
from gmsop_jax.data.records import CODECS, HEADER, decode, decode_batch, encode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.files import sha256

_SIDE = 64


def make(folder: Path, count: int) -> None:
    """Writes `count` training images in ten pickles, and a tenth as many validation images."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for batch in range(11):
        rows = count // 10
        # Smooth shapes with noise, which PNG can compress a little; no two images are equal.
        coarse = rng.integers(0, 256, (rows, 3, 8, 8), np.uint8).repeat(8, 2).repeat(8, 3)
        pixels = (coarse // 2 + rng.integers(0, 64, (rows, 3, _SIDE, _SIDE), np.uint8)).reshape(rows, -1)
        value: dict[str, Any] = {"data": pixels, "labels": rng.integers(1, 1001, rows).tolist()}
        name = "val_data" if batch == 10 else f"train_data_batch_{batch + 1}"
        with (folder / name).open("wb") as file:
            pickle.dump(value, file, protocol=4)


def measure_conversion(source: Path, output: Path, workers: int, kills: int) -> None:
    """Converts in a separate process, then again with SIGKILLs in between, and compares the bytes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, peak = _convert(source, output, workers, None)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    total = sum(split.num_images for split in Manifest.load(output).splits.values())
    print(f"{workers} workers: {total:,} images in {seconds:.1f} s, {total / seconds:,.0f} images/s")
    print(f"processor time {processor:.1f} s, {processor / total * 1e6:.0f} µs per image, including checksums")
    print(f"peak memory of all processes together (proportional set size): {peak / 2**20:.0f} MiB")
    if not kills:
        return
    again = output.with_name(f"{output.name}-killed")
    chance = random.Random(0)
    for _ in range(kills):
        _convert(source, again, workers, kill_after=chance.uniform(0.1, 0.9) * seconds / kills)
        done = len(list(again.glob("*.arrayrecord")))
        print(f"SIGKILL with {done} shards complete, {len(list(again.glob('*.tmp-*')))} under temporary names")
    _convert(source, again, workers, None)
    sums = [{path.name: sha256(path) for path in folder.iterdir()} for folder in (output, again)]
    print("resumed: " + ("identical, byte for byte" if sums[0] == sums[1] else f"DIFFERENT: {sums}"))
    shutil.rmtree(again)


def _convert(source: Path, output: Path, workers: int, kill_after: float | None) -> tuple[float, int]:
    """Returns the seconds and the peak memory in bytes of a conversion, which may be killed after some seconds."""
    tool = Path(__file__).with_name("convert.py")
    arguments = ["imagenet64", "--input", source, "--output", output, "--workers", str(workers)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, tool, *arguments], stdout=subprocess.DEVNULL)
    while process.poll() is None:
        peak = max(peak, _memory(process.pid))
        if kill_after is not None and time.perf_counter() - start > kill_after:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    if kill_after is None and process.returncode:
        raise SystemExit(process.returncode)
    return time.perf_counter() - start, peak


def _memory(pid: int) -> int:
    """Returns the memory in bytes of a process and its children, with shared pages divided among them."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0  # the process has just ended
    size = next((int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")), 0)
    return 1024 * size + sum(_memory(int(child)) for child in children)


def measure_reading(directory: Path, batch_size: int, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Measures and prints the speed of the pipeline, a plain chain and a memory copy, which run in turn.

    Returns: the median, minimum and maximum of images/s by the name of the method.
    """
    manifest = Manifest.load(directory)
    height, width = manifest.split("train").image_size or (_SIDE, _SIDE)
    # larger than the processor's caches, like the page cache
    memory = [np.full((batch_size, height, width, 3), at, np.uint8) for at in range(64)]

    def pipeline(num_threads: int, crop: str = "none") -> Iterator[Any]:
        config = default_config()
        config.train.batch_size = batch_size
        config.data.update(dir=str(directory), num_threads=num_threads, crop=crop)
        return train_batches(config.data, config.train, manifest, seed=0)

    chains: dict[str, Callable[[], Iterator[Any]]] = {
        "plain chain": lambda: _plain_chain(directory, batch_size),
        "plain chain, batched in 2 threads": lambda: _plain_chain(directory, batch_size, 2),
        "pipeline, 1 thread": lambda: pipeline(1),
        "pipeline, 2 threads (default)": lambda: pipeline(2),
        "pipeline, 4 threads": lambda: pipeline(4),
        "pipeline, 2 threads, padded crop": lambda: pipeline(2, "padded"),
        "pipeline, 2 threads, resized crop": lambda: pipeline(2, "resized"),
        "memory copy of a batch": lambda: map(np.copy, itertools.cycle(memory)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in chains}
    for _ in range(rounds):
        for name, make_iterator in chains.items():
            speeds[name].append(_speed(make_iterator(), batch_size, seconds))
    rows = {name: [statistics.median(found), min(found), max(found)] for name, found in speeds.items()}
    plain, *_ = rows["plain chain"]
    for name, (median, low, high) in rows.items():
        print(f"{name:34} {median:>11,.0f} images/s {median / plain:6.2f}× ({low:,.0f}–{high:,.0f})")
    return rows


def reading_table(rows: dict[str, list[float]]) -> str:
    """The result of `measure_reading` as a table in Markdown."""
    plain, *_ = rows["plain chain"]
    lines = [
        "| reading 64×64 images | images/s, median (minimum–maximum) | relative to the plain chain |",
        "|---|---|---|",
    ]
    for name, (median, low, high) in rows.items():
        lines.append(f"| {name} | {median:,.0f} ({low:,.0f}–{high:,.0f}) | {median / plain:.1f}× |")
    return "\n".join(lines)


def _plain_chain(directory: Path, batch_size: int, threads: int | None = None) -> Iterator[Any]:
    """Returns the usual Grain chain, record by record, with as little parsing as possible and no flips.

    By default, Grain's own threads read single records ahead. With `threads`, that many threads read whole batches.
    """
    split = Manifest.load(directory).split("train")
    size = (*(split.image_size or (_SIDE, _SIDE)), -1)

    def parse(record: bytes) -> dict[str, Any]:
        label = int.from_bytes(record[12:16], "little")
        pixels = np.frombuffer(record, np.uint8, offset=HEADER.itemsize)
        return {"image": pixels.reshape(size), "label": label}

    files = [str(directory / shard.file) for shard in split.shards]
    source: Any = grain.sources.ArrayRecordDataSource(files)
    chain = grain.MapDataset.source(source).shuffle(seed=0).repeat().map(parse)
    if threads is None:
        return iter(chain.to_iter_dataset().batch(batch_size))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(chain.batch(batch_size).to_iter_dataset(options))


def _speed(iterator: Iterator[Any], batch_size: int, seconds: float) -> float:
    for _ in range(20):  # fill the buffers and open the files
        next(iterator)
    start, batches = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < seconds:
        next(iterator)
        batches += 1
    return batches * batch_size / passed


def measure_codecs(directory: Path, count: int) -> None:
    """Prints the bytes per record, and the microseconds to encode and decode a record."""
    reader = ShardReader(directory, Manifest.load(directory).split("train").shards)
    examples = [decode(record) for record in reader.read(np.arange(count))]
    gray = all((e["image"] == e["image"][..., :1]).all() for e in examples)
    images = [example["image"][..., :1] if gray else example["image"] for example in examples]
    for codec in CODECS:
        start = time.perf_counter()
        records = [encode(image, 0, codec=codec) for image in images]
        middle = time.perf_counter()
        for at in range(0, count, 250):
            decode_batch(records[at : at + 250])
        end = time.perf_counter()
        size = sum(map(len, records)) / count
        print(
            f"{codec}: {size:,.0f} bytes, encode {(middle - start) / count * 1e6:.1f} µs, decode "
            f"{(end - middle) / count * 1e6:.1f} µs"
        )


def main() -> None:
    """Parses the command line and runs one benchmark."""
    parser = ArgumentParser(description="Benchmarks conversion and reading on synthetic images.")
    parser.add_argument(
        "command", choices=("make", "convert", "read", "codecs"), help="the benchmark; see the top of this file"
    )
    parser.add_argument("folder", type=Path, help="the synthetic images (make, convert) or the data set (read, codecs)")
    parser.add_argument("output", type=Path, nargs="?", help="convert: the folder for the data set")
    parser.add_argument("--images", type=int, default=200_000, help="make: training images (default: 200,000)")
    parser.add_argument("--workers", type=int, default=2, help="convert: processes (default: 2)")
    parser.add_argument("--kills", type=int, default=0, help="convert: how often to kill and resume (default: 0)")
    parser.add_argument("--batch-size", type=int, default=256, help="read: images per batch (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="read: measurements of each method (default: 5)")
    parser.add_argument("--seconds", type=float, default=2, help="read: duration of a measurement (default: 2)")
    parser.add_argument("--count", type=int, default=2000, help="codecs: images (default: 2,000)")
    args = parser.parse_args()
    if (args.command == "convert") != (args.output is not None):
        parser.error("convert takes two folders, and the other commands take one")
    if args.command == "make":
        make(args.folder, args.images)
    elif args.command == "convert":
        measure_conversion(args.folder, args.output, args.workers, args.kills)
    elif args.command == "read":
        measure_reading(args.folder, args.batch_size, args.rounds, args.seconds)
    else:
        measure_codecs(args.folder, args.count)


if __name__ == "__main__":
    sys.exit(run_command(main))
