"""Folders of images: `train/<class>/*` and `val/<class>/*`, or one folder of classes split by --val-fraction."""

import functools
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.images import IMAGE_SUFFIXES, Names, decode_image
from gmsop_jax.conversion.sources.table import ImageTable
from gmsop_jax.data.augment import middle
from gmsop_jax.data.randomness import permutation
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import ConfigError, DataError, FileAccessError
from gmsop_jax.files import read_bytes

OPTIONS = frozenset({"size", "resize", "val_fraction"})
_LOG = logging.getLogger(__name__)
_SPLITS = ("train", "val", "test")
MAX_FOLDERS = 200_000  # ImageNet-21k has 21,841; links can form a graph with endless paths


def read_image_file(path: Path) -> bytes:
    """Reads a file. Raises FileAccessError if that fails, which does not mean that the image is damaged."""
    try:
        return read_bytes(path)
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error


def open_source(request: Request) -> ImageTable:
    """Opens the folder `request.path`. Hidden files, other files and folders without images are ignored."""
    root, options = request.required_path, request.options
    folders = _split_folders(request)
    found = {split: _find_images(request, folder) for split, folder in folders.items()}
    classes = tuple(sorted(found["train"]))
    if len(classes) == 1:
        _LOG.warning(
            "%s has a single class folder, %s; if the classes are the folders in it, move them one level up",
            folders["train"],
            classes[0],
        )
    for split, images in found.items():
        if unknown := sorted(images.keys() - found["train"].keys()):
            raise DataError(
                f"{folders[split].absolute()} has classes without training images: {', '.join(unknown[:5])}; remove"
                " their folders, or add training images"
            )
    for name in classes:
        if name.encode("utf-8", "ignore").decode() != name:
            raise DataError(f"the name of the class folder {name!r} is not valid UTF-8; rename it")
    listing = hashlib.sha256()
    names, labels, rows = [], [], {}
    for split, images in found.items():
        start = len(names)
        for label, key in enumerate(classes):
            for name, size in images.get(key, ()):
                listing.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
                names.append(name)
                labels.append(label)
        rows[split] = np.arange(start, len(names))
    if "val" not in folders:
        rows |= _set_aside(rows["train"], options.val_fraction or 0, request.seed)
    facts = {"listing_sha256": listing.hexdigest(), "layout": "of the sorted lines `name<tab>bytes`"}
    size = options.size
    decode = functools.partial(_decode, root, Names.of(names), size, options.resize or "pillow")
    order = {split: rows[split] for split in dict.fromkeys(("train", "val", *rows))}
    return ImageTable(classes, np.array(labels, np.int32), order, decode, (), facts, size and 3 * size**2)


def _decode(root: Path, names: Names, size: int | None, method: Method, row: int) -> np.ndarray:
    image = decode_image(read_image_file(root / names[row]), names[row])
    if size is None:
        return image
    side = min(image.shape[:2])
    return resize(middle(image, (side, side)), (size, size), method)


def _split_folders(request: Request) -> dict[str, Path]:
    """Returns the folder of each split, after checking that --val-fraction is given if and only if it is needed."""
    root, fraction = request.required_path, request.options.val_fraction
    if not root.is_dir():
        raise DataError(f"--input {root.absolute()} is a file; expected a folder of images")
    folders = {split: root / split for split in _SPLITS if (root / split).is_dir()}
    if "train" not in folders:
        folders = {"train": root}
    if "val" not in folders and fraction is None:
        raise DataError(
            f"--input {root.absolute()} has no folder val/; give --val-fraction, such as 0.1, to set aside a fraction"
            " of the images for validation"
        )
    if "val" in folders and fraction is not None:
        raise ConfigError(f"--val-fraction is given, but {root.absolute()} already has a folder val/; omit one of them")
    return folders


def _find_images(request: Request, folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Finds the images of one split: name and size in bytes of each image of each class.

    Raises: DataError if there are no images, if a link points outside the input, or if the output folder is inside
      `folder` and would be mistaken for a class.
    """
    root = request.required_path
    request.check_inside(folder)
    if Path(os.path.realpath(request.scratch)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"the output folder is inside the folder of images {folder}; choose one outside it")
    classes: dict[str, list[tuple[str, int]]] = {}
    ignored = []
    for path, size in _walk(request, folder):
        parts = path.relative_to(folder).parts
        if len(parts) > 1 and path.suffix.lower() in IMAGE_SUFFIXES:
            classes.setdefault(parts[0], []).append((str(path.relative_to(root)), size))
        else:
            ignored.append(path)
    if not classes:
        raise DataError(
            f"{folder.absolute()} has no class folders that contain images; expected <class>/<image>"
            f" ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    if ignored:
        _LOG.warning("%d files that are not images in a class folder are ignored, such as %s", len(ignored), ignored[0])
    empty = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if visible := [name for name in empty if not name.startswith(".")]:
        _LOG.warning("%d folders of %s contain no images: %s", len(visible), folder, ", ".join(visible[:5]))
    return classes


def _walk(request: Request, folder: Path) -> Iterator[tuple[Path, int]]:
    """Yields the path and size of every visible file below a folder, sorted by the parts of the path.

    Raises: DataError if a link is broken or points outside the input, or if there are more than `MAX_FOLDERS` folders.
    """
    pending: list[tuple[Path, int | None]] = [(folder, None)]  # paths, and the sizes of those that are files
    num_folders = 0
    while pending:
        path, size = pending.pop()
        if size is not None:
            yield path, size
            continue
        num_folders += 1
        if num_folders > MAX_FOLDERS:
            raise DataError(f"{folder} has more than {MAX_FOLDERS:,} folders; remove links that form cycles")
        found = []
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.name.startswith("."):  # such as .git, .DS_Store and AppleDouble's ._name.jpg
                    found += _inspect(request, path / entry.name, entry)
        pending += reversed(found)


def _inspect(request: Request, path: Path, entry: os.DirEntry[str]) -> list[tuple[Path, int | None]]:
    """Returns the path of a folder, the path and size of a file, or nothing for other entries such as FIFOs."""
    if entry.is_symlink():
        request.check_inside(path)
        if not path.exists():
            raise DataError(f"{path} is a link to a file that does not exist; remove or fix it")
        if path.is_dir() and Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(path)):
            raise DataError(f"{path} is a link to a folder that contains the link; remove it")
    if entry.is_dir():
        return [(path, None)]
    return [(path, entry.stat().st_size)] if entry.is_file() else []


def _set_aside(rows: np.ndarray, fraction: float, seed: int) -> dict[str, np.ndarray]:
    """Divides the training images into the splits 'train' and 'val' at random."""
    count = round(fraction * len(rows))
    if not 0 < count < len(rows):
        raise ConfigError(
            f"--val-fraction {fraction:g} of {len(rows)} images leaves a split empty; choose another, such as 0.1"
        )
    order = permutation(len(rows), seed, 1)
    return {"train": rows[np.sort(order[count:])], "val": rows[np.sort(order[:count])]}
