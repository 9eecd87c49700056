"""Converts data sets in other formats to shards: in parallel, in constant memory, and resumably.

Each shard is a pure function of the source and the settings. It is written under a temporary name, renamed when it is
complete, and recorded as finished. A conversion that is resumed skips the finished shards and converts the others, so
the result is the same, byte for byte.
"""

import contextlib
import functools
import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gmsop_jax
from gmsop_jax.conversion import job as jobs
from gmsop_jax.conversion.job import ConversionJob
from gmsop_jax.conversion.progress import count_images
from gmsop_jax.conversion.shards import ShardTask, split_order, write_shard
from gmsop_jax.conversion.sources import Options, Request, Source, UnreadableImage, open_source
from gmsop_jax.conversion.sources.files import check_space
from gmsop_jax.data.manifest import JOB_DIR, Manifest
from gmsop_jax.data.records import CODECS, HEADER, Codec, encode
from gmsop_jax.errors import ConfigError, DataError, UserError
from gmsop_jax.files import sha256

_SHARD_BYTES = 128 * 2**20  # usual size of a shard
_RECORD_OVERHEAD = HEADER.itemsize + 72  # bytes that the header and the container add to a record, rounded up
_SAMPLED_IMAGES = 128  # images encoded to estimate the size of a record
_IMAGES_FOR_PROCESSES = 20_000  # with fewer images, starting processes takes longer than the work

WriteShards = Callable[[Callable[[], object]], None]  # writes a worker's shards; calls its argument after each image


def convert(
    source_name: str,
    input_path: str | os.PathLike[str] | None,
    output_dir: str | os.PathLike[str],
    *,
    workers: int | None = None,
    shards: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    codec: Codec = "raw",
    options: Options | None = None,
    shard_range: tuple[int, int] = (0, 1),
    max_unreadable: float = 0.01,
    progress: bool = True,
) -> Manifest | None:
    """Converts a data set, resumes an unfinished conversion, or returns at once if the data set is already converted.

    Only one process converts a part of a data set at a time; others wait until it has ended.

    Args:
      source_name: one of `gmsop_jax.conversion.sources.NAMES`.
      input_path: the file or folder that was downloaded; None for the embedded sample of Fashion-MNIST, and for the
        installed package of ELPV.
      output_dir: a new or empty folder, or that of an unfinished conversion.
      workers: number of processes; by default one per core, or only this process for a small source.
      shards: number of training shards; by default, shards of about 128 MiB.
      limit: maximum number of images in each split, which are then chosen at random.
      seed: seed of the order of the training images, and of any random choice of a source.
      codec: format of the pixels in the records, 'raw', 'png' or 'jpeg'.
      options: options of the source.
      shard_range: (i, n) converts every n-th shard, beginning with shard i, counted from 0. When all n parts are
        converted, `job.join` joins them into one data set.
      max_unreadable: maximum fraction of unreadable images.
      progress: whether to show the progress on standard error.

    Returns: the manifest, or None if only a part of the shards was converted.

    Raises:
      ConfigError: if a setting is out of range, or the source is unknown or does not accept an option.
      DataError: if the source is invalid, too many images are unreadable, or the output folder contains other files or
        can't be written to.
      FileAccessError: if an input file can't be read.
    """
    _check_settings(workers, shards, limit, seed, codec, shard_range, max_unreadable)
    if "" in (input_path, output_dir):
        raise ConfigError(
            "the path of the input or of the output is empty; give a path, or omit the input if the source needs none"
        )
    output, options = Path(output_dir), options or Options()
    path = None if input_path is None else Path(input_path)
    with jobs.claim(output, shard_range):
        source = open_source(source_name, Request(path, output / JOB_DIR / "scratch", seed, options))
        pixel_bytes = _mean_pixel_bytes(source, seed, limit, codec)
        num_images = {split: min(count, limit or count) for split, count in source.num_images.items()}
        job = ConversionJob(
            source=source_name,
            options=options.given(),
            seed=seed,
            limit=limit,
            codec=codec,
            num_images=num_images,
            num_shards=_count_shards(num_images, shards, pixel_bytes),
            files=[[path.name, path.stat().st_size] for path in source.files],
            classes=list(source.classes),
            facts=dict(source.facts),
            tool_version=gmsop_jax.__version__,
        )
        if manifest := jobs.finished(output, job):
            jobs.remove_state(output)
            return manifest
        jobs.start(output, job)
        _write_shards(source, output, job, shard_range, workers, pixel_bytes, progress)
        return jobs.finish(output, max_unreadable, verify=False) if shard_range[1] == 1 else None


def _write_shards(
    source: Source,
    output: Path,
    job: ConversionJob,
    shard_range: tuple[int, int],
    workers: int | None,
    pixel_bytes: float,
    progress: bool,
) -> None:
    """Writes the shards of this part that are not finished yet, and the checksums of the input files."""
    tasks = job.tasks[shard_range[0] :: shard_range[1]]
    pending = [task for task in tasks if jobs.read_notes(output, task, verify=True) is None]
    total, remaining = (sum(task.stop - task.start for task in some) for some in (tasks, pending))
    check_space(output, math.ceil(remaining * (pixel_bytes + _RECORD_OVERHEAD)))
    hash_files = shard_range[0] == 0 and jobs.read_state(output, "sums") is None
    workers = min(workers or (1 if remaining < _IMAGES_FOR_PROCESSES else os.cpu_count() or 1), max(len(pending), 1))
    # The tasks are divided beforehand, because a killed worker could hold the lock of a queue.
    writers = [
        functools.partial(_write_tasks, source, output, job, pending[at::workers], hash_files and at == 0)
        for at in range(workers)
    ]
    with count_images("converting", total, initial=total - remaining, enabled=progress) as count:
        if workers == 1:
            writers[0](lambda: count(1))
        else:
            _run_in_processes(writers, output, count)


def _write_tasks(
    source: Source,
    output: Path,
    job: ConversionJob,
    tasks: Sequence[ShardTask],
    hash_files: bool,
    tick: Callable[[], object],
) -> None:
    orders = {split: split_order(source, split, job.seed, job.limit) for split in {task.split for task in tasks}}
    for task in tasks:
        rows = orders[task.split][task.start : task.stop].tolist()
        jobs.write_notes(output, *write_shard(source, task, rows, output, job.codec, tick))
    if hash_files:
        jobs.write_state(output, "sums", [sha256(path) for path in source.files])


def _run_in_processes(writers: Sequence[WriteShards], output: Path, advance: Callable[[int], object]) -> None:
    context = multiprocessing.get_context("spawn")  # forking a process that has threads, such as JAX's, may hang
    images_done = context.RawArray("q", len(writers))
    errors, processes = [], []
    try:
        for number, write in enumerate(writers):
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_run_worker, args=(write, number, images_done, send), daemon=True)
            process.start()
            send.close()
            errors.append(receive)
            processes.append(process)
        shown, running = 0, processes
        while running:
            multiprocessing.connection.wait([process.sentinel for process in running], 0.2)
            running = [process for process in processes if process.exitcode is None]
            now = sum(images_done)
            advance(now - shown)
            shown = now
            for process, receive in zip(processes, errors, strict=True):
                if process.exitcode:
                    raise _worker_error(process.exitcode, receive)
    finally:
        for process in processes:
            process.terminate()
            process.join()
            for leftover in output.glob(f"*.tmp-{process.pid}"):
                leftover.unlink()


def _worker_error(exit_code: int, errors: Connection) -> Exception:
    """Returns the error that a worker sent before it ended, or a general one if it sent none."""
    with contextlib.suppress(EOFError):
        if errors.poll():
            return errors.recv()
    return DataError(
        f"a worker process ended unexpectedly (exit code {exit_code}), often because there is not enough memory; run"
        " the same command again to resume, with fewer --workers"
    )


def _run_worker(write: WriteShards, number: int, images_done: Any, errors: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tick() -> None:
        images_done[number] += 1

    try:
        write(tick)
    except UserError as error:
        errors.send(error)
        sys.exit(1)
    except OSError as error:
        errors.send(DataError(f"a worker process failed ({error}); fix this and run the same command again to resume"))
        sys.exit(1)


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _count_shards(num_images: Mapping[str, int], shards: int | None, pixel_bytes: float) -> dict[str, int]:
    """Returns the number of shards of each split, in proportion to its images. The split `train` comes first."""
    images = num_images["train"]
    if not images:
        raise DataError("the source has no training images")
    train = shards or min(max(1, math.ceil(images * pixel_bytes / _SHARD_BYTES)), images)
    counts = {"train": train, **{split: max(1, round(train * n / images)) for split, n in num_images.items()}}
    for split, count in counts.items():
        if count > num_images[split]:
            raise DataError(
                f"split {split!r} has {num_images[split]} images, which can't fill {count} shards; use fewer shards"
            )
    return counts


def _mean_pixel_bytes(source: Source, seed: int, limit: int | None, codec: Codec) -> float:
    """Returns the mean size of a record's pixels in bytes, estimated from a random sample if it is unknown."""
    if codec == "raw" and source.image_bytes is not None:
        return source.image_bytes
    sizes = []
    for index in split_order(source, "train", seed, limit)[:_SAMPLED_IMAGES].tolist():
        with contextlib.suppress(UnreadableImage):  # counted when the shards are written
            image, _ = source.load("train", index)
            sizes.append(len(encode(image, 0, codec=codec)) - HEADER.itemsize)
    return sum(sizes) / max(len(sizes), 1)


def _check_settings(
    workers: int | None,
    shards: int | None,
    limit: int | None,
    seed: int,
    codec: str,
    shard_range: tuple[int, int],
    max_unreadable: float,
) -> None:
    for name, value in {"workers": workers, "shards": shards, "limit": limit}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must not be negative")
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}; it must be one of {', '.join(CODECS)}")
    if not 0 <= shard_range[0] < shard_range[1]:
        raise ConfigError(f"shard range {shard_range[0]}/{shard_range[1]} is not i/n with 0 ≤ i < n")
    if not 0 <= max_unreadable <= 1:
        raise ConfigError(f"max_unreadable is {max_unreadable}; it must be from 0 to 1")
