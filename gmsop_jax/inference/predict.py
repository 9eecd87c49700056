"""Prediction: image files → classes, gate weights and features."""

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
from gmsop_jax.errors import DataError
from gmsop_jax.training import parallel, restore
from gmsop_jax.training.step import normalize

ENDINGS = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a network says about one image.

    Attributes:
      file: as it was named.
      probabilities: [classes], float32; they sum to 1.
      gate_weights: [n], float32, k of them not 0 (more if `eval.flip_average` takes the mean of two views); [1]
        in a network without gate.
      features: [f], float32: the pooled vector, for retrieval or a linear probe.
    """

    file: str
    probabilities: np.ndarray
    gate_weights: np.ndarray
    features: np.ndarray


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image file that can't be read, and why."""

    file: str
    reason: str


def make_predict_step(
    model: nn.Module, *, mean_rgb: ArrayLike, flip_average: bool = False
) -> Callable[[Mapping[str, Any], UInt8[Array, "b h w 3"]], dict[str, Array]]:
    """The prediction step (variables, images) → outputs, for `jax.jit` and `jax.export`.

    Args:
      model: gives `(logits, aux)`.
      mean_rgb: [3], mean colour that is subtracted.
      flip_average: every output but the probabilities, which are the logits' softmax, is the mean of that of
        each image and of its mirror image.

    Returns: a function of images uint8 [b, h, w, 3] (RGB) that gives `logits` and `probabilities`
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
    """Reads an image file of any size and kind as a network takes it.

    Turned upright by its EXIF data, transparency laid over white, gray repeated to three channels; the
    largest piece in the middle with the aspect of `size` is resized (bicubic), or a smaller one that
    `shorter_side` says.

    Args:
      file: in any format that Pillow reads; of an animation the first frame is taken.
      size: height and width.
      shorter_side: `config.eval.resize` of the run: the length to which the shorter side is resized before
        the centre is cut out, as in evaluation; 0 leaves out as little as possible.

    Raises:
      UnreadableImage: if it is missing or no image.
    """
    try:
        data = pathlib.Path(file).read_bytes()
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
    """The image files that some names mean.

    Args:
      inputs: image files; folders, of which all images are taken, sub-folders' too, in the order of
        their names; `.txt` files that list one path a line.

    Raises:
      DataError: if there is none, or a list can't be read.
    """
    files: list[str] = []
    for name in inputs:
        path = pathlib.Path(name)
        if path.is_dir():
            found = (file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
            files += sorted(str(file) for file in found)
        elif path.suffix.lower() == ".txt":
            files += _read_list(path)
        else:
            files.append(str(path))
    if not files:
        raise DataError(f"there are no images in {', '.join(str(name) for name in inputs)}")
    return files


def _read_list(path: pathlib.Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"the list {path} can't be read ({error})") from error
    return [line.strip() for line in lines if line.strip()]


class Predictor:
    """A trained network, ready for image files.

    Args:
      path: a working directory or one step's folder in it, as `restore.load` takes it.

    Attributes:
      info: of the run: configuration, classes, image size.

    Raises: as `restore.load`.

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

    def predict(
        self, inputs: Iterable[str | os.PathLike[str]], *, batch_size: int = 256
    ) -> Iterator[Prediction | Unreadable]:
        """Predicts image by image, in batches of one static shape, reading ahead.

        Args:
          inputs: as `list_files` takes them.
          batch_size: of the network's runs; the smaller number of files if they are fewer.

        Returns: an iterator over the results in the order of the files. Those of a batch come when it
          is full; unreadable files are told, and skipped.

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
        """Results of the images and of the unreadable files among them, in their order."""
        batch = np.zeros((batch_size, *self.info.inputs.image_size, 3), np.uint8)
        images = [image for _, image in items if isinstance(image, np.ndarray)]
        outputs: dict[str, np.ndarray] = {}
        if images:
            batch[: len(images)] = images
            placed = parallel.place_batch({"image": batch}, self._mesh)
            outputs = jax.device_get(self._step(self._variables, placed["image"]))
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
            return file, Unreadable(file, "no image, or of no format that Pillow reads")
        return file, Unreadable(file, str(error).removeprefix(f"{file}: "))
