"""Folders of images: `train/<class>/*` and `val/<class>/*`, or one folder of classes split by --val-fraction."""

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.images import Names, decode_image
from gmsop_jax.data.randomness import permutation
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import ConfigError, DataError, FileAccessError

OPTIONS = frozenset({"size", "resize", "val_fraction"})
_LOG = logging.getLogger(__name__)
_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The names, relative to `root`, and the labels of the images of each split."""

    root: Path
    names: Mapping[str, Names]
    labels: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    size: int | None
    method: Method
    facts: Mapping[str, Any]
    files: tuple[Path, ...] = ()

    @property
    def num_images(self) -> dict[str, int]:
        """Number of images in each split."""
        return {split: len(labels) for split, labels in self.labels.items()}

    @property
    def image_bytes(self) -> int | None:
        """Bytes of one image; None if the images keep their sizes."""
        return None if self.size is None else 3 * self.size**2

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """Returns one image, uint8 [h, w, 1 or 3], and its label. If a size was given, its middle square is resized."""
        name = self.names[split][index]
        image = decode_image(read_image_file(self.root / name), name)
        if self.size is not None:
            image = resize(middle_square(image), (self.size, self.size), self.method)
        return image, int(self.labels[split][index])


def read_image_file(path: Path) -> bytes:
    """Reads a file; FileAccessError if that fails, which does not mean that the image is damaged."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error


def middle_square(image: np.ndarray) -> np.ndarray:
    """Returns the largest square in the middle of an image [h, w, c]."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def open_source(request: Request) -> ImageFolder:
    """Opens the folder `request.path`. Hidden files, other files and folders without images are ignored."""
    root, options = request.required_path, request.options
    if not root.is_dir():
        raise DataError(f"--input {root.absolute()} is a file; expected a folder of images")
    folders = {split: root / split for split in _SPLITS if (root / split).is_dir()}
    if "train" not in folders:
        folders = {"train": root}
    if "val" not in folders and options.val_fraction is None:
        raise DataError(
            f"--input {root.absolute()} has no train/ and val/ folders; give --val-fraction to set a share of the"
            " images aside for validation, such as 0.1"
        )
    if "val" in folders and options.val_fraction is not None:
        raise ConfigError(f"--val-fraction is given, but {root.absolute()} already has a folder val/; omit one of them")
    found = {split: _find_images(request, folder) for split, folder in folders.items()}
    classes = tuple(sorted(found["train"]))
    for split, images in found.items():
        if unknown := sorted(images.keys() - found["train"].keys()):
            raise DataError(f"{folders[split].absolute()} has classes that train lacks: {', '.join(unknown[:5])}")
    for name in classes:
        if name.encode("utf-8", "ignore").decode() != name:
            raise DataError(f"the name of the class folder {name!r} is not valid UTF-8; rename it")
    listing = hashlib.sha256()
    names, labels = {}, {}
    for split, images in found.items():
        rows = [(name, label, size) for label, key in enumerate(classes) for name, size in images.get(key, ())]
        for name, _, size in rows:
            listing.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
        names[split] = Names.of(name for name, _, _ in rows)
        labels[split] = np.array([label for _, label, _ in rows], np.int32)
    if "val" not in folders:
        names, labels = _set_aside(names, labels, options.val_fraction or 0, request.seed)
    facts = {"listing_sha256": listing.hexdigest(), "layout": "of the sorted lines `name<tab>bytes`"}
    return ImageFolder(root, names, labels, classes, options.size, options.resize or "pillow", facts)


def _find_images(request: Request, folder: Path) -> dict[str, list[tuple[str, int]]]:
    """Finds the images of one split: name and size in bytes of each image of each class.

    Raises: DataError if there are no images, if a link leads out of the input, or if the output folder lies
      inside `folder` and would be taken for a class.
    """
    root = request.required_path
    request.check_inside(folder)
    if Path(os.path.realpath(request.scratch)).is_relative_to(os.path.realpath(folder)):
        raise DataError(f"the output folder lies inside the images' folder {folder}; choose one outside of it")
    classes: dict[str, list[tuple[str, int]]] = {}
    ignored = []
    for path, size in _walk(request, folder, ()):
        parts = path.relative_to(folder).parts
        if len(parts) > 1 and path.suffix.lower() in _ENDINGS:
            classes.setdefault(parts[0], []).append((str(path.relative_to(root)), size))
        else:
            ignored.append(path)
    if not classes:
        raise DataError(
            f"{folder.absolute()} has no class folders that contain images; expected <class>/<image>"
            f" ({', '.join(sorted(_ENDINGS))})"
        )
    if ignored:
        _LOG.warning("%d files that are not images in a class folder are ignored: %s, …", len(ignored), ignored[0])
    empty = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if visible := [name for name in empty if not name.startswith(".")]:
        _LOG.warning("%d folders of %s contain no images: %s", len(visible), folder, ", ".join(visible[:5]))
    return classes


def _walk(request: Request, folder: Path, parents: tuple[str, ...]) -> Iterator[tuple[Path, int]]:
    """Yields the path and size of every visible file below a folder, sorted by the parts of the path."""
    real = os.path.realpath(folder)
    if real in parents:
        raise DataError(f"{folder} is a link to a folder that contains the link; remove it")
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):  # such as .git, .DS_Store and AppleDouble's ._name.jpg
            continue
        if entry.is_symlink():
            request.check_inside(path)
            if not path.exists():
                raise DataError(f"{path} is a link to a file that does not exist; remove or repair it")
        if entry.is_dir():
            yield from _walk(request, path, (*parents, real))
        elif entry.is_file():
            yield path, entry.stat().st_size


def _set_aside(
    names: dict[str, Names], labels: dict[str, np.ndarray], fraction: float, seed: int
) -> tuple[dict[str, Names], dict[str, np.ndarray]]:
    """Moves a random share of the training images to a split 'val'."""
    all_names, all_labels = names.pop("train"), labels.pop("train")
    total = len(all_names)
    count = round(fraction * total)
    if not 0 < count < total:
        raise ConfigError(
            f"--val-fraction {fraction:g} of {total} images leaves a split empty; choose another share, such as 0.1"
        )
    order = permutation(total, seed, 1)
    rows = {"train": np.sort(order[count:]), "val": np.sort(order[:count])}
    split_names = {split: Names.of(all_names[row] for row in chosen) for split, chosen in rows.items()}
    split_labels = {split: all_labels[chosen] for split, chosen in rows.items()}
    return {**split_names, **names}, {**split_labels, **labels}
