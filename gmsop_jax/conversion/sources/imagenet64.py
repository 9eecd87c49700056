"""Downsampled ImageNet-1K as its authors publish it: pickles or npz files, also inside their zip archives.

`train_data_batch_1` to `_10` and `val_data` contain `data`, uint8 [n, 3·s·s] (the red, green and blue planes, each
row-major), and `labels`, 1-based in the order of `map_clsloc.txt`. The side s is usually 64.
"""

import collections
import dataclasses
import logging
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmsop_jax.conversion.sources import Request, pickles
from gmsop_jax.conversion.sources.files import FileArray, npz_arrays, open_zip, read_lines, unpack
from gmsop_jax.errors import DataError
from gmsop_jax.files import sha256

OPTIONS = frozenset({"allow_partial"})
_LOG = logging.getLogger(__name__)
_BATCH = re.compile(r"(train_data_batch_(\d+)|val_data)(\.npz|\.pickle|\.pkl)?")
_NUM_CLASSES = 1000
_RELEASE = (*(f"train_data_batch_{number}" for number in range(1, 11)), "val_data")
PUBLISHED = {  # the npz archives of 64×64: bytes, sha256
    "train_part1": (6_783_426_789, "9422dc1dc5d092e9814a70a1cb7fc74880d2db5d88a0cb8a34ee363b12bde3f1"),
    "train_part2": (6_780_506_068, "9fafc115afb7e6c301e66dc16b2d737152b427bd5dab26e1293487a6819c7f30"),
    "val": (529_522_927, "e1e75133158a1924135a9c6f97a80d2d237b158945e0b34074e58e6c8430eeb8"),
}


@dataclasses.dataclass(frozen=True)
class Batch:
    """One file's images, uint8 [n, 3·s·s], and 0-based labels, int32 [n]."""

    data: FileArray | np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageNet64:
    """The batches of each split, one after the other."""

    batches: Mapping[str, tuple[Batch, ...]]
    side: int
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    facts: Mapping[str, Any]

    @property
    def num_images(self) -> dict[str, int]:
        """Images per split."""
        return {split: sum(len(b.labels) for b in batches) for split, batches in self.batches.items()}

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * self.side**2

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """One image, uint8 [s, s, 3], and its 0-based label."""
        for batch in self.batches[split]:
            if index < len(batch.labels):
                planes = batch.data[index].reshape(3, self.side, self.side)
                return np.stack(list(planes), axis=-1), int(batch.labels[index])
            index -= len(batch.labels)
        raise IndexError(index)


def open_source(request: Request) -> ImageNet64:
    """The batches in a folder, in the zip archives of a folder, or in one zip archive."""
    path = request.required_path
    folder = path if path.is_dir() else path.parent
    entries = sorted(path.iterdir()) if path.is_dir() else [path]
    files = {entry.name: entry for entry in entries if _BATCH.fullmatch(entry.name)}
    used, facts = list(files.values()), {}
    if not files:
        used = [entry for entry in entries if entry.suffix == ".zip"]
        facts["archives"] = {archive.name: _check_published(archive) for archive in used}
        files = {name: file for archive in used for name, file in _unpack(archive, request.scratch).items()}
    classes = _class_names(folder)
    batches: dict[str, list[Batch]] = collections.defaultdict(list)
    for name in sorted(files, key=_number):
        split = "train" if name.startswith("train") else "val"
        batches[split].append(_read(files[name], len(classes), request.scratch))
    if "train" not in batches:
        raise DataError(
            f"--input {path.absolute()} contains no train_data_batch_1…; expected the pickles, npz files or zip"
            " archives of downsampled ImageNet"
        )
    missing = [name for name in _RELEASE if name not in {_batch_name(file) for file in files}]
    if missing and not request.options.allow_partial:
        raise DataError(
            f"--input {path.absolute()} lacks {', '.join(missing)}; download what is missing, or give --allow-partial"
            " to convert the rest"
        )
    whole = {split: tuple(found) for split, found in batches.items()}
    return ImageNet64(whole, _side(whole), classes, tuple(used), facts)


def _batch_name(file_name: str) -> str:
    """`train_data_batch_3` of `train_data_batch_3.npz`."""
    match = _BATCH.fullmatch(file_name)
    return match[1] if match else ""


def _number(name: str) -> tuple[int, str]:
    match = _BATCH.fullmatch(name)
    return int(match[2] or 0) if match else 0, name


def _unpack(archive: Path, scratch: Path) -> dict[str, Path]:
    with open_zip(archive) as zipped:
        members = {Path(info.filename).name: info for info in zipped.infolist()}
        wanted: dict[str, zipfile.ZipInfo] = {name: i for name, i in members.items() if _BATCH.fullmatch(name)}
        return {name: unpack(zipped, info, scratch) for name, info in wanted.items()}


def _check_published(archive: Path) -> str:
    """What the archive is: compared with the published sizes and sums."""
    size = archive.stat().st_size
    for part, (bytes_, sum_) in PUBLISHED.items():
        if size == bytes_:
            if (found := sha256(archive)) != sum_:
                raise DataError(
                    f"{archive} has the size of the published {part} archive but sha256 {found} instead of {sum_}: it"
                    " is damaged; download it again"
                )
            return f"the published {part} archive (sha256 {sum_})"
    _LOG.warning("%s (%d bytes) is not one of the published npz archives; its checksum is not known", archive, size)
    return "not a published npz archive"


def _class_names(folder: Path) -> tuple[str, ...]:
    """Third column of map_clsloc.txt, in the order of the second; numbers without that file."""
    file = folder / "map_clsloc.txt"
    if not file.exists():
        return tuple(f"class {label}" for label in range(1, _NUM_CLASSES + 1))
    rows = [line.split() for line in read_lines(file)]
    if any(len(row) != 3 or row[1] != str(at) for at, row in enumerate(rows, 1)):
        raise DataError(f"{file} is not a list of `wnid number name` with numbers from 1 up")
    repeated = {name for name, count in collections.Counter(row[2] for row in rows).items() if count > 1}
    return tuple(f"{name} ({wnid})" if name in repeated else name for wnid, _, name in rows)


def _read(file: Path, num_classes: int, scratch: Path) -> Batch:
    if zipfile.is_zipfile(file):
        value: Any = npz_arrays(file, ("data", "labels"), scratch)
    else:
        value = pickles.load(file)
    if not isinstance(value, dict) or not {"data", "labels"} <= value.keys():
        raise DataError(f"{file} isn't a batch of downsampled ImageNet: it lacks 'data' or 'labels'")
    data, labels = value["data"], value["labels"]
    if not isinstance(data, (FileArray, np.ndarray)) or len(data.shape) != 2 or np.dtype(data.dtype) != np.uint8:
        raise DataError(f"{file}: 'data' isn't a uint8 array of 2 dimensions")
    is_array = isinstance(labels, (FileArray, np.ndarray))
    if not is_array and not (isinstance(labels, list) and all(isinstance(label, int) for label in labels)):
        raise DataError(f"{file}: 'labels' is neither an array nor a list of integers")
    labels = labels.whole() if isinstance(labels, FileArray) else np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != len(data):
        raise DataError(f"{file}: {len(data)} images and 'labels' of {labels.dtype} {labels.shape}: they don't match")
    if len(labels) and not 1 <= labels.min() <= labels.max() <= num_classes:
        raise DataError(
            f"{file}: labels go from {labels.min()} to {labels.max()}; expected 1 to {num_classes} "
            "(1-based). They are wrong, or belong to another map_clsloc.txt"
        )
    return Batch(data, (labels.astype(np.int64) - 1).astype(np.int32))


def _side(batches: Mapping[str, tuple[Batch, ...]]) -> int:
    widths = {int(batch.data.shape[1]) for parts in batches.values() for batch in parts}
    side = math.isqrt(max(widths) // 3)
    if len(widths) != 1 or 3 * side**2 not in widths or not side:
        raise DataError(f"'data' has rows of {sorted(widths)} bytes; expected 3·s·s of one side s (12288 for 64)")
    return side
