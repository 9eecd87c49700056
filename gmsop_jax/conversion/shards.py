"""One shard: its place in the plan, its writing, and the statistics of its images."""

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from gmsop_jax.conversion.sources import Source, UnreadableImage
from gmsop_jax.data.manifest import Shard, sha256
from gmsop_jax.data.randomness import permutation
from gmsop_jax.data.records import Codec, decode, encode
from gmsop_jax.errors import DataError

# One record per chunk for random access. Pixels hardly compress in the container, so it isn't asked
# to; one background thread bounds the memory.
_WRITER = "group_size:1,uncompressed,max_parallelism:1"


@dataclasses.dataclass(frozen=True)
class Task:
    """A shard to write: rows [start, stop) of its split's order."""

    split: str
    file: str
    start: int
    stop: int


def plan(num_images: dict[str, int], num_shards: dict[str, int]) -> list[Task]:
    """All shards of a data set, with rows shared out evenly.

    >>> [(task.start, task.stop) for task in plan({"val": 5}, {"val": 2})]
    [(0, 2), (2, 5)]
    """
    tasks = []
    for split, shards in num_shards.items():
        cuts = [num_images[split] * shard // shards for shard in range(shards + 1)]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            tasks.append(Task(split, f"{split}-{number:05}-of-{shards:05}.arrayrecord", start, stop))
    return tasks


def split_order(source: Source, split: str, seed: int, limit: int | None) -> np.ndarray:
    """The source's indices in the order of the shards: training shuffled, others as they come.

    A limit keeps a random subset.
    """
    order = permutation(source.num_images[split], seed)[:limit]
    return order if split == "train" else np.sort(order)


@dataclasses.dataclass
class Statistics:
    """Exact sums over the images of a shard: Python integers, so nothing is ever rounded."""

    class_counts: list[int]
    image_sizes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    pixels: int = 0
    sums: list[int] = dataclasses.field(default_factory=lambda: [0] * 3)
    products: list[list[int]] = dataclasses.field(default_factory=lambda: [[0] * 3 for _ in range(3)])

    def add(self, image: np.ndarray, label: int) -> None:
        """Counts one image, uint8 [h, w] or [h, w, 1 or 3]."""
        self.class_counts[label] += 1
        self.image_sizes.add((image.shape[0], image.shape[1]))
        # exact: whole numbers far below 2⁵³; channels first and vecdot, as they are the fastest here
        channels = image.reshape(image.shape[0] * image.shape[1], -1).T.astype(np.float64, order="C")
        sums, products = channels.sum(1).tolist(), np.vecdot(channels[:, None], channels).tolist()
        self.pixels += channels.shape[1]
        for row in range(3):
            self.sums[row] += int(sums[row % len(sums)])
            for column in range(3):
                self.products[row][column] += int(products[row % len(sums)][column % len(sums)])

    def merge(self, other: "Statistics") -> None:
        """Adds another shard's sums."""
        self.class_counts = [a + b for a, b in zip(self.class_counts, other.class_counts, strict=True)]
        self.image_sizes |= other.image_sizes
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.products = [
            [a + b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(self.products, other.products, strict=True)
        ]

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel over all pixels."""
        red, green, blue = (total / self.pixels for total in self.sums)
        return red, green, blue

    @property
    def covariance(self) -> tuple[tuple[float, float, float], ...]:
        """Covariance of the channels over all pixels (divided by their number), [3, 3]."""
        s, n = self.sums, self.pixels
        rows = [[(n * self.products[i][j] - s[i] * s[j]) / n**2 for j in range(3)] for i in range(3)]
        return tuple((row[0], row[1], row[2]) for row in rows)

    def to_json(self) -> dict[str, Any]:
        """The sums, for a shard's notes."""
        return {**dataclasses.asdict(self), "image_sizes": sorted(self.image_sizes)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Statistics":
        """The inverse of `to_json`."""
        return cls(**{**value, "image_sizes": {(height, width) for height, width in value["image_sizes"]}})


@dataclasses.dataclass(frozen=True)
class Notes:
    """What is known of a finished shard; kept beside it until the manifest is written."""

    split: str
    shard: Shard
    statistics: Statistics
    unreadable: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For the notes' file."""
        return {**dataclasses.asdict(self), "statistics": self.statistics.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Notes":
        """The inverse of `to_json`."""
        statistics = Statistics.from_json(value["statistics"])
        return cls(value["split"], Shard(**value["shard"]), statistics, tuple(value["unreadable"]))


def write_shard(
    source: Source,
    task: Task,
    rows: Iterable[int],
    output: Path,
    codec: Codec,
    tick: Callable[[], None],
) -> Notes:
    """Writes one shard under a temporary name and renames it when whole.

    Args:
      source: where the images come from.
      task: the shard's split and file name.
      rows: the source's indices, in order.
      output: the data set's folder.
      codec: of the records.
      tick: called after each image.
    Raises: DataError for a label out of range or an image no record can hold.
    """
    for leftover in output.glob(f"{task.file}.tmp-*"):  # of a run that was killed
        leftover.unlink()
    temporary = output / f"{task.file}.tmp-{os.getpid()}"
    statistics = Statistics([0] * len(source.classes))
    unreadable = []
    try:
        writer = ArrayRecordWriter(str(temporary), _WRITER)
        for index in rows:
            try:
                image, label = source.load(task.split, index)
            except UnreadableImage as error:
                unreadable.append(str(error))
            else:
                _check_label(label, len(source.classes), task.split, index)
                record = encode(image, label, codec=codec)
                writer.write(record)
                statistics.add(decode(record)["image"] if codec == "jpeg" else image, label)
            tick()
        writer.close()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    count = sum(statistics.class_counts)
    shard = Shard(task.file, count, temporary.stat().st_size, sha256(temporary))
    temporary.replace(output / task.file)
    return Notes(task.split, shard, statistics, tuple(unreadable))


def _check_label(label: int, num_classes: int, split: str, index: int) -> None:
    if not 0 <= label < num_classes:
        raise DataError(
            f"image {index} of split {split!r} has label {label}; {num_classes} classes go from 0 "
            "to "
            f"{num_classes - 1}: the source's labels or class names are wrong"
        )
