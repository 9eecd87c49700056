"""Verification: reads a whole data set and compares it with everything that its manifest states."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from gmsop_jax.conversion.progress import count_images
from gmsop_jax.conversion.shards import Statistics
from gmsop_jax.data.manifest import Manifest, Split
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError

_BLOCK = 256  # records read at a time
_REMEDY = "convert the data set again"


def verify(directory: str | os.PathLike[str], *, progress: bool = True) -> Manifest:
    """Returns the manifest if all checksums and records agree with it. Raises DataError at the first difference."""
    path = Path(directory)
    manifest = Manifest.load(path)
    manifest.verify_checksums(path)
    total = sum(split.num_images for split in manifest.splits.values())
    with count_images("verifying", total, enabled=progress) as count:
        for name, split in manifest.splits.items():
            found = _read(path, name, split, manifest.num_classes, count)
            _compare(path, name, split, found)
            if name == "train" and not _same_colours(found, manifest):
                raise DataError(
                    f"{path}: the mean of the training images is {found.mean}, but the manifest says"
                    f" {manifest.mean_rgb} (or their covariances differ); {_REMEDY}"
                )
    return manifest


def _same_colours(found: Statistics, manifest: Manifest) -> bool:
    if manifest.provenance.get("codec") == "jpeg":  # another decoder's pixels may differ by one level
        return bool(np.allclose(found.mean, manifest.mean_rgb, rtol=0, atol=1))
    return (found.mean, found.covariance) == (manifest.mean_rgb, manifest.covariance_rgb)


def _read(path: Path, name: str, split: Split, num_classes: int, count: Callable[[int], object]) -> Statistics:
    reader = ShardReader(path, split.shards)
    found = Statistics(num_classes)
    for start in range(0, len(reader), _BLOCK):
        records = reader.read(np.arange(start, min(start + _BLOCK, len(reader))))
        for row, record in enumerate(records, start):
            try:
                example = decode(record)
            except DataError as error:
                raise DataError(f"{path}: record {row} of split {name!r}: {error}") from error
            if example["label"] >= num_classes:
                raise DataError(
                    f"{path}: record {row} of split {name!r} has label {example['label']}, but there are {num_classes}"
                    f" classes; {_REMEDY}"
                )
            found.add(example["image"], example["label"])
        count(len(records))
    return found


def _compare(path: Path, name: str, split: Split, found: Statistics) -> None:
    if differing := np.flatnonzero(found.class_counts != split.class_counts).tolist():
        label = differing[0]
        raise DataError(
            f"{path}: split {name!r} has {found.class_counts[label]} images of class {label}, but the manifest says"
            f" {split.class_counts[label]}; {_REMEDY}"
        )
    size = next(iter(found.image_sizes)) if len(found.image_sizes) == 1 else None
    if size != split.image_size:
        sizes, stated = (f"the size {known}" if known else "different sizes" for known in (size, split.image_size))
        raise DataError(f"{path}: the images of split {name!r} have {sizes}, but the manifest says {stated}; {_REMEDY}")
