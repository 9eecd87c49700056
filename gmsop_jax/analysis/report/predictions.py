"""The predictions and gate weights of a trained network on its evaluation split.

Axes: m images, n candidates, c classes.
"""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gmsop_jax.analysis.report.gate_errors import GateErrors, measure_gate_errors
from gmsop_jax.data.augment import evaluation_image
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError
from gmsop_jax.inference.predict import Predictor
from gmsop_jax.training.inputs import fingerprint

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Predictions and gate weights for the images of a split.

    Attributes:
      total: number of images in the split, of which m are used.
      labels: true classes [m].
      predicted: most probable classes [m].
      confidence: their probabilities [m].
      gate_weights: gate weights [m, n].
      mirrored_confidence: probabilities of the same classes for the mirror images [m].
      mirrored_weights: gate weights of the mirror images [m, n].
      errors: errors with other gate weights; None for a network without a gate.
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
    mirrored_confidence: np.ndarray
    mirrored_weights: np.ndarray
    errors: GateErrors | None
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

    @functools.cached_property
    def together(self) -> np.ndarray:
        """The fraction of the images selecting i (row) that also select j (column) [n, n]; NaN if none selects i."""
        selected = self.selected.astype(float)
        counts = selected.sum(axis=0)
        counts[counts == 0] = np.nan
        return (selected.T @ selected) / counts[:, None]


def predict_split(workdir: Path, data: Path | None, max_images: int) -> Predictions:
    """Runs the last checkpoint on the evaluation split.

    Args:
      workdir: the working directory of the run.
      data: folder of the data set; None means the one in the run's configuration.
      max_images: if the split is larger, use this many of its images, drawn at random.

    Raises:
      CheckpointError: if there is no checkpoint.
      DataError: if the data set does not exist or is not the one that the run was evaluated on.
    """
    predictor = Predictor(workdir)
    config, inputs = predictor.info.config, predictor.info.inputs
    folder, split = Path(data or config.data.dir), config.eval.split
    manifest = Manifest.load(folder, splits=[split])
    expected = inputs.splits.get(split)
    if manifest.classes != inputs.classes or expected not in (None, fingerprint(manifest)[split]):
        raise DataError(f"the split {split!r} of {folder} is not the one that {workdir} was evaluated on; give --data")
    reader = ShardReader(folder, manifest.split(split).shards)
    positions = np.arange(len(reader))
    if len(reader) > max_images:
        positions = np.sort(np.random.default_rng(0).choice(len(reader), max_images, replace=False))

    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(positions), _BATCH):
            examples = [decode(record) for record in reader.read(positions[start : start + _BATCH])]
            images = [evaluation_image(e["image"], inputs.image_size, config.eval.resize) for e in examples]
            yield np.stack(images), np.array([example["label"] for example in examples])

    columns: list[tuple[np.ndarray, ...]] = []
    for images, labels in batches():
        seen, mirrored = (predictor.outputs(view, _BATCH) for view in (images, images[:, :, ::-1]))
        predicted, rows = seen["probabilities"].argmax(1), np.arange(len(labels))
        confidence, again = (outputs["probabilities"][rows, predicted] for outputs in (seen, mirrored))
        columns.append((labels, predicted, confidence, seen["gate_weights"], again, mirrored["gate_weights"]))
    labels, predicted, confidence, weights, again, mirrored_weights = map(np.concatenate, zip(*columns, strict=True))
    return Predictions(
        classes=manifest.classes,
        split=split,
        total=len(reader),
        labels=labels,
        predicted=predicted,
        confidence=confidence,
        gate_weights=weights,
        mirrored_confidence=again,
        mirrored_weights=mirrored_weights,
        errors=measure_gate_errors(workdir, batches(), weights) if weights.shape[1] > 1 else None,
        reader=reader,
        positions=positions,
    )
