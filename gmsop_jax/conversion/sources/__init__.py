"""Readers of data sets in other formats: one module per format, all with the same interface.

A module defines `open_source(request) -> Source`, and `OPTIONS`, the names of the options that it accepts.
`gmsop_jax.conversion.convert` does everything after reading: the order of the images, shards, statistics, checksums and
progress.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gmsop_jax.data.records import MAX_SIDE
from gmsop_jax.data.resize import METHODS, Method
from gmsop_jax.errors import ConfigError, DataError

_MODULES = {
    "domains": "domains",
    "elpv": "elpv",
    "emoji": "emoji",
    "fashion-mnist": "fashion_mnist",
    "image-folder": "image_folder",
    "imagenet64": "imagenet64",
    "imdb-mat": "imdb_mat",
    "places365": "places365",
}
NAMES = tuple(_MODULES)


class UnreadableImage(DataError):
    """An image can't be decoded. The conversion lists and skips such images, up to a given fraction of all."""


class Source(Protocol):
    """An opened data set in another format, with random access to its images.

    Sources are pickled and sent to worker processes, so they contain paths and tables but no open files.
    """

    @property
    def classes(self) -> Sequence[str]:
        """Class names; the label of a class is its position in this sequence."""
        ...

    @property
    def num_images(self) -> Mapping[str, int]:
        """Number of images in each split. There is always a split 'train'."""
        ...

    @property
    def image_bytes(self) -> int | None:
        """Bytes of one decoded image, or None if the images have different sizes."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The input files, whose names, sizes and checksums are recorded in the manifest."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Further entries for the manifest. If 'stored_mean_rgb' is given, the computed mean is compared with it."""
        ...

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """Returns one image, uint8 [h, w] or [h, w, 1 or 3], and its 0-based label.

        Raises:
          UnreadableImage: if this image is damaged.
          DataError: if the source as a whole is invalid or damaged.
          FileAccessError: if a file can't be read, which does not mean that it is damaged.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the sources; None means the default of the source.

    Attributes:
      size: side of the square images, in pixels.
      resize: 'matlab' or 'pillow', the implementation of bicubic resizing.
      val_fraction: fraction of the training images to set aside as the split 'val'.
      train_fraction: fraction of the training images to keep, the same for each class.
      fold: which fifth of the images is the split 'test', 0 to 4.
      leave_out: the vendor whose images are the split 'test'.
      follow_links: whether to read files outside the input folder to which links or lists inside it point. All sources
        accept it.
      allow_partial: whether to convert an incomplete download of a source with several files.
    """

    size: int | None = None
    resize: Method | None = None
    val_fraction: float | None = None
    train_fraction: float | None = None
    fold: int | None = None
    leave_out: str | None = None
    follow_links: bool | None = None
    allow_partial: bool | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= MAX_SIDE:
            raise ConfigError(f"--size is {self.size}; it must be from 1 to {MAX_SIDE:,}")
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ConfigError(f"--val-fraction is {self.val_fraction}; it must be between 0 and 1, such as 0.1")
        if self.train_fraction is not None and not 0 < self.train_fraction <= 1:
            raise ConfigError(f"--train-fraction is {self.train_fraction}; it must be in (0, 1], such as 0.1")
        if self.fold is not None and not 0 <= self.fold < 5:
            raise ConfigError(f"--fold is {self.fold}; it must be from 0 to 4")
        if self.resize not in (None, *METHODS):
            raise ConfigError(f"--resize is {self.resize!r}; it must be one of {', '.join(METHODS)}")

    def given(self) -> dict[str, Any]:
        """Returns the options that are not None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Request:
    """Where the input is, a `scratch` folder for unpacking it, and the options for reading it."""

    path: Path | None
    scratch: Path
    seed: int = 0
    options: Options = Options()

    @property
    def required_path(self) -> Path:
        """The input path. Raises DataError if it was not given or does not exist."""
        if self.path is None:
            raise DataError("this source needs --input, the folder or file that was downloaded")
        if not self.path.exists():
            raise DataError(f"--input {self.path.absolute()} does not exist")
        return self.path

    def check_inside(self, path: Path) -> None:
        """Raises DataError if `path` points outside the input folder, unless `follow_links` is set."""
        root, target = os.path.realpath(self.required_path), os.path.realpath(path)
        if not self.options.follow_links and not Path(target).is_relative_to(root):
            raise DataError(
                f"{path} points outside the input {root}, to {target}; give --follow-links to read it anyway"
            )


def open_source(name: str, request: Request) -> Source:
    """Opens a data set in another format, whose name is one of `NAMES`.

    Raises:
      ConfigError: if the name is unknown, or the source does not accept an option.
      DataError: if the files are missing, damaged, not in the format of the source, or outside the input.
      OSError: if a folder or file can't be read.
    """
    if name not in _MODULES:
        raise ConfigError(f"unknown source {name!r}; it must be one of {', '.join(NAMES)}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    accepted = sorted(module.OPTIONS | {"follow_links"})
    for option, value in request.options.given().items():
        if option not in accepted:
            known = ", ".join(f"--{known.replace('_', '-')}" for known in accepted)
            raise ConfigError(
                f"source {name!r} does not accept --{option.replace('_', '-')} (got {value!r}); it accepts {known}"
            )
    opener: Callable[[Request], Source] = module.open_source
    source = opener(request)
    for file in source.files if request.path is not None else ():
        request.check_inside(file)
    return source
