"""Predicts the classes of image files, with gate weights and features."""

import dataclasses
import functools
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
from numpy.typing import ArrayLike

from gmsop_jax.conversion.sources import UnreadableImage
from gmsop_jax.conversion.sources.images import decode_image
from gmsop_jax.data.augment import evaluation_image, middle
from gmsop_jax.errors import DataError, FileAccessError
from gmsop_jax.training import parallel, restore
from gmsop_jax.training.step import normalize

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A network's outputs for one image.

    Attributes:
      file: the name of the image file.
      probabilities: [classes], float32; they sum to 1.
      gate_weights: [n], float32, of which k are not 0 (up to 2k with `eval.flip_average`, which averages two views);
        [1] in a network without gate.
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
    model: nn.Module, *, mean_rgb: ArrayLike, flip_average: bool = False
) -> Callable[[Mapping[str, Any], UInt8[Array, "b h w 3"]], dict[str, Array]]:
    """Creates the prediction step (variables, images) → outputs, for `jax.jit` and `jax.export`.

    Args:
      model: a network that returns `(logits, aux)`.
      mean_rgb: [3], the mean colour, which is subtracted.
      flip_average: average logits, gate weights and features over each image and its mirror image; the
        probabilities are the softmax of the averaged logits.

    Returns: a function of images, uint8 [b, h, w, 3] (RGB), that returns `logits` and `probabilities`
      [b, classes], `gate_weights` [b, n] and `features` [b, f].
    """

    def predict_step(variables: Mapping[str, Any], images: Array) -> dict[str, Array]:
        output: Any = model.apply(variables, normalize(images, mean_rgb), train=False)
        if flip_average:
            mirrored = model.apply(variables, normalize(images[:, :, ::-1], mean_rgb), train=False)
            output = jax.tree.map(lambda a, b: (a + b) / 2, output, mirrored)
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
    """Reads an image file and brings it to the size that a network expects.

    The image is rotated as its EXIF data says, transparent pixels are composed over white, and gray is repeated to
    three channels. Then it is resized (bicubic) and its centre is cut out.

    Args:
      file: an image in any format that Pillow reads; of an animation the first frame is used.
      size: height and width.
      shorter_side: `config.eval.resize` of the run: the length to which the shorter side is resized before the
        centre is cut out, as in evaluation; 0 cuts off as little as possible.

    Raises:
      UnreadableImage: if the file is missing, is not a regular file, or is not an image.
    """
    try:
        data = _read_bytes(pathlib.Path(file))
    except OSError as error:
        raise UnreadableImage(error.strerror or str(error)) from error
    image = decode_image(data, str(file))
    height, width = image.shape[:2]
    if not shorter_side:
        scale = min(height / size[0], width / size[1])
        image = middle(image, (max(1, round(scale * size[0])), max(1, round(scale * size[1]))))
    image = evaluation_image(image, size, shorter_side)
    return np.repeat(image, 3 // image.shape[2], axis=2)


def list_files(inputs: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Expands folders and lists to the names of image files.

    Args:
      inputs: image files; folders, in which all images are taken, those in sub-folders included, in the order of
        their names; `.txt` files with one path on each line. In folders, names that begin with a dot are ignored.

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
    """Yields what is named like an image in a folder and its sub-folders; links are followed, but no folder twice."""

    def refuse(error: OSError) -> None:
        raise FileAccessError.from_os_error(error.filename or folder, error) from error

    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        for name in names:
            if pathlib.Path(name).suffix.lower() in ENDINGS and not name.startswith("."):
                yield os.path.join(parent, name)


def _read_list(path: pathlib.Path) -> list[str]:
    try:
        lines = _read_bytes(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"the list {path} can't be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _read_bytes(path: pathlib.Path) -> bytes:
    """Reads a regular file. Opening anything else, such as a named pipe, could wait forever."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path.read_bytes()


class Predictor:
    """A trained network that predicts the classes of image files.

    Args:
      path: a working directory, or the folder of one step in it, as in `restore.load`.

    Attributes:
      info: configuration, classes and image size of the run.

    Raises:
      CheckpointError: if the checkpoint can't be loaded.

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
        step = make_predict_step(
            model, mean_rgb=self.info.inputs.mean_rgb, flip_average=self.info.config.eval.flip_average
        )
        self._step = jax.jit(step)

    def outputs(self, images: UInt8[np.ndarray, "b h w 3"]) -> dict[str, np.ndarray]:
        """The outputs of the prediction step for images of the network's size; see `make_predict_step`."""
        placed = parallel.place_batch({"image": images}, self._mesh)
        return jax.device_get(self._step(self._variables, placed["image"]))

    def predict(
        self, inputs: Iterable[str | os.PathLike[str]], *, batch_size: int = 256
    ) -> Iterator[Prediction | Unreadable]:
        """Predicts the classes of images, in batches of one static shape, while it reads ahead.

        Args:
          inputs: files, folders and lists; see `list_files`.
          batch_size: number of images in a batch; at most the number of files is used.

        Returns: an iterator over the results, in the order of the files. A file that can't be read gives an
          `Unreadable`.

        Raises:
          DataError: if there are no files.
        """
        files = list_files(inputs)
        return self._predict(files, min(batch_size, len(files)))

    def _predict(self, files: list[str], batch_size: int) -> Iterator[Prediction | Unreadable]:
        read = functools.partial(_read, size=self.info.inputs.image_size, shorter_side=self.info.config.eval.resize)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 * batch_size)
        waiting: list[tuple[str, np.ndarray | Unreadable]] = []
        readable = 0
        for item in grain.MapDataset.source(files).map(read).to_iter_dataset(options):
            waiting.append(item)
            readable += isinstance(item[1], np.ndarray)
            if readable == batch_size:
                yield from self._run(waiting, batch_size)
                waiting, readable = [], 0
        yield from self._run(waiting, batch_size)

    def _run(
        self, items: Sequence[tuple[str, np.ndarray | Unreadable]], batch_size: int
    ) -> Iterator[Prediction | Unreadable]:
        """Yields the results of one batch of images and of the unreadable files between them, in their order."""
        rows = -(-batch_size // self._mesh.size) * self._mesh.size  # split evenly over the devices
        batch = np.zeros((rows, *self.info.inputs.image_size, 3), np.uint8)
        images = [image for _, image in items if isinstance(image, np.ndarray)]
        outputs: dict[str, np.ndarray] = {}
        if images:
            batch[: len(images)] = images
            outputs = self.outputs(batch)
        row = 0
        for file, image in items:
            if isinstance(image, Unreadable):
                yield image
                continue
            yield Prediction(
                file, outputs["probabilities"][row], outputs["gate_weights"][row], outputs["features"][row]
            )
            row += 1


def _read(file: str, *, size: tuple[int, int], shorter_side: int) -> tuple[str, np.ndarray | Unreadable]:
    try:
        return file, read_image(file, size, shorter_side)
    except UnreadableImage as error:
        if isinstance(error.__cause__, PIL.UnidentifiedImageError):
            return file, Unreadable(file, "not an image in a format that Pillow reads")
        return file, Unreadable(file, str(error).removeprefix(f"{file}: "))
