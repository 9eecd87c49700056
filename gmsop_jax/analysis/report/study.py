"""Runs a trained network on the images of its evaluation split and records the decisions of its gate.

Axes: m images, n candidates, c classes.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from gmsop_jax.data.augment import evaluation_image
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError
from gmsop_jax.inference.predict import make_predict_step
from gmsop_jax.training import restore

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Study:
    """Predictions and gate weights for the images of a split.

    Attributes:
      classes: class names.
      split: name of the split.
      total: number of images in the split, of which m are studied.
      labels: true classes [m].
      predicted: most probable classes [m].
      confidence: their probabilities [m].
      gate_weights: gate weights [m, n].
      reader: reads the records of the split.
      positions: positions of the images in the split [m].
    """

    classes: tuple[str, ...]
    split: str
    total: int
    labels: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    gate_weights: np.ndarray
    reader: ShardReader
    positions: np.ndarray

    def image(self, row: int) -> np.ndarray:
        """The stored image, uint8 [h, w, 3]."""
        [record] = self.reader.read(self.positions[[row]])
        return decode(record)["image"]

    @functools.cached_property
    def selected(self) -> np.ndarray:
        """Whether an image selects a candidate [m, n]."""
        return self.gate_weights > 0

    @functools.cached_property
    def entropy(self) -> np.ndarray:
        """Entropy of the gate weights in bits [m]: 0 for a single candidate, log₂ k for equal weights."""
        weights = self.gate_weights
        return -np.sum(weights * np.log2(np.where(weights > 0, weights, 1)), axis=1)

    def by_class(self, values: np.ndarray) -> np.ndarray:
        """Means of values [m, …] over the images of each class [c, …]; NaN for a class without images."""
        sums = np.zeros((len(self.classes), *values.shape[1:]))
        np.add.at(sums, self.labels, values)
        counts = np.bincount(self.labels, minlength=len(self.classes)).astype(float)
        counts[counts == 0] = np.nan
        return sums / counts.reshape(-1, *[1] * (values.ndim - 1))

    @functools.cached_property
    def confusion(self) -> np.ndarray:
        """The number of images of each true class (row) that were predicted as each class (column) [c, c]."""
        counts = np.zeros((len(self.classes),) * 2, int)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def worst_pairs(self, count: int) -> list[tuple[int, int]]:
        """The (true, predicted) pairs with the most errors, in descending order."""
        errors = self.confusion - np.diag(np.diag(self.confusion))
        order = np.argsort(-errors, axis=None, kind="stable")[:count]
        pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
        return [(int(i), int(j)) for i, j in pairs if errors[i, j]]

    @functools.cached_property
    def together(self) -> np.ndarray:
        """The share of the images that select i (row) that also select j (column) [n, n]; NaN if no image selects i."""
        selected = self.selected.astype(float)
        counts = selected.sum(axis=0)
        counts[counts == 0] = np.nan
        return (selected.T @ selected) / counts[:, None]

    def heaviest(self, candidate: int, count: int) -> list[int]:
        """The images with the largest weights for a candidate, in descending order."""
        weights = self.gate_weights[:, candidate]
        return [int(row) for row in np.argsort(-weights, kind="stable")[:count] if weights[row] > 0]


def study_run(workdir: Path, data: Path | None, max_images: int) -> Study:
    """Runs the best checkpoint over the evaluation split.

    Args:
      workdir: the working directory of the run.
      data: folder of the data set; None means that of the run's configuration.
      max_images: if the split is larger, this many of its images are drawn at random.

    Raises:
      CheckpointError: if there is no checkpoint.
      DataError: if the data set does not exist or has other classes.
    """
    model, variables, info = restore.load(workdir)
    folder, split = Path(data or info.config.data.dir), info.config.eval.split
    manifest = Manifest.load(folder, splits=[split])
    if manifest.classes != info.inputs.classes:
        raise DataError(f"the data set {folder} has other classes than the run {workdir} was trained on")
    reader = ShardReader(folder, manifest.split(split).shards)
    positions = np.arange(len(reader))
    if len(reader) > max_images:
        positions = np.sort(np.random.default_rng(0).choice(len(reader), max_images, replace=False))
    step = jax.jit(make_predict_step(model, mean_rgb=info.inputs.mean_rgb, flip_average=info.config.eval.flip_average))
    columns: list[tuple[np.ndarray, ...]] = []
    for images, labels in _batches(reader, positions, info.inputs.image_size, info.config.eval.resize):
        padded = np.pad(images, [(0, _BATCH - len(images)), (0, 0), (0, 0), (0, 0)])
        outputs = jax.device_get(step(variables, padded))
        probabilities, weights = (outputs[name][: len(labels)] for name in ("probabilities", "gate_weights"))
        columns.append((labels, probabilities.argmax(1), probabilities.max(1), weights))
    labels, predicted, confidence, weights = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Study(manifest.classes, split, len(reader), labels, predicted, confidence, weights, reader, positions)


def _batches(
    reader: ShardReader, positions: np.ndarray, size: tuple[int, int], shorter_side: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(positions), _BATCH):
        examples = [decode(record) for record in reader.read(positions[start : start + _BATCH])]
        images = [evaluation_image(example["image"], size, shorter_side) for example in examples]
        yield np.stack(images), _labels(examples)


def _labels(examples: Sequence) -> np.ndarray:
    return np.array([example["label"] for example in examples])
