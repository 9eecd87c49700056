"""Places365-Standard in its 256×256 version: the lists of images, with the tar archives or the unpacked folders.

The input folder contains `categories_places365.txt`, `places365_train_standard.txt`, `places365_val.txt`, and the
images, in `train_256_places365standard.tar` and `val_256.tar` or in the folders `data_256` and `val_256`.
"""

import array
import dataclasses
import functools
import hashlib
import re
from pathlib import Path

import numpy as np

from gmsop_jax.conversion.sources import Request, UnreadableImage
from gmsop_jax.conversion.sources.files import read_at, read_lines, tar_members
from gmsop_jax.conversion.sources.image_folder import read_image_file
from gmsop_jax.conversion.sources.images import Names, decode_image
from gmsop_jax.conversion.sources.table import ImageTable
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import DataError

OPTIONS = frozenset({"size", "resize"})
_SIZE = 100
_LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
_TARS = {"train": "train_256_places365standard.tar", "val": "val_256.tar"}
_FOLDERS = {"train": "data_256", "val": "val_256"}


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one split: their names, and where they are in a tar archive or folder."""

    request: Request
    path: Path
    names: Names
    members: np.ndarray | None  # offset and size in the archive, int64 [n, 2]; None for a folder

    def read(self, index: int) -> bytes:
        """Returns the bytes of one image file."""
        if self.members is not None:
            offset, size = self.members[index].tolist()
            return read_at(self.path, offset, size)
        path = self.path / self.names[index]
        self.request.check_inside(path)
        if not path.is_file():
            raise UnreadableImage(f"{self.names[index]} does not exist")
        return read_image_file(path)


def open_source(request: Request) -> ImageTable:
    """Opens the folder `request.path`."""
    folder, options = request.required_path, request.options
    categories = folder / "categories_places365.txt"
    classes, numbers = _list(categories)
    if (numbers != np.arange(len(classes))).any():
        raise DataError(
            f"{categories}: the numbers of the categories are not 0 to {len(classes) - 1} in order; download it again"
        )
    splits, labels, files = [], [], [categories]
    for split, name in _LISTS.items():
        names, numbers = _list(folder / name)
        if numbers.max() >= len(classes):
            raise DataError(
                f"{folder / name}: labels are {numbers.min()} to {numbers.max()}, but those of {len(classes)}"
                f" categories are 0 to {len(classes) - 1}; download the lists again, all of the same version"
            )
        images = _find_images(request, split, names)
        splits.append(images)
        labels.append(numbers)
        files += [folder / name] if images.members is None else [folder / name, images.path]
    num_train = len(labels[0])
    rows = {"train": np.arange(num_train), "val": np.arange(num_train, num_train + len(labels[1]))}
    plain = tuple(classes[label].split("/", 1)[-1] for label in range(len(classes)))
    size, method = options.size or _SIZE, options.resize or "matlab"
    decode = functools.partial(_decode, *splits, size, method)
    facts = {"size": size, "resize": method}
    return ImageTable(plain, np.concatenate(labels), rows, decode, tuple(files), facts, 3 * size**2)


def _decode(train: Images, val: Images, size: int, method: Method, row: int) -> np.ndarray:
    images, index = (train, row) if row < len(train.names) else (val, row - len(train.names))
    return resize(decode_image(images.read(index), images.names[index]), (size, size), method)


def _list(file: Path) -> tuple[Names, np.ndarray]:
    """Returns the name (without a leading slash) and the number in each line of a list file."""
    lines = [line.rsplit(maxsplit=1) for line in read_lines(file)]
    if not lines or any(len(line) != 2 or not re.fullmatch(r"\d{1,9}", line[1]) or "\0" in line[0] for line in lines):
        raise DataError(f"{file} is not a list of `name number` lines; download it again")
    return Names.of(name.lstrip("/") for name, _ in lines), np.array([int(n) for _, n in lines], np.int32)


def _find_images(request: Request, split: str, names: Names) -> Images:
    folder = request.required_path
    tar, images = folder / _TARS[split], folder / _FOLDERS[split]
    if tar.is_file():
        return Images(request, tar, names, _find_members(tar, names))
    if not images.is_dir():
        raise DataError(f"--input {folder.absolute()} has neither {tar.name} nor the folder {images.name}")
    for index in range(len(names)):  # links are checked when an image is read
        if ".." in names[index].split("/"):
            request.check_inside(images / names[index])
    return Images(request, images, names, None)


def _find_members(tar: Path, names: Names) -> np.ndarray:
    """Returns the offset and size in the archive of each named image, int64 [n, 2].

    Names are compared by 8-byte hashes, because millions of strings would need too much memory.
    """
    hashes, places = array.array("Q"), array.array("q")
    for member, _ in tar_members(tar, "r:"):
        hashes.append(_hash(member.name.removeprefix("./").split("/", 1)[-1]))
        places.extend((member.offset_data, member.size))
    found, table = np.array(hashes, np.uint64), np.array(places, np.int64).reshape(-1, 2)
    order = np.argsort(found)
    wanted = np.fromiter((_hash(names[row]) for row in range(len(names))), np.uint64, len(names))
    positions = np.minimum(np.searchsorted(found[order], wanted), max(len(found) - 1, 0))
    missing = np.flatnonzero(found[order][positions] != wanted) if len(found) else np.arange(len(names))
    if len(missing):
        raise DataError(
            f"{tar} lacks {len(missing)} of the {len(names)} listed images, such as {names[int(missing[0])]}; it is"
            " truncated or of another version: download it again"
        )
    return table[order][positions]


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
