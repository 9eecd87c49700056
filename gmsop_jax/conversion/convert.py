"""Foreign data sets → shards: parallel, in constant memory, and resumable to the same bytes.

Each shard is a pure function of the source and the settings: it is written under a temporary name,
renamed when whole, and noted. A killed conversion started again skips the noted shards and makes
the others.
"""

import contextlib
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tqdm import tqdm

import gmsop_jax
from gmsop_jax.conversion import job as jobs
from gmsop_jax.conversion.job import Job
from gmsop_jax.conversion.shards import Task, split_order, write_shard
from gmsop_jax.conversion.sources import Options, Request, Source, open_source
from gmsop_jax.conversion.sources.files import check_space
from gmsop_jax.data.manifest import JOB_DIR, Manifest, sha256
from gmsop_jax.data.records import CODECS, HEADER, Codec
from gmsop_jax.errors import ConfigError, DataError, UserError

_SHARD_BYTES = 128 * 2**20  # a shard's usual size
_RECORD_OVERHEAD = HEADER.itemsize + 72  # the container's bytes per record, rounded up
_SMALL = 20_000  # images below which starting processes takes longer than the work

Range = tuple[int, int]


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
    shard_range: Range = (0, 1),
    max_unreadable: float = 0.01,
    progress: bool = True,
) -> Manifest | None:
    """Converts a foreign data set; done already, it returns at once; unfinished, it resumes.

    Args:
      source_name: one of `gmsop_jax.conversion.sources.NAMES`.
      input_path: what was downloaded; None for a source that comes with the package.
      output_dir: a new, empty or unfinished folder.
      workers: processes; by default one per core, or none besides this one for a small source.
      shards: number of training shards; by default as many as make some 128 MiB each.
      limit: keep a random subset of at most this many images of each split.
      seed: of the training split's order and of any random choice a source makes.
      codec: of the records, 'raw', 'png' or 'jpeg'.
      options: the source's own.
      shard_range: (i, n) makes every n-th shard from the i-th; when all n jobs are done,
        `job.finish` joins them.
      max_unreadable: share of unreadable images above which the result is refused.
      progress: show a progress bar where there is a terminal.
    Returns: the manifest; None for a part of the shards.
    Raises: DataError or ConfigError for anything wrong with the source, the output folder or the
      settings.
    """
    _check_numbers(workers, shards, limit, seed, codec, shard_range, max_unreadable)
    output = Path(output_dir)
    with _folder(output):
        path = None if input_path is None else Path(input_path)
        chosen = options or Options()
        source = open_source(source_name, Request(path, output / JOB_DIR / "scratch", seed, chosen))
        job = _job(source_name, source, chosen, shards, limit, seed, codec)
        if manifest := jobs.finished(output, job):
            shutil.rmtree(output / JOB_DIR, ignore_errors=True)
            return manifest
        jobs.start(output, job)
        mine = job.tasks[shard_range[0] :: shard_range[1]]
        pending = [task for task in mine if jobs.read_notes(output, task) is None]
        _check_space(output, source, pending)
        hash_files = shard_range[0] == 0 and jobs.read_sums(output) is None
        work = _Work(source, output, job, hash_files)
        total = sum(task.stop - task.start for task in mine)
        remaining = sum(task.stop - task.start for task in pending)
        with _bar(total, total - remaining, progress) as advance:
            _run(work, pending, workers, remaining, advance)
        return jobs.finish(output, max_unreadable) if shard_range[1] == 1 else None


class _Work:
    """What every worker needs: the source, where to, and the request."""

    def __init__(self, source: Source, output: Path, job: Job, hash_files: bool) -> None:
        self.source, self.output, self.job, self.hash_files = source, output, job, hash_files
        self._orders: dict[str, Any] = {}

    def write(self, task: Task, tick: Callable[[], None]) -> None:
        """Makes one shard and notes it."""
        if task.split not in self._orders:
            self._orders[task.split] = split_order(self.source, task.split, self.job.seed, self.job.limit)
        rows = self._orders[task.split][task.start : task.stop].tolist()
        codec: Codec = next(codec for codec in CODECS if codec == self.job.codec)
        try:
            notes = write_shard(self.source, task, rows, self.output, codec, tick)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{task.file} can't be written ({error}); mend that and run again to resume") from error
        jobs.write_notes(self.output, notes)

    def write_sums(self) -> None:
        """Notes the input files' checksums, by their position in the job's list."""
        sums = {str(number): sha256(path) for number, path in enumerate(self.source.files)}
        jobs.write_sums(self.output, sums)


def _run(work: _Work, tasks: list[Task], workers: int | None, images: int, advance: Callable[[int], None]) -> None:
    count = min(workers or (1 if images < _SMALL else os.cpu_count() or 1), max(len(tasks), 1))
    if count > 1:
        _run_in_processes(work, tasks, count, advance)
        return
    for task in tasks:
        work.write(task, lambda: advance(1))
    if work.hash_files:
        work.write_sums()


def _run_in_processes(work: _Work, tasks: list[Task], workers: int, advance: Callable[[int], None]) -> None:
    """Shares the tasks out beforehand: no queue and no lock that a killed worker could hold."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads, such as JAX's, may hang
    done = context.RawArray("q", workers)  # images made by each
    errors, running = {}, []
    try:
        for number in range(workers):
            errors[number], send = context.Pipe(duplex=False)
            arguments = (work, tasks[number::workers], number, number == workers - 1, done, send)
            running.append(context.Process(target=_worker, args=arguments, daemon=True))
            running[-1].start()
        shown = 0
        while any(process.exitcode is None for process in running):
            multiprocessing.connection.wait([p.sentinel for p in running if p.exitcode is None], 0.2)
            now = sum(done)
            advance(now - shown)
            shown = now
            for number, process in enumerate(running):
                if process.exitcode:
                    raise _why(process.exitcode, errors[number])
    finally:
        for process in running:
            process.terminate()
            process.join()
            for leftover in work.output.glob(f"*.tmp-{process.pid}"):
                leftover.unlink()


def _why(exit_code: int, errors: Connection) -> Exception:
    """The error a worker sent before it ended; another one if it couldn't."""
    with contextlib.suppress(EOFError):
        if errors.poll():
            return errors.recv()
    return DataError(
        f"a worker process ended unexpectedly (exit code {exit_code}; often: not enough memory); run again to "
        "resume, with fewer workers"
    )


def _worker(work: _Work, tasks: list[Task], number: int, last: bool, done: Any, errors: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def tick() -> None:
        done[number] += 1

    try:
        for task in tasks:
            work.write(task, tick)
        if last and work.hash_files:
            work.write_sums()
    except UserError as error:
        errors.send(error)
        sys.exit(1)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@contextlib.contextmanager
def _bar(total: int, done: int, progress: bool) -> Iterator[Callable[[int], None]]:
    # disable=None: none where the output isn't a terminal
    with tqdm(
        total=total,
        initial=done,
        unit=" images",
        desc="converting",
        disable=None if progress else True,
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


@contextlib.contextmanager
def _folder(output: Path) -> Iterator[None]:
    """The output folder, left as it was found if nothing came of it."""
    jobs.check_output(output)
    existed = output.exists()
    try:
        (output / JOB_DIR).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"--output {output.absolute()} can't be made ({error}); give a folder you may write to"
        ) from error
    try:
        yield
    except BaseException:
        if not (output / JOB_DIR / "job.json").exists():
            shutil.rmtree(output / JOB_DIR, ignore_errors=True)
            if not existed:
                output.rmdir()
        raise


def _job(
    name: str,
    source: Source,
    options: Options,
    shards: int | None,
    limit: int | None,
    seed: int,
    codec: Codec,
) -> Job:
    counts = {split: min(count, limit or count) for split, count in source.num_images.items()}
    counts = {"train": counts["train"], **counts}  # first, whatever the source's order
    train = shards or max(1, math.ceil(counts["train"] * source.image_bytes / _SHARD_BYTES))
    num_shards = {split: max(1, round(train * count / counts["train"])) for split, count in counts.items()}
    num_shards["train"] = train
    for split, count in counts.items():
        if num_shards[split] > count:
            raise DataError(f"{num_shards[split]} shards for the {count} images of split {split!r}; use fewer --shards")
    return Job(
        source=name,
        options=options.given(),
        seed=seed,
        limit=limit,
        codec=codec,
        num_images=counts,
        num_shards=num_shards,
        files=[[path.name, path.stat().st_size] for path in source.files],
        classes=list(source.classes),
        facts=dict(source.facts),
        tool_version=gmsop_jax.__version__,
    )


def _check_space(output: Path, source: Source, pending: list[Task]) -> None:
    needed = sum(task.stop - task.start for task in pending) * (source.image_bytes + _RECORD_OVERHEAD)
    check_space(output, needed)


def _check_numbers(
    workers: int | None,
    shards: int | None,
    limit: int | None,
    seed: int,
    codec: str,
    shard_range: Range,
    max_unreadable: float,
) -> None:
    for name, value in {"workers": workers, "shards": shards, "limit": limit}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must not be negative")
    if codec not in CODECS:
        raise ConfigError(f"unknown codec {codec!r}; one of {', '.join(CODECS)}")
    if not 0 <= shard_range[0] < shard_range[1]:
        raise ConfigError(f"shard range {shard_range[0]}/{shard_range[1]} is not i/n with 0 ≤ i < n")
    if not 0 <= max_unreadable <= 1:
        raise ConfigError(f"max_unreadable is {max_unreadable}; it is a share between 0 and 1")
