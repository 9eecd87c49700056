"""A conversion's own folder inside its output, and the manifest that comes of it.

DIR/.convert/job.json            the request; a run with another one is refused
DIR/.convert/sums.json           the input files' checksums
DIR/.convert/<shard>.json        notes of a finished shard
DIR/.convert/scratch/            inputs that had to be unpacked
DIR/dataset.json                 written last; then .convert goes
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmsop_jax.conversion.shards import Notes, Statistics, Task, plan
from gmsop_jax.data.manifest import FILE_NAME, JOB_DIR, Manifest, Split, write_json
from gmsop_jax.errors import DataError

_LOG = logging.getLogger(__name__)
_OWN = re.compile(rf"{re.escape(JOB_DIR)}|{re.escape(FILE_NAME)}(\.tmp-\d+)?|\w+-\d+-of-\d+\.arrayrecord(\.tmp-\d+)?")
_MEAN_TOLERANCE = 0.01  # of 255; rounding in the original's single precision is far below


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that decides the bytes of the result, and what the manifest says beside them."""

    source: str
    options: Mapping[str, Any]
    seed: int
    limit: int | None
    codec: str
    num_images: Mapping[str, int]
    num_shards: Mapping[str, int]
    files: Sequence[Sequence[Any]]  # [name, bytes] each
    classes: Sequence[str]
    facts: Mapping[str, Any]
    tool_version: str

    @property
    def tasks(self) -> list[Task]:
        """All shards, in order."""
        return plan(dict(self.num_images), dict(self.num_shards))

    def to_json(self) -> dict[str, Any]:
        """As it is stored and compared: lists for tuples."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def digest(self) -> str:
        """A checksum of the whole request, kept in the manifest."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def check_output(output: Path) -> None:
    """Raises DataError if `output` is a file or holds anything that no conversion wrote."""
    if output.is_dir():
        entries = sorted(entry.name for entry in output.iterdir())
        foreign = [name for name in entries if not _OWN.fullmatch(name)]
        if entries and not foreign and not {JOB_DIR, FILE_NAME} & set(entries):
            foreign = entries
        if foreign:
            raise DataError(
                f"--output {output.absolute()} holds other files ({foreign[0]}); give a new or empty folder"
            )
    elif output.exists():
        raise DataError(f"--output {output.absolute()} is a file; give a new or empty folder")


def finished(output: Path, job: Job) -> Manifest | None:
    """The manifest, if this very job is already done; DataError if another one is."""
    if not (output / FILE_NAME).exists():
        return None
    manifest = Manifest.load(output)
    if manifest.provenance.get("job_sha256") != job.digest():
        raise DataError(
            f"--output {output.absolute()} already holds data set {manifest.name!r}, made from "
            "other files or with other "
            "settings; give another folder, or delete it first"
        )
    return manifest


def start(output: Path, job: Job) -> None:
    """Writes the request down; DataError if an unfinished one differs, with the differences."""
    file = output / JOB_DIR / "job.json"
    if not file.exists():
        write_json(file, job.to_json())
        return
    before, now = _read_json(file), job.to_json()
    differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if differing:
        shown = "; ".join(f"{name}: {_short(before.get(name))} then, {_short(now.get(name))} now" for name in differing)
        raise DataError(
            f"--output {output.absolute()} holds an unfinished conversion with other settings "
            f"({shown}); use the same "
            "settings, or delete the folder"
        )


def load(output: Path) -> Job:
    """The request of an unfinished conversion; DataError if there is none."""
    file = output / JOB_DIR / "job.json"
    if not file.exists():
        raise DataError(f"{output.absolute()} holds no unfinished conversion (no {JOB_DIR}/job.json)")
    try:
        return Job(**_read_json(file))
    except TypeError as error:
        raise DataError(f"{file} is of another release ({error}); delete {output} and convert again") from error


def read_notes(output: Path, task: Task) -> Notes | None:
    """The notes of a finished shard whose file is there with its size; otherwise None."""
    file = output / JOB_DIR / f"{task.file}.json"
    if not file.exists():
        return None
    notes = Notes.from_json(_read_json(file))
    shard = output / task.file
    return notes if shard.is_file() and shard.stat().st_size == notes.shard.bytes else None


def write_notes(output: Path, notes: Notes) -> None:
    """Marks a shard as finished."""
    write_json(output / JOB_DIR / f"{notes.shard.file}.json", notes.to_json())


def write_sums(output: Path, sums: Mapping[str, str]) -> None:
    """Keeps the input files' checksums for the manifest."""
    write_json(output / JOB_DIR / "sums.json", dict(sums))


def read_sums(output: Path) -> dict[str, str] | None:
    """The input files' checksums, if they were taken already."""
    file = output / JOB_DIR / "sums.json"
    return _read_json(file) if file.exists() else None


def gather(output: Path, part: Path) -> None:
    """Copies the finished shards of `part`, another folder of the same conversion, into `output`.

    Raises: DataError if `part` isn't one, or is of another conversion.
    """
    mine, theirs = load(output), load(part)
    if mine.digest() != theirs.digest():
        raise DataError(
            f"{part.absolute()} and {output.absolute()} are of different conversions; their settings differ"
        )
    for task in theirs.tasks:
        notes = read_notes(part, task)
        if notes is not None and read_notes(output, task) is None:
            temporary = output / f"{task.file}.tmp-{os.getpid()}"
            shutil.copyfile(part / task.file, temporary)
            temporary.replace(output / task.file)
            write_notes(output, notes)
    sums = read_sums(part)
    if sums is not None:
        write_sums(output, sums)


def finish(output: Path, max_unreadable: float) -> Manifest:
    """Writes the manifest from the notes of all shards and removes the conversion's own folder.

    Raises: DataError if shards are missing, or more images were unreadable than the stated share.
    """
    job = load(output)
    notes = {task: read_notes(output, task) for task in job.tasks}
    missing = [task.file for task, note in notes.items() if note is None]
    if missing:
        raise DataError(f"{len(missing)} of {len(notes)} shards aren't converted yet, {missing[0]} the first")
    done = [note for note in notes.values() if note is not None]
    unreadable = [message for note in done for message in note.unreadable]
    _check_unreadable(unreadable, sum(job.num_images.values()), max_unreadable)
    splits, statistics = {}, {}
    for name in job.num_shards:
        statistics[name] = Statistics([0] * len(job.classes))
        for note in done:
            if note.split == name:
                statistics[name].merge(note.statistics)
        splits[name] = _split(statistics[name], [note for note in done if note.split == name])
    train = statistics["train"]
    if not train.pixels:
        raise DataError("the training split has no readable image")
    provenance = _provenance(job, read_sums(output), unreadable)
    _compare_mean(job, train.mean)
    manifest = Manifest(job.source, tuple(job.classes), train.mean, train.covariance, splits, provenance)
    manifest.save(output)
    shutil.rmtree(output / JOB_DIR)
    for leftover in output.glob("*.tmp-*"):
        leftover.unlink()
    return manifest


def _split(statistics: Statistics, notes: Sequence[Notes]) -> Split:
    sizes = statistics.image_sizes
    return Split(
        num_images=sum(statistics.class_counts),
        image_size=next(iter(sizes)) if len(sizes) == 1 else None,
        class_counts=tuple(statistics.class_counts),
        shards=tuple(note.shard for note in notes),
    )


def _provenance(job: Job, sums: dict[str, str] | None, unreadable: list[str]) -> dict[str, Any]:
    request = job.to_json()
    files = [
        {"name": name, "bytes": size, "sha256": (sums or {}).get(str(number))}
        for number, (name, size) in enumerate(request.pop("files"))
    ]
    dropped = ("classes", "num_images", "num_shards")
    kept = {name: value for name, value in request.items() if name not in dropped}
    return {**kept, "files": files, "unreadable": unreadable, "job_sha256": job.digest()}


def _check_unreadable(unreadable: list[str], total: int, allowed: float) -> None:
    for message in unreadable[:20]:
        _LOG.warning("unreadable: %s", message)
    if len(unreadable) > 20:
        _LOG.warning("unreadable: %d more (dataset.json lists all)", len(unreadable) - 20)
    if len(unreadable) > allowed * total:
        raise DataError(
            f"{len(unreadable)} of {total} images are unreadable ({unreadable[0]}, …), more than "
            "the allowed share "
            f"{allowed:g}; mend the source, or raise --max-unreadable and run again"
        )


def _compare_mean(job: Job, mean: Sequence[float]) -> None:
    stored = job.facts.get("stored_mean_rgb")
    if stored is None or job.limit is not None:
        return
    if max(abs(a - b) for a, b in zip(stored, mean, strict=True)) > _MEAN_TOLERANCE:
        _LOG.warning(
            "the source stores the mean %s, its training images have %s: if they were made by "
            "another program, check "
            "the order of the channels",
            [round(value, 3) for value in stored],
            [round(value, 3) for value in mean],
        )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read ({error}); delete {file.parent.parent} and convert again") from error


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
