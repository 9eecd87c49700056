"""Three kinds of images in one data set: solar cells (ELPV), clothing (Fashion-MNIST) and emoji.

The input folder contains the folders `elpv`, `fashion-mnist` and `emoji` with the inputs of these sources. The classes
are those of all three. Only a tenth of Fashion-MNIST's training images are used, so that they don't outnumber the rest.
Its test images are its own; the option `fold` chooses those of ELPV and emoji.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gmsop_jax.conversion.sources import Options, Request, Source
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import DataError

OPTIONS = frozenset({"size", "resize", "fold", "train_fraction"})
_MODULES = {"elpv": "elpv", "fashion-mnist": "fashion_mnist", "emoji": "emoji"}
_SIZE = 64
_FASHION_FRACTION = 0.1
_SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Domains:
    """The concatenation of several sources, with their images resized to one size."""

    sources: Mapping[str, Source]
    size: int
    method: Method

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of all sources, with the name of the source in front."""
        return tuple(f"{name}/{label}" for name, source in self.sources.items() for label in source.classes)

    @property
    def num_images(self) -> dict[str, int]:
        """Number of images in each split. The splits `test_elpv` etc. contain the images of `test` from one source."""
        total = {split: sum(source.num_images[split] for source in self.sources.values()) for split in _SPLITS}
        return total | {_test_split(name): source.num_images["test"] for name, source in self.sources.items()}

    @property
    def image_bytes(self) -> int:
        """Bytes of one colour image; a gray image has a third as many."""
        return 3 * self.size**2

    @property
    def files(self) -> list[Path]:
        """The input files of all sources."""
        return [file for source in self.sources.values() for file in source.files]

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of each source."""
        return {name: dict(source.facts) for name, source in self.sources.items()}

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """Returns one image, uint8 [size, size, 1 or 3], and its label."""
        first_label = 0
        for name, source in self.sources.items():
            own = "test" if split == _test_split(name) else split
            count = source.num_images[own] if own in _SPLITS else 0
            if index < count:
                image, label = source.load(own, index)
                image = image[..., None] if image.ndim == 2 else image
                return resize(image, (self.size, self.size), self.method), first_label + label
            index -= count
            first_label += len(source.classes)
        raise IndexError(f"split {split!r} has only {self.num_images[split]} images")


def open_source(request: Request) -> Domains:
    """Opens the folder `request.path`."""
    root, options = request.required_path, request.options
    sources = {}
    for name, module in _MODULES.items():
        if not (root / name).is_dir():
            raise DataError(f"--input {root.absolute()} has no folder {name}; expected {', '.join(_MODULES)}")
        own = Options(fold=options.fold, train_fraction=options.train_fraction, follow_links=options.follow_links)
        if name == "fashion-mnist":
            fraction = _FASHION_FRACTION * (options.train_fraction or 1)
            own = dataclasses.replace(own, fold=None, val_fraction=0.1, train_fraction=fraction)
        opener = importlib.import_module(f"gmsop_jax.conversion.sources.{module}").open_source
        sources[name] = opener(dataclasses.replace(request, path=root / name, options=own))
    return Domains(sources, options.size or _SIZE, options.resize or "pillow")


def _test_split(name: str) -> str:
    return f"test_{name.replace('-', '_')}"
