"""The state of a conversion, kept inside the output folder until the manifest is written.

DIR/.convert/job.json        the source and the settings; resuming with other settings is an error
DIR/.convert/sums.json       checksums of the input files
DIR/.convert/<shard>.json    size, checksum and statistics of a finished shard
DIR/.convert/scratch/        input files that had to be unpacked
DIR/.convert/part-i-of-n     lock of the process that converts that part
DIR/dataset.json             written last; then .convert is removed
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gmsop_jax.conversion.shards import ShardTask, Statistics, shard_tasks
from gmsop_jax.data.manifest import FILE_NAME, JOB_DIR, Manifest, Shard, Split
from gmsop_jax.data.records import Codec
from gmsop_jax.errors import DataError
from gmsop_jax.files import FileLock, LockHeldError, read_bytes, replacing, sha256, write_json

SHEET_NAME = "contact_sheet.png"  # the file that `gmsop inspect` adds to a data set
_LOG = logging.getLogger(__name__)
_OWN_FILES = re.compile(
    rf"{re.escape(SHEET_NAME)}|({re.escape(JOB_DIR)}|{re.escape(FILE_NAME)}|\w+-\d+-of-\d+\.arrayrecord)(\.tmp-\d+)?"
)
_PART = re.compile(r"part-\d+-of-\d+")
_POLL_SECONDS = 0.2
_MEAN_TOLERANCE = 0.01  # of 255; the rounding of means in single precision is far below this


@dataclasses.dataclass(frozen=True)
class ConversionJob:
    """Everything that determines the bytes of the result, and the facts that the manifest records."""

    source: str
    options: Mapping[str, Any]
    seed: int
    limit: int | None
    codec: Codec
    num_images: Mapping[str, int]
    num_shards: Mapping[str, int]
    files: Sequence[Sequence[Any]]  # name and size in bytes of each input file
    classes: Sequence[str]
    facts: Mapping[str, Any]
    tool_version: str

    @property
    def tasks(self) -> list[ShardTask]:
        """All shards, in order."""
        return shard_tasks(self.num_images, self.num_shards)

    def to_json(self) -> dict[str, Any]:
        """Returns the job as JSON values, with lists instead of tuples, so that it equals a stored one."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self) -> str:
        """Returns a checksum of the job, which the manifest records."""
        return _digest(self.to_json())


@contextlib.contextmanager
def claim(output: Path, part: tuple[int, int]) -> Iterator[None]:
    """Reserves a part of a conversion, (i, n) for the i-th of n, for this process, and creates the output folder.

    If another process converts the same part, or divides the shards in another way, waits until it has ended. If the
    conversion fails before `job.json` is written, the folder is left unchanged.

    Raises: DataError if the folder contains other files, or in place of an OSError, such as that of a full disk.
    """
    try:
        check_output(output)
        existed = output.exists()
        lock = _wait_for_lock(output / JOB_DIR / f"part-{part[0]}-of-{part[1]}")
        try:
            yield
        finally:
            if lock.is_held() and not (output / JOB_DIR / "job.json").exists():
                remove_state(output)
                if not existed:
                    with contextlib.suppress(OSError):  # a process that waits for the lock recreates the folder
                        output.rmdir()
            lock.release()
    except OSError as error:
        raise DataError(
            f"the conversion to {output.absolute()} failed ({error}); fix this and run the same command again to resume"
        ) from error


def _wait_for_lock(file: Path) -> FileLock:
    """Locks a part of a conversion. Waits while another process converts it, or divides the shards in another way."""
    lock, warned = FileLock(file), False
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
            for other in file.parent.glob("part-*"):
                if _PART.fullmatch(other.name) and other.name.split("-of-")[1] != file.name.split("-of-")[1]:
                    with FileLock(other):
                        pass
            if lock.is_held():
                if lock.note:
                    _LOG.warning("%s", lock.note)
                return lock
        except LockHeldError as error:
            if not warned:
                _LOG.warning("%s is converting to %s; waiting until it has ended", error, file.parents[1])
            warned = True
        except FileNotFoundError:
            pass  # the other process has ended and removed the folder
        lock.release()
        time.sleep(_POLL_SECONDS)


def check_output(output: Path) -> None:
    """Raises DataError if `output` is a file, or a folder with files that are not part of a data set."""
    if output.is_file():
        raise DataError(f"{output.absolute()} is a file; give a new or empty folder for the data set")
    names = sorted(os.listdir(output)) if output.is_dir() else []
    others = [name for name in names if not _OWN_FILES.fullmatch(name)]
    if not any(name == FILE_NAME or name.startswith(JOB_DIR) for name in names):
        others = names  # shards without a manifest or a job are of unknown origin
    if others:
        raise DataError(
            f"the folder {output.absolute()} contains other files, such as {others[0]}; give a new or empty folder"
            " for the data set"
        )


def finished(output: Path, job: ConversionJob) -> Manifest | None:
    """Returns the manifest if this job is already done; raises DataError if the folder contains another data set."""
    if not (output / FILE_NAME).exists():
        return None
    manifest = Manifest.load(output)
    if manifest.provenance.get("job_sha256") != job.digest():
        raise DataError(
            f"{output.absolute()} already contains the data set {manifest.name!r}, made from other files or with other"
            " settings; give another folder, or delete it first"
        )
    return manifest


def start(output: Path, job: ConversionJob) -> None:
    """Records the job; raises DataError with the differences if another job is unfinished in this folder."""
    if not (output / JOB_DIR / "job.json").exists():
        write_state(output, "job", job.to_json())
        return
    before, now = load(output).to_json(), job.to_json()
    if differing := sorted(name for name in now if before[name] != now[name]):
        shown = "; ".join(f"{name} was {_shorten(before[name])} and is now {_shorten(now[name])}" for name in differing)
        raise DataError(
            f"{output.absolute()} contains an unfinished conversion with other settings ({shown}); use the same"
            " settings, or delete the folder"
        )


def load(output: Path) -> ConversionJob:
    """Returns the job of an unfinished conversion; raises DataError if the folder contains none."""
    file = output / JOB_DIR / "job.json"
    if not file.exists():
        raise DataError(
            f"{output.absolute()} contains no unfinished conversion: it has no {JOB_DIR}/job.json; give the --output of"
            " a `gmsop convert` command"
        )
    try:
        return ConversionJob(**read_state(output, "job"))
    except TypeError as error:
        raise DataError(
            f"{file} is damaged, or was written by another release; delete {output.absolute()} and convert again"
        ) from error


def read_notes(output: Path, task: ShardTask, verify: bool) -> tuple[Shard, Statistics] | None:
    """Returns a finished shard and its statistics, or None if the shard must be converted (again).

    Its checksum is compared if `verify` is set, and otherwise only its size.
    """
    notes, file = read_state(output, task.file), output / task.file
    if notes is None or not file.is_file():
        return None
    shard = Shard(**notes["shard"])
    if file.stat().st_size != shard.bytes or (verify and sha256(file) != shard.sha256):
        _LOG.warning("%s has changed since it was written; it will be converted again", file)
        return None
    return shard, Statistics.from_json(notes["statistics"])


def write_notes(output: Path, shard: Shard, statistics: Statistics) -> None:
    """Marks a shard as finished."""
    write_state(output, shard.file, {"shard": dataclasses.asdict(shard), "statistics": statistics.to_json()})


def write_state(output: Path, name: str, value: Any) -> None:
    """Writes DIR/.convert/<name>.json with a checksum, so that damage to it never reaches the manifest."""
    write_json(output / JOB_DIR / f"{name}.json", {"sha256": _digest(value), "value": value})


def read_state(output: Path, name: str) -> Any:
    """Returns what `write_state` stored, or None if the file is missing or damaged."""
    try:
        stored = json.loads(read_bytes(output / JOB_DIR / f"{name}.json"))
        return stored["value"] if stored["sha256"] == _digest(stored["value"]) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def join(output: Path, parts: Sequence[Path], max_unreadable: float) -> Manifest:
    """Joins the parts of a conversion that were made with shard ranges.

    Args:
      output: the folder that becomes the data set.
      parts: other folders of the same conversion, whose shards are copied to `output`.
      max_unreadable: maximum fraction of unreadable images.

    Raises: DataError if shards are missing, a folder contains another conversion, or copying fails.
    """
    load(output)
    with claim(output, (0, 1)):
        for part in parts:
            _copy_shards(output, part)
        return finish(output, max_unreadable)


def _copy_shards(output: Path, part: Path) -> None:
    job = load(part)
    if job.digest() != load(output).digest():
        raise DataError(
            f"{part.absolute()} and {output.absolute()} contain conversions with different settings; convert all parts"
            " with the same settings"
        )
    for task in job.tasks:
        notes = read_notes(part, task, verify=True)
        if notes is not None and read_notes(output, task, verify=True) is None:
            with replacing(output / task.file) as temporary:
                shutil.copyfile(part / task.file, temporary)
            write_notes(output, *notes)
    if (sums := read_state(part, "sums")) is not None:
        write_state(output, "sums", sums)


def finish(output: Path, max_unreadable: float, *, verify: bool = True) -> Manifest:
    """Writes the manifest of the finished shards, and removes the state of the conversion.

    Args:
      output: the folder of the data set.
      max_unreadable: maximum fraction of unreadable images.
      verify: whether to compare the checksums of the shards, and not just their sizes.

    Raises: DataError if shards are missing, too many images were unreadable, or no training image was readable.
    """
    job = load(output)
    statistics = {split: Statistics(len(job.classes)) for split in job.num_shards}
    shards: dict[str, list[Shard]] = {split: [] for split in job.num_shards}
    missing = []
    for task in job.tasks:
        if (notes := read_notes(output, task, verify)) is None:
            missing.append(task.file)
        else:
            shards[task.split].append(notes[0])
            statistics[task.split].merge(notes[1])
    if missing:
        raise DataError(
            f"{len(missing)} of {len(job.tasks)} shards have not been converted yet, such as {missing[0]}; convert the"
            " missing parts, or name the folders that contain them: gmsop merge OUTPUT OTHER"
        )
    unreadable = [message for split in statistics.values() for message in split.unreadable]
    _check_unreadable(unreadable, sum(job.num_images.values()), max_unreadable)
    train = statistics["train"]
    if not train.pixels:
        raise DataError("the training split has no readable image")
    _warn_of_missing_classes(job, statistics)
    _compare_mean(job, train.mean)
    manifest = Manifest(
        name=job.source,
        classes=tuple(job.classes),
        mean_rgb=train.mean,
        covariance_rgb=train.covariance,
        splits={name: _split(statistics[name], shards[name]) for name in job.num_shards},
        provenance=_provenance(job, read_state(output, "sums"), unreadable),
    )
    manifest.save(output)
    for leftover in output.glob("*.tmp-*"):
        if leftover.is_file():
            leftover.unlink()
    remove_state(output)
    return manifest


def remove_state(output: Path) -> None:
    """Removes the state of a conversion. Its folder is renamed first, because waiting processes create files in it."""
    (output / JOB_DIR).rename(output / f"{JOB_DIR}.tmp-{os.getpid()}")
    for folder in output.glob(f"{JOB_DIR}.tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)  # another process may be removing the same folder


def _split(statistics: Statistics, shards: Sequence[Shard]) -> Split:
    counts, sizes = statistics.class_counts.tolist(), statistics.image_sizes
    return Split(sum(counts), next(iter(sizes)) if len(sizes) == 1 else None, tuple(counts), tuple(shards))


def _provenance(job: ConversionJob, sums: Sequence[str] | None, unreadable: list[str]) -> dict[str, Any]:
    stored = ("source", "options", "seed", "limit", "codec", "facts", "tool_version")
    files = [
        {"name": name, "bytes": size, "sha256": checksum}
        for (name, size), checksum in zip(job.files, sums or [None] * len(job.files), strict=True)
    ]
    kept = {name: value for name, value in job.to_json().items() if name in stored}
    return {**kept, "files": files, "unreadable": unreadable, "job_sha256": job.digest()}


def _check_unreadable(unreadable: list[str], total: int, allowed: float) -> None:
    for message in unreadable[:20]:
        _LOG.warning("unreadable: %s", message)
    if len(unreadable) > 20:
        _LOG.warning("unreadable: %d more; dataset.json lists all of them once it is written", len(unreadable) - 20)
    if len(unreadable) > allowed * total:
        raise DataError(
            f"{len(unreadable)} of {total} images are unreadable, such as {unreadable[0]}. That is more than the"
            f" allowed fraction {allowed:g}; repair the source, or increase --max-unreadable and run again"
        )


def _warn_of_missing_classes(job: ConversionJob, statistics: Mapping[str, Statistics]) -> None:
    total = len(job.classes)
    for split, found in statistics.items():
        if missing := [job.classes[label] for label in range(total) if not found.class_counts[label]]:
            shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            _LOG.warning("split %r contains no images of %d of the %d classes: %s", split, len(missing), total, shown)


def _compare_mean(job: ConversionJob, mean: Sequence[float]) -> None:
    stored = job.facts.get("stored_mean_rgb")
    if stored is None or job.limit is not None:
        return
    if max(abs(a - b) for a, b in zip(stored, mean, strict=True)) > _MEAN_TOLERANCE:
        _LOG.warning(
            "the source states the mean %s, but the mean of its training images is %s. If another program wrote this"
            " file, check the order of the channels",
            [round(value, 3) for value in stored],
            [round(value, 3) for value in mean],
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shorten(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
