"""Fashion-MNIST: the sample that comes with the package, or the IDX files of the whole data set.

The images are gray, have 28×28 pixels, and show ten kinds of clothing. The test images are the split 'val'. With the
option `val_fraction`, they are the split 'test', and 'val' is a part of the training images. © 2017 Zalando SE, MIT
licence (NOTICE).
"""

import functools
import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.table import ImageTable, subset
from gmsop_jax.errors import DataError
from gmsop_jax.files import Budget

OPTIONS = frozenset({"val_fraction", "train_fraction"})
CLASSES = ("t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_SAMPLE = Path(__file__).parent / "sample.npz"
_SHAPE = (28, 28)
Part = tuple[np.ndarray, np.ndarray]  # images, uint8 [n, 28, 28], and labels, uint8 [n]


def open_source(request: Request) -> ImageTable:
    """Opens the embedded sample, or the IDX files (also .gz) in the folder `request.path`."""
    (train, train_labels), (test, test_labels), files = (
        _read_sample() if request.path is None else _read_folder(request.required_path)
    )
    images, labels = np.concatenate([train, test]), np.concatenate([train_labels, test_labels])
    rows = {"train": np.arange(len(train)), "val": np.arange(len(train), len(images))}
    fraction, seed = request.options.val_fraction, request.seed
    if fraction is not None:
        val = subset(rows["train"], labels, fraction, seed)
        rows = {"train": np.setdiff1d(rows["train"], val), "val": val, "test": rows["val"]}
    rows["train"] = subset(rows["train"], labels, request.options.train_fraction, seed)
    facts = {"licence": "MIT, © 2017 Zalando SE"}
    decode = functools.partial(_decode, images)  # 55 MB for the whole set
    return ImageTable(CLASSES, labels, rows, decode, files, facts, math.prod(_SHAPE))


def _decode(images: np.ndarray, row: int) -> np.ndarray:
    return images[row]


def _read_sample() -> tuple[Part, Part, tuple[Path, ...]]:
    with np.load(_SAMPLE) as sample:
        train = sample["train_images"], sample["train_labels"]
        return train, (sample["test_images"], sample["test_labels"]), (_SAMPLE,)


def _read_folder(folder: Path) -> tuple[Part, Part, tuple[Path, ...]]:
    parts, files = [], []
    for prefix in ("train", "t10k"):
        image_file = _find(folder, f"{prefix}-images", "idx3-ubyte")
        label_file = _find(folder, f"{prefix}-labels", "idx1-ubyte")
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if images.shape != (len(labels), *_SHAPE):
            raise DataError(
                f"{image_file} has the shape {images.shape}, but {label_file} has {len(labels)} labels of 28×28 images;"
                " download the files again"
            )
        parts.append((images, labels))
        files += [image_file, label_file]
    return *parts, tuple(files)


def read_idx(path: Path, num_dims: int) -> np.ndarray:
    """Reads the uint8 array of an IDX file, gzipped or not. Raises DataError if it is damaged or has another type."""
    size = 4 + 4 * num_dims
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(size)
            shape = tuple(int(side) for side in np.frombuffer(header[4:].ljust(size - 4, b"\0"), ">u4"))
            Budget(path.stat().st_size).take_bytes(math.prod(shape))
            data = file.read(math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} can't be read ({error}); download it again") from error
    if header[:4] != bytes([0, 0, 8, num_dims]):
        raise DataError(
            f"{path} is not an IDX file of uint8 with {num_dims} dimensions: it begins with {header[:4].hex()}"
        )
    if len(data) != (needed := math.prod(shape)):
        found = "more" if len(data) > needed else f"{len(data):,}"
        raise DataError(f"{path} is damaged: its header requires {needed:,} values, but it has {found}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _find(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{separator}{kind}{ending}" for separator in "-." for ending in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"--input {folder.absolute()} lacks {names[0]} (or {names[1]}); Fashion-MNIST has four such files")
