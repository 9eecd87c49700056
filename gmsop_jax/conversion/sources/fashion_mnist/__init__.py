"""Fashion-MNIST: the sample that comes with the package, or the whole set's IDX files.

28×28 gray images of ten kinds of clothing. The test images are the split 'val'. With the option `val_fraction`,
they are the split 'test', and 'val' is a part of the training images. © 2017 Zalando SE, MIT licence (NOTICE).
"""

import dataclasses
import gzip
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.table import subset
from gmsop_jax.errors import DataError
from gmsop_jax.interop.matfile.budget import Budget

OPTIONS = frozenset({"val_fraction", "train_fraction"})
CLASSES = (
    "t-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_SAMPLE = Path(__file__).parent / "sample.npz"
_PREFIXES = {"train": "train", "val": "t10k"}


@dataclasses.dataclass(frozen=True)
class FashionMnist:
    """All images in memory: 47 MB for the whole set."""

    images: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    files: tuple[Path, ...]
    classes: tuple[str, ...] = CLASSES
    image_bytes: int = 28 * 28

    @property
    def num_images(self) -> dict[str, int]:
        """Images per split."""
        return {split: len(labels) for split, labels in self.labels.items()}

    @property
    def facts(self) -> dict[str, Any]:
        """The licence."""
        return {"licence": "MIT, © 2017 Zalando SE"}

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """One image, uint8 [28, 28], and its label."""
        return self.images[split][index], int(self.labels[split][index])


def open_source(request: Request) -> FashionMnist:
    """Opens the embedded sample, or the IDX files (also .gz) in the folder `request.path`."""
    source = _open_sample() if request.path is None else _open_folder(request)
    fraction, seed = request.options.val_fraction, request.seed
    images, labels = dict(source.images), dict(source.labels)
    if fraction is not None:
        images["test"], labels["test"] = images["val"], labels["val"]
        val = subset(np.arange(len(labels["train"])), labels["train"], fraction, seed)
        images["val"], labels["val"] = images["train"][val], labels["train"][val]
        images["train"], labels["train"] = np.delete(images["train"], val, 0), np.delete(labels["train"], val)
    kept = subset(np.arange(len(labels["train"])), labels["train"], request.options.train_fraction, seed)
    images["train"], labels["train"] = images["train"][kept], labels["train"][kept]
    return dataclasses.replace(source, images=images, labels=labels)


def _open_sample() -> FashionMnist:
    with np.load(_SAMPLE) as sample:
        images = {"train": sample["train_images"], "val": sample["test_images"]}
        labels = {"train": sample["train_labels"], "val": sample["test_labels"]}
    return FashionMnist(images, labels, (_SAMPLE,))


def _open_folder(request: Request) -> FashionMnist:
    folder = request.required_path
    images, labels, files = {}, {}, []
    for split, prefix in _PREFIXES.items():
        image_file = _find(folder, f"{prefix}-images", "idx3-ubyte")
        label_file = _find(folder, f"{prefix}-labels", "idx1-ubyte")
        images[split], labels[split] = read_idx(image_file, 3), read_idx(label_file, 1)
        files += [image_file, label_file]
        if len(images[split]) != len(labels[split]):
            raise DataError(
                f"{image_file} holds {len(images[split])} images and {label_file} "
                f"{len(labels[split])} labels; "
                "they aren't of one set"
            )
    return FashionMnist(images, labels, tuple(files))


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Reads the uint8 array of an IDX file, gzipped or not; DataError if it is damaged or has another type."""
    size = 4 + 4 * num_dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(size)
            shape = tuple(int(side) for side in np.frombuffer(header[4:].ljust(size - 4, b"\0"), ">u4"))
            Budget(path.stat().st_size).take_bytes(math.prod(shape))
            data = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} can't be decompressed ({error}); download it again") from error
    if header[:4] != bytes([0, 0, 8, num_dims]):
        raise DataError(
            f"{path} is not an IDX file of uint8 with {num_dims} dimensions: it begins with {header[:4].hex()}"
        )
    if len(data) != math.prod(shape):
        raise DataError(f"{path} is damaged: its header requires {math.prod(shape):,} values, but it has {len(data):,}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{separator}{kind}{ending}" for separator in "-." for ending in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"--input {folder.absolute()} lacks {names[0]} (or {names[1]}); Fashion-MNIST has four such files")
