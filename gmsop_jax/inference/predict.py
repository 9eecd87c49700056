"""Predicts the classes of image files, with gate weights and features."""

import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import grain
import jax
import numpy as np
import PIL
from jaxtyping import Array, UInt8

from gmsop_jax.conversion.sources import UnreadableImage
from gmsop_jax.conversion.sources.images import IMAGE_SUFFIXES, decode_image
from gmsop_jax.data.augment import evaluation_image, middle
from gmsop_jax.errors import DataError, FileAccessError, reason
from gmsop_jax.files import read_bytes
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.training import parallel, restore
from gmsop_jax.training.step import normalize


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A network's outputs for one image.

    Attributes:
      file: the name of the image file.
      probabilities: [classes], float32; they sum to 1.
      gate_weights: [n], float32, of which k are not 0 (up to 2k with `eval.flip_average`, which averages two views).
        A network without a gate has a single weight of 1.
      features: [f], float32: the pooled vector, for retrieval or a linear probe.
    """

    file: str
    probabilities: np.ndarray
    gate_weights: np.ndarray
    features: np.ndarray


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image file that can't be read, and the reason."""

    file: str
    reason: str


def make_predict_step(
    model: nn.Module, *, mean_rgb: Sequence[float] | AnyArray, flip_average: bool
) -> Callable[[Mapping[str, Any], UInt8[Array, "b h w 3"]], dict[str, Array]]:
    """Creates the prediction step (variables, images) → outputs, for `jax.jit` and `jax.export`.

    Args:
      model: a network that returns `(logits, aux)`.
      mean_rgb: [3], the mean colour, which is subtracted.
      flip_average: whether to average the logits, gate weights and features over each image and its mirror image. The
        probabilities are then the softmax of the averaged logits.

    Returns: a function of images, uint8 [b, h, w, 3] (RGB), that returns `logits` and `probabilities`
      [b, classes], `gate_weights` [b, n] and `features` [b, f].
    """

    def forward(variables: Mapping[str, Any], images: Array) -> Any:
        return model.apply(variables, normalize(images, mean_rgb), train=False)

    def predict_step(variables: Mapping[str, Any], images: Array) -> dict[str, Array]:
        output = forward(variables, images)
        if flip_average:
            output = jax.tree.map(lambda a, b: (a + b) / 2, output, forward(variables, images[:, :, ::-1]))
        logits, aux = output
        return {
            "logits": logits,
            "probabilities": jax.nn.softmax(logits),
            "gate_weights": aux["gate_weights"],
            "features": aux["features"],
        }

    return predict_step


def read_image(
    file: str | os.PathLike[str], size: tuple[int, int], shorter_side: int = 0
) -> UInt8[np.ndarray, "h w 3"]:
    """Reads an image file, resized and cropped to the size that a network expects.

    The image is rotated according to its EXIF data, transparent pixels are composited over white, and a gray image is
    repeated to three channels. The image is cropped to its centre and resized (bicubic); which comes first depends on
    `shorter_side`.

    Args:
      file: an image in any format that Pillow reads. If it is an animation, the first frame is used.
      size: height and width.
      shorter_side: `config.eval.resize` of the run: the length to which the shorter side is resized before the centre
        crop, as in evaluation. With 0, the largest centre crop with the right aspect ratio is resized.

    Raises:
      UnreadableImage: if the file is missing, is not a regular file, or is not an image.
    """
    try:
        data = read_bytes(file)
    except OSError as error:
        raise UnreadableImage(reason(error)) from error
    image = decode_image(data, str(file))
    height, width = image.shape[:2]
    if not shorter_side:
        scale = min(height / size[0], width / size[1])
        image = middle(image, (max(1, round(scale * size[0])), max(1, round(scale * size[1]))))
    image = evaluation_image(image, size, shorter_side)
    return np.repeat(image, 3 // image.shape[2], axis=2)


def list_files(inputs: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Expands folders and lists of files to the names of image files.

    Args:
      inputs: image files; folders, of which all images are used, including those in sub-folders, sorted by name;
        and `.txt` files with one path per line. Hidden files and folders (`.name`) are ignored.

    Raises:
      DataError: if there are no images, or a list can't be read.
      FileAccessError: if a folder can't be read.
    """
    files: list[str] = []
    for name in inputs:
        path = pathlib.Path(name)
        if path.is_dir():
            files += sorted(_walk(path))
        elif path.suffix.lower() == ".txt":
            files += _read_list(path)
        else:
            files.append(str(path))
    if not files:
        raise DataError(f"there are no images in {', '.join(str(name) for name in inputs)}")
    return files


def _walk(folder: pathlib.Path) -> Iterator[str]:
    """Yields the image files in a folder and its sub-folders. Follows links, but visits each folder only once."""

    def fail(error: OSError) -> None:
        raise FileAccessError.from_os_error(error.filename or folder, error) from error

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if pathlib.Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield os.path.join(parent, name)


def _read_list(path: pathlib.Path) -> list[str]:
    try:
        lines = read_bytes(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"the list {path} can't be read ({reason(error)}); write one path per line, in UTF-8"
        ) from error
    return [line.strip() for line in lines if line.strip()]


class Predictor:
    """A trained network that predicts the classes of image files.

    Args:
      path: a working directory, the folder of one step in it, or an exported network, as in `gmsop_jax.load`.

    Attributes:
      info: configuration, classes and image size of the run.

    Raises:
      CheckpointError, ConfigError: if the network can't be loaded, as in `gmsop_jax.load`.

    Example:
      ```
      predictor = Predictor("runs/quickstart")
      for result in predictor.predict(["shoe.jpg", "more_images/"]):
          print(result)
      ```
    """

    def __init__(self, path: str | os.PathLike[str]):
        model, variables, self.info = restore.load(path)
        self._mesh = parallel.create_mesh()
        self._variables = parallel.replicate(variables, self._mesh)
        flip_average = self.info.config.eval.flip_average
        self._step = jax.jit(make_predict_step(model, mean_rgb=self.info.inputs.mean_rgb, flip_average=flip_average))

    def outputs(self, images: UInt8[np.ndarray, "b h w 3"], batch_size: int = 1) -> dict[str, np.ndarray]:
        """Returns the outputs of the prediction step for images of the network's size; see `make_predict_step`.

        Args:
          images: RGB.
          batch_size: the batch is padded with black images to at least this size, so that smaller batches don't need
            compilation. The outputs for the padding are removed.
        """
        rows = -(-max(len(images), batch_size) // self._mesh.size) * self._mesh.size  # split evenly over the devices
        padded = np.pad(images, [(0, rows - len(images)), (0, 0), (0, 0), (0, 0)])
        placed = parallel.place_batch({"image": padded}, self._mesh)
        outputs = jax.device_get(self._step(self._variables, placed["image"]))
        return {name: value[: len(images)] for name, value in outputs.items()}

    def predict(
        self, inputs: Iterable[str | os.PathLike[str]], *, batch_size: int | None = None
    ) -> Iterator[Prediction | Unreadable]:
        """Predicts the classes of images in batches, while the next images are read in the background.

        Args:
          inputs: files, folders and lists; see `list_files`.
          batch_size: maximum number of files in a batch; by default `eval.batch_size` of the network's run.

        Returns: an iterator over the results, in the order of the files. A file that can't be read yields an
          `Unreadable`.

        Raises:
          DataError, FileAccessError: as in `list_files`.
        """
        files = list_files(inputs)
        return self._predict(files, min(batch_size or self.info.config.eval.batch_size, len(files)))

    def _predict(self, files: list[str], batch_size: int) -> Iterator[Prediction | Unreadable]:
        read = functools.partial(_try_read, size=self.info.inputs.image_size, shorter_side=self.info.config.eval.resize)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
        items = iter(grain.MapDataset.source(files).map(read).to_iter_dataset(options))
        blank = np.zeros((*self.info.inputs.image_size, 3), np.uint8)  # in place of an image that can't be read
        for start in range(0, len(files), batch_size):
            batch = list(itertools.islice(items, batch_size))
            images = np.stack([blank if isinstance(item, Unreadable) else item for item in batch])
            outputs = self.outputs(images, batch_size)
            for row, item in enumerate(batch):
                if isinstance(item, Unreadable):
                    yield item
                else:
                    probabilities, weights, features = (
                        outputs[name][row] for name in ("probabilities", "gate_weights", "features")
                    )
                    yield Prediction(files[start + row], probabilities, weights, features)


def _try_read(file: str, *, size: tuple[int, int], shorter_side: int) -> np.ndarray | Unreadable:
    try:
        return read_image(file, size, shorter_side)
    except UnreadableImage as error:
        if isinstance(error.__cause__, PIL.UnidentifiedImageError):
            return Unreadable(file, "not an image in a format that Pillow reads")
        return Unreadable(file, str(error).removeprefix(f"{file}: "))
