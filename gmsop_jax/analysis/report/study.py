"""Runs a trained network on its evaluation split, and records its predictions and gate weights.

Axes: m images, n candidates, c classes.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np

from gmsop_jax.data.augment import evaluation_image
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError
from gmsop_jax.inference.predict import Predictor

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
    """Runs the best checkpoint on the evaluation split.

    Args:
      workdir: the working directory of the run.
      data: folder of the data set; None means the one in the run's configuration.
      max_images: if the split is larger, use this many of its images, drawn at random.

    Raises:
      CheckpointError: if there is no checkpoint.
      DataError: if the data set does not exist or has other classes.
    """
    predictor = Predictor(workdir)
    info, inputs = predictor.info, predictor.info.inputs
    folder, split = Path(data or info.config.data.dir), info.config.eval.split
    manifest = Manifest.load(folder, splits=[split])
    if manifest.classes != inputs.classes:
        raise DataError(f"the classes of the data set {folder} are not those that the run {workdir} was trained on")
    reader = ShardReader(folder, manifest.split(split).shards)
    positions = np.arange(len(reader))
    if len(reader) > max_images:
        positions = np.sort(np.random.default_rng(0).choice(len(reader), max_images, replace=False))
    columns: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(positions), _BATCH):
        examples = [decode(record) for record in reader.read(positions[start : start + _BATCH])]
        images = [evaluation_image(e["image"], inputs.image_size, info.config.eval.resize) for e in examples]
        outputs = predictor.outputs(np.stack(images), _BATCH)
        probabilities = outputs["probabilities"]
        labels = np.array([example["label"] for example in examples])
        columns.append((labels, probabilities.argmax(1), probabilities.max(1), outputs["gate_weights"]))
    labels, predicted, confidence, weights = (np.concatenate(column) for column in zip(*columns, strict=True))
    return Study(manifest.classes, split, len(reader), labels, predicted, confidence, weights, reader, positions)
