"""The description of a network's inputs and classes, which is stored in the working directory.

It makes a trained network usable without its data set.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import ORDER_VERSION
from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import write_json
from gmsop_jax.training.layout import DIRECTORY, read_copy, read_file, steps_on_disk

FILE_NAME = "inputs.json"


def fingerprint(manifest: Manifest) -> dict[str, str]:
    """Returns a string for each split, which identifies its records and their order."""
    return {
        name: f"{split.num_images} images, sha256 "
        + hashlib.sha256("".join(shard.sha256 for shard in split.shards).encode()).hexdigest()
        for name, split in manifest.splits.items()
    }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The properties of its data set that a trained network depends on.

    Attributes:
      dataset: name of the data set.
      classes: names of the classes, in the order of the logits.
      mean_rgb: mean colour of the training split, 0…255, which is subtracted from every image.
      image_size: height and width of the images.
      splits: `fingerprint` of the data set; empty if it is unknown, as for imported networks.
      order: version of the order in which training sees the images.
    """

    dataset: str
    classes: tuple[str, ...]
    mean_rgb: tuple[float, float, float]
    image_size: tuple[int, int]
    splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    order: int = ORDER_VERSION

    def properties(self) -> dict[str, object]:
        """Returns what a run depends on, by name; each class and each split has an entry of its own."""
        return {
            **{f"split {name}": text for name, text in self.splits.items()},
            **{f"class {index}": name for index, name in enumerate(self.classes)},
            "mean_rgb": self.mean_rgb,
            "image_size": self.image_size,
            "order": self.order,
        }

    def save(self, workdir: str | os.PathLike[str]) -> None:
        """Writes `inputs.json` into a working directory, whose checkpoints must be of the same data.

        Raises:
          CheckpointError: if a split, or the number or order of the classes, differs from those of the checkpoints, or
            if the stored file is damaged. Classes may be renamed, with a warning.
        """
        path = pathlib.Path(workdir)
        if steps_on_disk(path / DIRECTORY) and ((path / FILE_NAME).exists() or read_copy(path, FILE_NAME)):
            self._compare(Inputs.load(path), path)
        write_json(path / FILE_NAME, dataclasses.asdict(self))

    def _compare(self, stored: "Inputs", workdir: pathlib.Path) -> None:
        if stored.order != self.order:
            logging.getLogger(__name__).warning(
                "%s was trained by another version of gmsop_jax, which shuffled the images in another order (version"
                " %d; this is version %d). From now on, the run differs from an uninterrupted one, and in the current"
                " epoch, it may see some images twice",
                workdir,
                stored.order,
                self.order,
            )
        lines = [
            f"split {name}: {stored.splits[name]} → {self.splits[name]}"
            for name in stored.splits.keys() & self.splits.keys()
            if stored.splits[name] != self.splits[name]
        ]
        renamed = [(old, new) for old, new in zip(stored.classes, self.classes, strict=False) if old != new]
        if len(stored.classes) != len(self.classes):
            lines.append(f"classes: {len(stored.classes)} → {len(self.classes)}")
        elif moved := {old for old, _ in renamed} & {new for _, new in renamed}:
            lines.append(f"order of the classes: {min(moved)!r} is in another position")
        if lines:
            raise CheckpointError(
                f"{workdir} was trained on data other than the data set {self.dataset!r} in config.data.dir:\n  "
                + "\n  ".join(sorted(lines))
                + "\nset config.data.dir to that run's data (the folder may have moved), or give another --workdir"
            )
        if renamed and stored.splits:  # without splits, the network was imported, perhaps without names
            logging.getLogger(__name__).warning(
                "the names of %d of %d classes differ from those that %s was trained with (%r is now %r); the new names"
                " are stored",
                len(renamed),
                len(self.classes),
                workdir,
                *renamed[0],
            )

    @classmethod
    def load(cls, workdir: str | os.PathLike[str]) -> "Inputs":
        """Reads what `save` wrote, or its copy in the last checkpoint if the file is missing.

        Raises:
          CheckpointError: if the file is damaged, or if both are missing.
        """
        path = pathlib.Path(workdir)
        remedy = "copy it back, or delete it to use the copy in the last checkpoint, if there is one"
        return cls.from_dict(json.loads(read_file(path, FILE_NAME)), path / FILE_NAME, remedy)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any], file: pathlib.Path, remedy: str) -> "Inputs":
        """Creates inputs from their fields. Raises CheckpointError, with the file and the remedy, if one is wrong."""
        try:
            red, green, blue = (float(x) for x in value["mean_rgb"])
            height, width = (int(x) for x in value["image_size"])
            classes = tuple(str(name) for name in value["classes"])
            splits = {str(name): str(text) for name, text in value.get("splits", {}).items()}
            return cls(
                str(value["dataset"]), classes, (red, green, blue), (height, width), splits, int(value.get("order", 1))
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}); {remedy}") from error
