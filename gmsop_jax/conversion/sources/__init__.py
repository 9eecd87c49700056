"""Readers of foreign data sets, one small module each, behind one protocol.

A module offers `open_source(request) -> Source` and the names of the options it takes in `OPTIONS`.
Everything after reading (order, shards, statistics, checksums, progress) is
`gmsop_jax.conversion.convert`'s.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gmsop_jax.errors import ConfigError, DataError

_MODULES = {
    "fashion-mnist": "fashion_mnist",
    "image-folder": "image_folder",
    "imagenet64": "imagenet64",
    "imdb-mat": "imdb_mat",
    "places365": "places365",
}
NAMES = tuple(_MODULES)


class UnreadableImage(DataError):
    """One image of many can't be decoded; conversion lists it and goes on, up to a stated share."""


class Source(Protocol):
    """A foreign data set, opened: what it holds, and any one of its images.

    Sources are pickled to worker processes, so they keep paths and tables but no open files.
    """

    @property
    def classes(self) -> Sequence[str]:
        """Class names; labels are their positions."""
        ...

    @property
    def num_images(self) -> Mapping[str, int]:
        """Images per split; 'train' is one of them."""
        ...

    @property
    def image_bytes(self) -> int:
        """Bytes of one image as it will be stored raw (an estimate if they differ)."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """The files that were read, for the manifest."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """More for the manifest; 'stored_mean_rgb' is compared with the computed mean."""
        ...

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """One image, uint8 [h, w] or [h, w, 1 or 3], and its 0-based label.

        Raises: UnreadableImage for a damaged one among many; DataError where the whole source is
          wrong.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Options:
    """What some sources can be asked for; None leaves the source's own default."""

    size: int | None = None
    resize: str | None = None
    val_fraction: float | None = None

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Request:
    """Where and how to open a source; `scratch` is a folder for what must be unpacked."""

    path: Path | None
    scratch: Path
    seed: int = 0
    options: Options = Options()

    @property
    def required_path(self) -> Path:
        """The input path, which must exist."""
        if self.path is None:
            raise DataError("this source needs --input: the folder or file that was downloaded")
        if not self.path.exists():
            raise DataError(f"--input {self.path.absolute()} doesn't exist")
        return self.path


def open_source(name: str, request: Request) -> Source:
    """Opens the source of that name.

    Raises: ConfigError for an unknown name or an option it doesn't take; DataError for files that
      aren't such a source.
    """
    if name not in _MODULES:
        raise ConfigError(f"unknown source {name!r}; one of {', '.join(NAMES)}")
    module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    for option, value in request.options.given().items():
        if option not in module.OPTIONS:
            raise ConfigError(f"source {name!r} takes no option {option} (given: {value!r})")
    opener: Callable[[Request], Source] = module.open_source
    return opener(request)
