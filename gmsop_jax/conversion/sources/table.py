"""Sources whose images are rows of a table, and stratified splits of such a table."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmsop_jax.data.randomness import permutation

NUM_FOLDS = 5
_PARTS = 2 * NUM_FOLDS  # the test images of a fold are two parts, and its validation images are a third one
_PARTS_KEY, _SUBSET_KEY = 2, 3  # in the keys of the random numbers, so that they are independent


@dataclasses.dataclass(frozen=True)
class ImageTable:
    """Images with consecutive numbers, and splits that refer to them by number.

    Attributes:
      classes: the class names.
      labels: the class of each image, int [n].
      rows: numbers of the images in each split, int [m].
      decode: returns the pixels of an image, uint8 [h, w, 1 or 3]; it can be pickled.
      files: the input files.
      facts: entries for the manifest.
      image_bytes: bytes of one decoded image, or None if the images have different sizes.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    rows: Mapping[str, np.ndarray]
    decode: Callable[[int], np.ndarray]
    files: tuple[Path, ...]
    facts: Mapping[str, Any]
    image_bytes: int | None = None

    @property
    def num_images(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(rows) for split, rows in self.rows.items()}

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """Returns the pixels of one image and its label."""
        row = int(self.rows[split][index])
        return self.decode(row), int(self.labels[row])


def stratified_parts(strata: np.ndarray, seed: int) -> np.ndarray:
    """Divides rows at random into ten parts with nearly the same number of rows of each stratum.

    Args:
      strata: the stratum of each row, non-negative int [n].

    Returns: the part of each row, 0 to 9, int [n]. The sizes of the parts differ by at most one, within every stratum
      and in total.

    Example:
      >>> np.bincount(stratified_parts(np.repeat([0, 1], 20), 0)).tolist()
      [4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    """
    parts = np.zeros(len(strata), np.int64)
    dealt = 0  # each stratum continues where the last one stopped, to spread the remainders over the parts
    for stratum in np.unique(strata).tolist():
        members = np.flatnonzero(strata == stratum)
        shuffled = members[permutation(len(members), seed, _PARTS_KEY, stratum)]
        parts[shuffled] = (dealt + np.arange(len(members))) % _PARTS
        dealt += len(members)
    return parts


def fold_masks(parts: np.ndarray, fold: int) -> dict[str, np.ndarray]:
    """Returns masks of the rows in `train` (70 %), `val` (10 %) and `test` (20 %) of a fold, bool [n] each.

    Every row is in the split `test` of exactly one of the five folds. `parts` are from `stratified_parts`.
    """
    test = parts // 2 == fold
    val = parts == (2 * fold + 2) % _PARTS
    return {"train": ~(test | val), "val": val, "test": test}


def subset(rows: np.ndarray, labels: np.ndarray, fraction: float | None, seed: int) -> np.ndarray:
    """Keeps a fraction of the rows of each class, at least one row. A larger fraction keeps the same rows and more.

    Args:
      rows: numbers of the images to choose from, int [m].
      labels: the class of each image of the table, int [n].
      fraction: the fraction to keep; None keeps all rows.

    Returns: the rows that are kept, in ascending order.
    """
    if fraction is None:
        return rows
    kept = []
    for label in np.unique(labels[rows]).tolist():
        members = rows[labels[rows] == label]
        order = permutation(len(members), seed, _SUBSET_KEY, label)
        kept.append(members[order[: max(1, round(fraction * len(members)))]])
    return np.sort(np.concatenate(kept))
