"""Downsampled ImageNet-1K as its authors publish it: pickles or npz files, also inside their zip archives.

`train_data_batch_1` to `_10` and `val_data` contain `data`, uint8 [n, 3·s·s] (the red, green and blue planes, each
row-major), and `labels`, 1-based in the order of `map_clsloc.txt`. The side s is usually 64.
"""

import collections
import functools
import logging
import math
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gmsop_jax.conversion.sources import Request, pickles
from gmsop_jax.conversion.sources.files import FileArray, npz_arrays, open_zip, read_lines, unpack
from gmsop_jax.conversion.sources.table import ImageTable
from gmsop_jax.errors import DataError
from gmsop_jax.files import sha256

OPTIONS = frozenset({"allow_partial"})
_LOG = logging.getLogger(__name__)
_BATCH = re.compile(r"(train_data_batch_(\d+)|val_data)(\.npz|\.pickle|\.pkl)?")
_NUM_CLASSES = 1000
_MAX_BATCH = 10_000_000  # images; the released batches have up to 128,123
Images = FileArray | np.ndarray  # of one batch, uint8 [n, 3·s·s]
_RELEASE = (*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data")
PUBLISHED = {  # the npz archives of 64×64: bytes, sha256
    "train_part1": (6_783_426_789, "9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1"),
    "train_part2": (6_780_506_068, "9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30"),
    "val": (529_522_927, "e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8"),
}


def open_source(request: Request) -> ImageTable:
    """Opens a batch or a zip archive of batches, or a folder of either."""
    path = request.required_path
    folder = path if path.is_dir() else path.parent
    entries = sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]
    files = {entry.name: entry for entry in entries if _BATCH.fullmatch(entry.name)}
    used, facts = list(files.values()), {}
    if not files:
        used = [entry for entry in entries if entry.suffix == ".zip"]
        facts["archives"] = {archive.name: _check_published(archive) for archive in used}
        files = {name: file for archive in used for name, file in _unpack(archive, request.scratch).items()}
    _check_complete(request, {_batch_name(file) for file in files})
    classes = _class_names(folder / "map_clsloc.txt", request)
    names = sorted(files, key=_position)
    batches = [_read(files[name], len(classes), request.scratch) for name in names]
    images, labels = [data for data, _ in batches], np.concatenate([labels for _, labels in batches])
    num_train = sum(len(data) for name, data in zip(names, images, strict=True) if name.startswith("train"))
    rows = {"train": np.arange(num_train), "val": np.arange(num_train, len(labels))}
    if num_train == len(labels):
        del rows["val"]
    side = _side(images)
    decode = functools.partial(_decode, images, np.cumsum([0, *map(len, images)]), side)
    return ImageTable(classes, labels, rows, decode, tuple(used), facts, 3 * side**2)


def _check_complete(request: Request, found: set[str]) -> None:
    given = f"--input {request.required_path.absolute()}"
    if not any(name.startswith("train") for name in found):
        raise DataError(
            f"{given} contains no train_data_batch_1…; expected the pickles, npz files or zip archives of downsampled"
            " ImageNet"
        )
    missing = [name for name in _RELEASE if name not in found]
    if missing and not request.options.allow_partial:
        raise DataError(
            f"{given} lacks {', '.join(missing)}; download what is missing, or give --allow-partial to convert the rest"
        )


def _decode(images: Sequence[Images], starts: np.ndarray, side: int, row: int) -> np.ndarray:
    """Returns image `row` of all batches, uint8 [s, s, 3]; the batches begin at the rows `starts`."""
    batch = int(np.searchsorted(starts, row, side="right")) - 1
    planes = images[batch][row - int(starts[batch])].reshape(3, side, side)
    return np.stack(list(planes), axis=-1)


def _batch_name(file_name: str) -> str:
    """Returns `train_data_batch_3` for `train_data_batch_3.npz`, and an empty string for other files."""
    match = _BATCH.fullmatch(file_name)
    return match[1] if match else ""


def _position(file_name: str) -> tuple[bool, int, str]:
    """Returns a key by which batches are sorted: first those for training, by number, then validation."""
    number = _batch_name(file_name).rpartition("_")[2]
    return file_name.startswith("val"), int(number) if number.isdigit() else 0, file_name


def _unpack(archive: Path, scratch: Path) -> dict[str, Path]:
    with open_zip(archive) as zipped:
        members = {Path(info.filename).name: info for info in zipped.infolist()}
        return {name: unpack(zipped, info, scratch) for name, info in members.items() if _BATCH.fullmatch(name)}


def _check_published(archive: Path) -> str:
    """Compares an archive with the published sizes and checksums; returns a description for the manifest."""
    size = archive.stat().st_size
    for part, (published_size, checksum) in PUBLISHED.items():
        if size == published_size:
            if (found := sha256(archive)) != checksum:
                raise DataError(
                    f"{archive} has the size of the published {part} archive, but its sha256 is {found} instead of"
                    f" {checksum}: it is damaged; download it again"
                )
            return f"the published {part} archive (sha256 {checksum})"
    _LOG.warning("%s (%d bytes) is not one of the published npz archives; its checksum is not known", archive, size)
    return "not a published npz archive"


def _class_names(file: Path, request: Request) -> tuple[str, ...]:
    """Returns the names in map_clsloc.txt in the order of their labels; without that file, `class 1` and so on."""
    if not file.exists():
        return tuple(f"class {label}" for label in range(1, _NUM_CLASSES + 1))
    if request.required_path.is_dir():  # a file beside a single archive is always outside the input
        request.check_inside(file)
    rows = [line.split() for line in read_lines(file)]
    if any(len(row) != 3 or row[1] != str(at) for at, row in enumerate(rows, 1)):
        raise DataError(f"{file} is not a list of `wnid number name` with the numbers 1, 2, 3, …")
    repeated = {name for name, count in collections.Counter(row[2] for row in rows).items() if count > 1}
    return tuple(f"{name} ({wnid})" if name in repeated else name for wnid, _, name in rows)


def _read(file: Path, num_classes: int, scratch: Path) -> tuple[Images, np.ndarray]:
    """Returns the images of a batch and their 0-based labels, int32 [n]."""
    if zipfile.is_zipfile(file):
        value: Any = npz_arrays(file, ("data", "labels"), scratch)
    else:
        value = pickles.load(file)
    if not isinstance(value, dict) or not {"data", "labels"} <= value.keys():
        raise DataError(f"{file} is not a batch of downsampled ImageNet: it lacks 'data' or 'labels'")
    data, labels = value["data"], value["labels"]
    if not isinstance(data, Images) or len(data.shape) != 2 or np.dtype(data.dtype) != np.uint8:
        raise DataError(f"{file}: 'data' is not a uint8 array of 2 dimensions")
    if len(data) > _MAX_BATCH or not data.shape[1]:
        raise DataError(f"{file}: 'data' has the shape {data.shape}; expected up to {_MAX_BATCH:,} images")
    is_list = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
    if not is_list and not isinstance(labels, Images):
        raise DataError(f"{file}: 'labels' is neither an array nor a list of integers")
    if ((len(labels),) if isinstance(labels, list) else labels.shape) == (len(data),):
        labels = labels.whole() if isinstance(labels, FileArray) else np.asarray(labels)
    if not isinstance(labels, np.ndarray) or labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise DataError(f"{file}: there are {len(data)} images, but 'labels' is not an array of {len(data)} integers")
    if len(labels) and not 1 <= labels.min() <= labels.max() <= num_classes:
        raise DataError(
            f"{file}: labels are {labels.min()} to {labels.max()}; expected 1 to {num_classes} (1-based). Download the"
            " file again, or use the map_clsloc.txt that belongs to it"
        )
    return data, (labels.astype(np.int64) - 1).astype(np.int32)


def _side(images: Sequence[Images]) -> int:
    widths = {int(data.shape[1]) for data in images}
    side = math.isqrt(max(widths) // 3)
    if len(widths) != 1 or 3 * side**2 not in widths or not side:
        raise DataError(f"'data' has rows of {sorted(widths)} bytes; expected 3·s·s for one side s (12288 for s = 64)")
    return side
