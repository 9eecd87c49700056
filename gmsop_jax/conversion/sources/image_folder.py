"""Folders of images: `train/<class>/*` and `val/<class>/*`, or one folder of classes split by --val-fraction."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from gmsop_jax.conversion.sources import Request, UnreadableImage
from gmsop_jax.conversion.sources.images import Names, decode_image
from gmsop_jax.data.randomness import permutation
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import ConfigError, DataError

OPTIONS = frozenset({"size", "resize", "val_fraction"})
_ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_SPLITS = ("train", "val", "test")
_GUESSED_SIDE = 256  # of images that keep their sizes, for the estimate of space


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Names relative to `root` and labels of each split's images."""

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
        """Images per split."""
        return {split: len(labels) for split, labels in self.labels.items()}

    @property
    def image_bytes(self) -> int:
        """Bytes of one image."""
        return 3 * (self.size or _GUESSED_SIDE) ** 2

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """One image, uint8 [h, w, 1 or 3]: its middle square resized, if a size was given."""
        name = self.names[split][index]
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{name}: {error}") from error
        image = decode_image(data, name)
        if self.size is not None:
            image = resize(middle_square(image), (self.size, self.size), self.method)
        return image, int(self.labels[split][index])


def middle_square(image: np.ndarray) -> np.ndarray:
    """The largest square in the middle of an image [h, w, c]."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def open_source(request: Request) -> ImageFolder:
    """The folder `request.path`."""
    root, options = request.required_path, request.options
    if options.size is not None and options.size < 1:
        raise ConfigError(f"--size is {options.size}; it must be at least 1")
    splits = {split: root / split for split in _SPLITS if (root / split).is_dir()}
    if "train" not in splits:
        splits = {"train": root}
    if "val" not in splits and options.val_fraction is None:
        raise DataError(
            f"--input {root.absolute()} holds no train/ and val/ folders: give --val-fraction to "
            "set a share of the "
            "images aside, such as 0.1"
        )
    classes = _classes(splits)
    listing = hashlib.sha256()
    names, labels = {}, {}
    for split, folder in splits.items():
        found = list(_images(root, folder, classes))
        for name, _, size in found:
            listing.update(f"{name}\t{size}\n".encode("utf-8", "surrogateescape"))
        if not found:
            raise DataError(f"{folder.absolute()} holds no images in class folders ({', '.join(sorted(_ENDINGS))})")
        names[split] = Names.of(name for name, _, _ in found)
        labels[split] = np.array([label for _, label, _ in found], np.int32)
    if "val" not in splits:
        names, labels = _set_aside(names, labels, options.val_fraction or 0, request.seed)
    facts = {"listing_sha256": listing.hexdigest(), "layout": "of the sorted lines `name<tab>bytes`"}
    method = cast(Method, options.resize or "pillow")
    return ImageFolder(root, names, labels, classes, options.size, method, facts)


def _classes(splits: Mapping[str, Path]) -> tuple[str, ...]:
    found = {split: {entry.name for entry in folder.iterdir() if entry.is_dir()} for split, folder in splits.items()}
    if not found["train"]:
        raise DataError(f"{splits['train'].absolute()} holds no class folders; expected <class>/<image>")
    for split, names in found.items():
        if unknown := sorted(names - found["train"]):
            raise DataError(f"{splits[split].absolute()} has classes that train lacks: {', '.join(unknown[:5])}")
    return tuple(sorted(found["train"]))


def _images(root: Path, folder: Path, classes: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """(name, label, bytes) of each image, in the order of their names."""
    for label, name in enumerate(classes):
        for path in sorted((folder / name).rglob("*")):
            if path.suffix.lower() in _ENDINGS and path.is_file():
                yield str(path.relative_to(root)), label, path.stat().st_size


def _set_aside(
    names: Mapping[str, Names], labels: Mapping[str, np.ndarray], fraction: float, seed: int
) -> tuple[dict[str, Names], dict[str, np.ndarray]]:
    """Moves a random share of the training images to a split 'val'."""
    total = len(labels["train"])
    count = round(fraction * total)
    if not 0 < count < total:
        raise ConfigError(f"--val-fraction {fraction:g} of {total} images leaves a split empty; use more, such as 0.1")
    order = permutation(total, seed, 1)
    chosen = {"train": np.sort(order[count:]), "val": np.sort(order[:count])}
    new_names = {split: Names.of(names["train"][row] for row in rows) for split, rows in chosen.items()}
    rest = {split: value for split, value in labels.items() if split != "train"}
    rest_names = {split: value for split, value in names.items() if split != "train"}
    return new_names | rest_names, {split: labels["train"][rows] for split, rows in chosen.items()} | rest
