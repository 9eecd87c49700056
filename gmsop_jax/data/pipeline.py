"""From shards to batches: a Grain dataset of training steps, each of which reads its batch as whole arrays.

The batch of a step is a function of the seed and the step alone:

    step → epoch, and batch of the epoch → indices of the global batch in the epoch's shuffled order
         → rows of this process → blocks of records → each block decoded, cropped and flipped as one array

Therefore any step can be computed directly, on any number of processes, and the position in the data is one number:
the step. It is also the state of Grain's iterator, unless worker processes are used. The image at position p of epoch e
is `Shuffle(num_images, seed, 0, e)(p)`, and batch b of that epoch holds the positions from b·batch_size on.

On its way from the page cache to the batch, a pixel is copied into ArrayRecord's buffer, the `bytes` of its record, an
array of some 40 records, and the batch; in flipped images, it is copied once more. The later copies, and those of a
crop, read from the processor's cache.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from gmsop_jax.data.augment import Centre, Pixels, Preparation, copy_images, training_preparation
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.randomness import Shuffle, coin_flips, uniforms
from gmsop_jax.data.records import decode_batch
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.data.workers import Batch, WorkerIterator
from gmsop_jax.errors import DataError

ORDER_VERSION = 2  # version of the order in which a seed shuffles the images; 1 used a stored permutation
_BLOCK_BYTES = 2**19  # bytes of images that are read and flipped at a time; they fit in the processor's cache
_MAX_REPLACEMENTS = 20  # records that are tried in place of one that can't be read
_ORDER, _FLIP, _CROP = range(3)  # in the keys of the random numbers, so that these streams are independent


def steps_per_epoch(num_images: int, batch_size: int, drop_last: bool) -> int:
    """Returns the number of batches in an epoch.

    Raises:
      DataError: if the images do not fill a batch, or if batch_size is below 1.

    Example:
      >>> steps_per_epoch(10, 4, drop_last=True), steps_per_epoch(10, 4, drop_last=False)
      (2, 3)
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1")
    steps = num_images // batch_size if drop_last else -(-num_images // batch_size)
    if steps < 1:
        raise DataError(
            f"{num_images} images do not fill a batch of {batch_size}; lower train.batch_size, or use more images"
        )
    return steps


def train_batches(
    data: Any,
    train: Any,
    manifest: Manifest,
    *,
    seed: int,
    start_step: int = 0,
    padding_rgb: Sequence[float] | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
    """Yields batches of the training split indefinitely, in a different order in each epoch.

    The sizes of the shards are not compared with the manifest here; `Manifest.load` does that.

    Args:
      data: the section `data` of a configuration.
      train: the section `train`, of which `batch_size` (of the global batch) and `drop_last` are used. Each process
        gets a contiguous part of the rows of the global batch.
      manifest: that of the data set in `data.dir`.
      seed: a non-negative seed; it and the step determine the batch.
      start_step: number of the first step. An uninterrupted run sees the same batch at that step.
      padding_rgb: colour of the parts of a crop that lie outside the image; by default the mean of the training split.
      process_index: index of this process among those that share the global batch.
      process_count: number of these processes.

    Returns: a Grain iterator of {'image': uint8 [b, h, w, 3], 'label': int32 [b]}. Its state is the number of the next
      step or, with workers, the position of each worker, counted from `start_step`. With workers, close it after use.

    Raises:
      DataError: if the data set is damaged, or if an argument doesn't fit it.
      FileAccessError: if a file can't be read.
    """
    if seed < 0 or start_step < 0:
        raise DataError(f"seed {seed} and start_step {start_step} must not be negative")
    rows = _open(
        data, "train", manifest, training_preparation(data), train.batch_size, process_index, process_count, padding_rgb
    )
    batch_size, num_images, flip = train.batch_size, len(rows.reader), data.flip
    num_steps = steps_per_epoch(num_images, batch_size, train.drop_last)

    def read(step: int) -> Batch:
        epoch, at = divmod(step, num_steps)
        positions = np.arange(at * batch_size, min((at + 1) * batch_size, num_images))
        count = len(positions)
        flips, draws = rows.no_augmentation(count)
        if flip:
            flips = coin_flips(count, seed, _FLIP, step)
        if draws.size:
            draws = uniforms(draws.size, seed, _CROP, step).reshape(draws.shape)
        indices, flips, draws = map(rows.local, (_shuffle(num_images, seed, epoch)(positions), flips, draws))
        try:
            return rows.read(indices, flips, draws)
        except DataError:
            return rows.read(rows.replace_unreadable(indices), flips, draws)

    return _iterate(read, sys.maxsize, data, start_step)


def eval_batches(
    data: Any, evaluation: Any, manifest: Manifest, *, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[Batch]:
    """Yields the images of a split once, in the order of the shards; the last batch is padded to full size.

    Args:
      data: the section `data` of a configuration.
      evaluation: the section `eval`, of which `split`, `batch_size` and `resize` are used.
      manifest: that of the data set in `data.dir`.
      process_index, process_count: as in `train_batches`.

    Returns: a Grain iterator of {'image': uint8 [b, h, w, 3], 'label': int32 [b], 'mask': bool [b]}. The mask is False
      for padding, which consists of black images with label 0.

    Raises: as `train_batches`.
    """
    batch_size, resize = evaluation.batch_size, evaluation.resize
    rows = _open(data, evaluation.split, manifest, Centre(resize), batch_size, process_index, process_count)
    if 0 < resize < max(rows.size):
        raise DataError(
            f"config.eval.resize is {resize}, which is smaller than the centre crop of {rows.size[0]}×{rows.size[1]};"
            " increase it, or set it to 0 to resize whole images"
        )

    def read(step: int) -> Batch:
        local = rows.local(np.arange(step * batch_size, (step + 1) * batch_size))
        images = local[local < len(rows.reader)]
        try:
            batch = rows.read(images, *rows.no_augmentation(len(images)))
        except DataError:
            images = images[rows.readable(images)]
            batch = rows.read(images, *rows.no_augmentation(len(images)))
        missing = len(local) - len(images)
        padded = {key: np.pad(value, [(0, missing)] + [(0, 0)] * (value.ndim - 1)) for key, value in batch.items()}
        return {**(padded if missing else batch), "mask": np.arange(len(local)) < len(images)}

    return _iterate(read, steps_per_epoch(len(rows.reader), batch_size, drop_last=False), data)


@functools.lru_cache(maxsize=4)  # prefetching threads work on at most two epochs at a time
def _shuffle(num_images: int, seed: int, epoch: int) -> Shuffle:
    return Shuffle(num_images, seed, _ORDER, epoch)


def _open(
    data: Any,
    name: str,
    manifest: Manifest,
    prepare: Preparation,
    batch_size: int,
    process_index: int,
    process_count: int,
    padding_rgb: Sequence[float] | None = None,
) -> "_Rows":
    size, shards = manifest.image_size(name, data.image_size), manifest.split(name).shards
    if not 0 <= process_index < process_count:
        raise DataError(f"process_index {process_index} is outside 0…{process_count - 1} (process_count − 1)")
    if batch_size % process_count:
        raise DataError(
            f"batch_size {batch_size} doesn't split evenly over {process_count} processes; use a multiple of"
            f" {process_count}"
        )
    reader = ShardReader(Path(data.dir), shards)
    padding = np.round(padding_rgb or manifest.mean_rgb).astype(np.uint8)
    return _Rows(
        reader, size, prepare, padding, manifest.num_classes, process_index, process_count, data.on_corrupt == "skip"
    )


def _iterate(
    read: Callable[[int], Batch], num_steps: int, data: Any, start_step: int = 0
) -> grain.DatasetIterator[Batch]:
    batches = grain.MapDataset.range(num_steps).map(read)
    # Prefetch twice as many batches as there are threads, so that no thread waits.
    options = grain.ReadOptions(num_threads=data.num_threads, prefetch_buffer_size=2 * data.num_threads)
    if data.num_workers:
        return WorkerIterator(batches[start_step:].to_iter_dataset(options), data.num_workers)
    iterator = iter(batches.to_iter_dataset(options))
    grain.experimental.set_next_index(iterator, start_step)
    return iterator


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of a global batch that belong to this process, and how they are read."""

    reader: ShardReader
    size: tuple[int, int]
    prepare: Preparation
    padding_rgb: np.ndarray
    num_classes: int
    process_index: int
    process_count: int
    skips_unreadable: bool

    def local(self, values: np.ndarray) -> np.ndarray:
        """Returns this process's contiguous part of values that belong to the rows of the global batch."""
        start, stop = (len(values) * p // self.process_count for p in (self.process_index, self.process_index + 1))
        return values[start:stop]

    def read(self, indices: np.ndarray, flips: np.ndarray, draws: np.ndarray) -> Batch:
        """Reads the images at `indices` [n], prepares them with `draws` [n, k], and mirrors those in `flips` [n]."""
        image = np.empty((len(indices), *self.size, 3), np.uint8)
        label = np.empty(len(indices), np.int32)
        block = max(1, _BLOCK_BYTES * len(image) // max(1, image.nbytes))
        for start in range(0, len(indices), block):
            rows = slice(start, start + block)
            pixels, label[rows] = decode_batch(self.reader.read(indices[rows]))
            pixels = self.prepare(pixels, draws[rows], self.size, self.padding_rgb)
            _fill(image[rows], pixels, flips[rows])
        if label.max(initial=0) >= self.num_classes:
            raise DataError(
                f"a record has label {label.max()}, but the labels of {self.num_classes} classes are 0 to"
                f" {self.num_classes - 1}: run `gmsop verify` and convert the data set again"
            )
        return {"image": image, "label": label}

    def no_augmentation(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns flips [n] and draws [n, k] for images that are not augmented: no flips, and zeros."""
        return np.zeros(count, bool), np.zeros((count, self.prepare.num_draws))

    def readable(self, indices: np.ndarray) -> np.ndarray:
        """Returns whether each of the records at `indices` can be read, bool [n]; logs each unreadable one once.

        Raises:
          DataError: if one can't be read and such records are not to be skipped; the message states its shard and
            position.
        """
        readable = np.ones(len(indices), bool)
        for row, index in enumerate(indices.tolist()):
            try:
                self.read(indices[row : row + 1], *self.no_augmentation(1))
            except DataError as error:
                if not self.skips_unreadable:
                    hint = "to skip such records, set --config.data.on_corrupt=skip"
                    raise DataError(f"{self.reader.where(index)}: {error}; {hint}") from error
                _log_once(f"skipping {self.reader.where(index)}: {error}")
                readable[row] = False
        return readable

    def replace_unreadable(self, indices: np.ndarray) -> np.ndarray:
        """Replaces each index whose record can't be read with that of another record.

        The replacement is a function of the index alone, so that every run uses the same one.
        """
        replaced, stride = indices, max(1, round(len(self.reader) * 0.618))
        unreadable = ~self.readable(replaced)
        for tries in range(1, 1 + _MAX_REPLACEMENTS):
            replaced = np.where(unreadable, (indices + tries * stride) % len(self.reader), replaced)
            unreadable = ~self.readable(replaced)
            if not unreadable.any():
                return replaced
        raise DataError(
            f"{self.reader.where(int(indices[unreadable][0]))} and the {_MAX_REPLACEMENTS} records tried in its place"
            " can't be read: too much of the data set is damaged; convert it again"
        )


def _fill(out: np.ndarray, pixels: Pixels, flips: np.ndarray) -> None:
    """Copies images into `out` [n, h, w, 3] and mirrors some, channel by channel, which is fastest in NumPy."""
    copy_images(out, pixels)
    for row in np.flatnonzero(flips):
        for channel in range(3):
            out[row, :, :, channel] = pixels[row][:, ::-1, channel % pixels[row].shape[2]]


@functools.cache
def _log_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
