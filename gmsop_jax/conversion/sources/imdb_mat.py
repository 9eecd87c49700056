"""MatConvNet's image databases ("imdb"): all images in one MATLAB file of version 7.3 (HDF5), or 7 if they are few.

`images.data` is [H, W, 3, n] uint8 in MATLAB's order, so an HDF5 reader sees [n, 3, W, H]. `images.labels` are 1-based
floating-point numbers. `images.set` is 1 for train, 2 for val and 3 for test. `meta.rgbMean` is the mean colour that
the author of the file computed.
"""

import functools
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.files import FileArray, check_space
from gmsop_jax.conversion.sources.table import ImageTable
from gmsop_jax.errors import CheckpointError, DataError
from gmsop_jax.files import Budget, replacing
from gmsop_jax.interop import matfile
from gmsop_jax.interop.matfile import hdf5, isolated

OPTIONS: frozenset[str] = frozenset()
_SETS = {1: "train", 2: "val", 3: "test"}
_MAX_LABEL = 1_000_000
_BLOCK = 256  # images copied at a time


def open_source(request: Request) -> ImageTable:
    """Opens the .mat file `request.path`."""
    path = request.required_path
    if path.is_dir():
        raise DataError(f"--input {path.absolute()} is a folder; give the .mat file itself")
    try:
        data, fields = _open_hdf5(path, request.scratch) if matfile.is_hdf5(path) else _open_v7(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    labels, sets = (_codes(fields[name], name, len(data), path) for name in ("labels", "set"))
    if labels.min() < 1:
        raise DataError(f"{path}: the minimum of images.labels is {labels.min()}, but labels must start at 1")
    if unknown := sorted(set(sets.tolist()) - _SETS.keys()):
        raise DataError(f"{path}: images.set contains {unknown}; expected 1 (train), 2 (val) and 3 (test)")
    rows = {name: np.flatnonzero(sets == code) for code, name in _SETS.items() if (sets == code).any()}
    if "train" not in rows:
        raise DataError(f"{path}: images.set contains no 1, so there are no training images")
    classes = tuple(f"class {label}" for label in range(1, int(labels.max()) + 1))
    facts = {} if fields["mean"] is None else {"stored_mean_rgb": _mean(fields["mean"], path)}
    decode = functools.partial(_decode, data)
    return ImageTable(classes, labels - 1, rows, decode, (path,), facts, math.prod(data.shape[1:]))


def _decode(data: FileArray | np.ndarray, row: int) -> np.ndarray:
    return np.ascontiguousarray(data[row].transpose(2, 1, 0))


def _open_hdf5(path: Path, scratch: Path) -> tuple[FileArray, dict[str, Any]]:
    try:
        return isolated.call_limited(_read_hdf5, path, scratch)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is damaged or truncated ({error}); download it again") from error


def _read_hdf5(path: Path, budget: Budget, scratch: Path) -> tuple[FileArray, dict[str, Any]]:
    with h5py.File(path, "r") as file:
        data, labels, sets = (_dataset(file, f"images/{name}", budget) for name in ("data", "labels", "set"))
        _check_images(data.shape, data.dtype, path)
        mean = _dataset(file, "meta/rgbMean", budget)[()] if "meta/rgbMean" in file else None
        return _flat(data, path, scratch), {"labels": labels[()], "set": sets[()], "mean": mean}


def _dataset(file: h5py.File, name: str, budget: Budget) -> h5py.Dataset:
    """Returns an array that is stored in this file itself and does not claim to be much larger than the file."""
    node: Any = file
    for part in name.split("/"):
        if not isinstance(node, h5py.Group) or not isinstance(node.get(part, getlink=True), h5py.HardLink):
            raise DataError(f"{file.filename} is not an imdb file: it lacks the array {name.replace('/', '.')}")
        node = node[part]
    if not isinstance(node, h5py.Dataset):
        raise DataError(f"{file.filename} is not an imdb file: {name.replace('/', '.')} is not an array")
    hdf5.check_array(node)
    budget.take_bytes(node.nbytes)
    return node


def _flat(data: h5py.Dataset, path: Path, scratch: Path) -> FileArray:
    """Returns the images as an array in the file itself, or in a copy if the file stores them in chunks."""
    offset = data.id.get_offset()
    if data.chunks is None and offset is not None:
        return FileArray(path, offset, data.shape)
    target = scratch / f"{path.stem}.images"
    if not target.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        check_space(scratch, math.prod(data.shape))
        chunk = (data.chunks or (1,))[0]
        step = -(-_BLOCK // chunk) * chunk  # whole chunks, so that each is decompressed only once
        with replacing(target) as temporary, temporary.open("wb") as file:
            for start in range(0, len(data), step):
                file.write(data[start : start + step].tobytes())
    return FileArray(target, 0, data.shape)


def _open_v7(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    variables = matfile.read(path, ("images", "meta"))
    images, meta = variables.get("images"), variables.get("meta")
    for name in ("data", "labels", "set"):
        if not isinstance(images, dict) or not isinstance(images.get(name), np.ndarray):
            raise DataError(f"{path} is not an imdb file: it lacks the array images.{name}")
    data = images["data"].transpose()
    _check_images(data.shape, data.dtype, path)
    mean = meta.get("rgbMean") if isinstance(meta, dict) else None
    return data, {"labels": images["labels"], "set": images["set"], "mean": mean}


def _check_images(shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    if dtype != np.uint8 or len(shape) != 4 or shape[1] != 3 or min(shape) < 1:
        raise DataError(
            f"{path}: images.data is {dtype} {tuple(reversed(shape))}; expected uint8 [height, width, 3, images]"
        )


def _mean(value: Any, path: Path) -> list[float]:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "uif" or not np.isfinite(value).all():
        raise DataError(f"{path}: meta.rgbMean is not an array of finite numbers")
    return np.ravel(value).astype(float).tolist()


def _codes(values: Any, name: str, count: int, path: Path) -> np.ndarray:
    """Checks whole numbers, which may be stored as floating point, and returns them as int32 [count]."""
    values = np.ravel(values)
    if len(values) != count:
        raise DataError(f"{path}: there are {count} images, but {len(values)} entries in images.{name}")
    if values.dtype.kind not in "uif" or not np.isfinite(values).all() or (values != np.round(values)).any():
        raise DataError(f"{path}: images.{name} contains values that are not whole numbers")
    if (found := float(values.max())) > _MAX_LABEL:
        raise DataError(f"{path}: the maximum of images.{name} is {found:g}, but at most {_MAX_LABEL:,} is supported")
    if (found := float(values.min())) < 0:
        raise DataError(f"{path}: the minimum of images.{name} is {found:g}, but it must not be negative")
    return values.astype(np.int32)
