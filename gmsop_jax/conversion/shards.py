"""Divides a data set into shards, and writes one shard with the statistics of its images."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from gmsop_jax.conversion.sources import Source, UnreadableImage
from gmsop_jax.data.manifest import Shard
from gmsop_jax.data.randomness import permutation
from gmsop_jax.data.records import Codec, decode, encode
from gmsop_jax.errors import DataError, FileAccessError
from gmsop_jax.files import replacing, sha256

# Every record is a chunk of its own, for random access. Pixels hardly shrink, so they are not compressed. There is only
# one background thread, which bounds the memory.
_WRITER_OPTIONS = "group_size:1,uncompressed,max_parallelism:1"


@dataclasses.dataclass(frozen=True)
class ShardTask:
    """A shard to write: the rows [start, stop) of the order of its split."""

    split: str
    file: str
    start: int
    stop: int


def shard_tasks(num_images: Mapping[str, int], num_shards: Mapping[str, int]) -> list[ShardTask]:
    """Divides the images of each split evenly among its shards.

    Example:
      >>> [(task.start, task.stop) for task in shard_tasks({"val": 5}, {"val": 2})]
      [(0, 2), (2, 5)]
    """
    tasks = []
    for split, shards in num_shards.items():
        cuts = [num_images[split] * shard // shards for shard in range(shards + 1)]
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            tasks.append(ShardTask(split, f"{split}-{number:05}-of-{shards:05}.arrayrecord", start, stop))
    return tasks


def split_order(source: Source, split: str, seed: int, limit: int | None) -> np.ndarray:
    """Returns the indices of a split in the order of its records, int64 [n].

    Training images are shuffled; the other splits keep the order of the source. At most `limit` images, chosen at
    random, are kept.
    """
    order = permutation(source.num_images[split], seed)[:limit]
    return order if split == "train" else np.sort(order)


class Statistics:
    """Exact sums over the images of a shard or split, as integers, so the order of summation makes no difference.

    Attributes:
      class_counts: number of images of each class, int64 [num_classes].
      image_sizes: the sizes (height, width) that occur.
      pixels: number of pixels.
      sums: sum of each channel over all pixels, int64 [3].
      products: sum of the products of each pair of channels, int64 [3, 3]; exact up to 1.4·10¹⁴ pixels.
      unreadable: a message for each image that was skipped.
    """

    def __init__(self, num_classes: int) -> None:
        self.class_counts = np.zeros(num_classes, np.int64)
        self.image_sizes: set[tuple[int, int]] = set()
        self.pixels = 0
        self.sums = np.zeros(3, np.int64)
        self.products = np.zeros((3, 3), np.int64)
        self.unreadable: list[str] = []

    def add(self, image: np.ndarray, label: int) -> None:
        """Adds one image, uint8 [h, w] or [h, w, 1 or 3]. A gray image counts as one with three equal channels."""
        self.class_counts[label] += 1
        self.image_sizes.add((image.shape[0], image.shape[1]))
        # These float64 sums are exact: whole numbers far below 2⁵³. vecdot over contiguous channels is the fastest.
        channels = image.reshape(image.shape[0] * image.shape[1], -1).T.astype(np.float64, order="C")
        self.pixels += channels.shape[1]
        self.sums += channels.sum(1).astype(np.int64)
        self.products += np.vecdot(channels[:, None], channels).astype(np.int64)

    def merge(self, other: "Statistics") -> None:
        """Adds the sums of another shard."""
        self.class_counts += other.class_counts
        self.image_sizes |= other.image_sizes
        self.pixels += other.pixels
        self.sums += other.sums
        self.products += other.products
        self.unreadable += other.unreadable

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean of each channel over all pixels."""
        red, green, blue = (total / self.pixels for total in self.sums.tolist())
        return red, green, blue

    @property
    def covariance(self) -> tuple[tuple[float, float, float], ...]:
        """Covariance of the channels over all pixels, divided by their number, [3, 3]."""
        s, products, n = self.sums.tolist(), self.products.tolist(), self.pixels  # Python's integers never overflow
        rows = [[(n * products[i][j] - s[i] * s[j]) / n**2 for j in range(3)] for i in range(3)]
        return tuple((row[0], row[1], row[2]) for row in rows)

    def to_json(self) -> dict[str, Any]:
        """Returns the statistics as JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("class_counts", "sums", "products")}
        return {**vars(self), **arrays, "image_sizes": sorted(map(list, self.image_sizes))}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Statistics":
        """Inverts `to_json`."""
        self = cls(len(value["class_counts"]))
        self.pixels, self.unreadable = value["pixels"], value["unreadable"]
        self.image_sizes = {(height, width) for height, width in value["image_sizes"]}
        for name in ("class_counts", "sums", "products"):
            setattr(self, name, np.array(value[name], np.int64))
        return self


def write_shard(
    source: Source, task: ShardTask, rows: Iterable[int], output: Path, codec: Codec, tick: Callable[[], object]
) -> tuple[Shard, Statistics]:
    """Writes one shard into the folder `output`, under a temporary name until it is complete.

    Args:
      rows: indices of the images in the source, in the order of the records.
      tick: called after each image.

    Returns: the shard's entry in the manifest, and the statistics of its images.

    Raises:
      DataError: if a label is out of range, an image is too large for a record, or the shard can't be written.
      FileAccessError: if an input file can't be read.
    """
    for leftover in output.glob(f"{task.file}.tmp-*"):  # from a conversion that was killed
        leftover.unlink()
    statistics = Statistics(len(source.classes))
    try:
        with replacing(output / task.file) as temporary:
            writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
            for index in rows:
                try:
                    image, label = _load(source, task.split, index)
                except UnreadableImage as error:  # file names need not be UTF-8
                    statistics.unreadable.append(str(error).encode("utf-8", "backslashreplace").decode())
                else:
                    record = encode(image, label, codec=codec)
                    writer.write(record)
                    statistics.add(decode(record)["image"] if codec == "jpeg" else image, label)
                tick()
            writer.close()
            count = int(statistics.class_counts.sum())
            return Shard(task.file, count, temporary.stat().st_size, sha256(temporary)), statistics
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError if the disk is full
        raise DataError(
            f"{output / task.file} can't be written ({error}); fix this and run the same command again to resume"
        ) from error


def _load(source: Source, split: str, index: int) -> tuple[np.ndarray, int]:
    try:
        image, label = source.load(split, index)
    except OSError as error:  # not a damaged image, but for example too many open files
        raise FileAccessError(f"image {index} of split {split!r} can't be read from the source: {error}") from error
    if not 0 <= label < len(source.classes):
        raise DataError(
            f"image {index} of split {split!r} has label {label}, but the labels of {len(source.classes)} classes are 0"
            f" to {len(source.classes) - 1}; correct the labels or the class names of the source"
        )
    return image, label
