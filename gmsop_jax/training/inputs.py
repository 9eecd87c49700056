"""What a network takes and gives, beside its weights; kept in the working directory.

With it a trained network can be used where its data set isn't.
"""

import dataclasses
import json
import os
import pathlib

from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import write_atomic

FILE_NAME = "inputs.json"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """A data set as its network sees it.

    Attributes:
      dataset: its name.
      classes: names, in the order of the logits.
      mean_rgb: mean colour of the training split, 0…255, which is subtracted from every image.
      image_size: height and width of the images.
    """

    dataset: str
    classes: tuple[str, ...]
    mean_rgb: tuple[float, float, float]
    image_size: tuple[int, int]

    def save(self, workdir: str | os.PathLike[str]) -> None:
        """Writes `inputs.json` into a working directory."""
        text = json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False)
        write_atomic(pathlib.Path(workdir) / FILE_NAME, text + "\n")

    @classmethod
    def load(cls, workdir: str | os.PathLike[str]) -> "Inputs":
        """Reads what `save` wrote.

        Raises:
          CheckpointError: if the file is missing or damaged.
        """
        file = pathlib.Path(workdir) / FILE_NAME
        try:
            value = json.loads(file.read_text("utf-8"))
            red, green, blue = (float(x) for x in value["mean_rgb"])
            height, width = (int(x) for x in value["image_size"])
            classes = tuple(str(name) for name in value["classes"])
            return cls(str(value["dataset"]), classes, (red, green, blue), (height, width))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{file} can't be read ({error}); starting the training again in that folder writes it anew"
            ) from error
