"""Stored images → images of one size: whole, their centre, or a part drawn at random.

Each way is a small object that is called with a block of images and a row of random numbers for each of them, and
keeps nothing: the same numbers give the same pixels, in any thread or process.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from gmsop_jax.data.resize import resize
from gmsop_jax.errors import ConfigError

Pixels = np.ndarray | list[np.ndarray]  # uint8 [n, h, w, c], or [h, w, c] each where they differ; c = 1 or 3

_TRIES = 10  # to find a part inside of the image
_ASPECTS = 3 / 4, 4 / 3  # of a part, width / height
_LONGEST = 16  # times the shorter side; of a longer image the middle is taken before it is enlarged


@dataclasses.dataclass(frozen=True)
class Whole:
    """All of an image, resized."""

    num_draws: ClassVar[int] = 0

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> Pixels:
        """Images of one size.

        Args:
          pixels: n images.
          draws: of [0, 1), float64 [n, num_draws].
          size: height and width of the result.
          mean_rgb: colour of what lies outside of an image, uint8 [3].
        Returns: uint8 [n, *size, c], or n of [*size, c].
        """
        del draws, mean_rgb
        if isinstance(pixels, np.ndarray) and pixels.shape[1:3] == size:
            return pixels
        return [resize(image, size, "pillow") for image in pixels]


@dataclasses.dataclass(frozen=True)
class Centre:
    """The centre of an image whose shorter side has been resized to `shorter_side`; 0 takes it `Whole`."""

    shorter_side: int
    num_draws: ClassVar[int] = 0

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> Pixels:
        """As `Whole`; the size must fit into a square of `shorter_side`."""
        if not self.shorter_side:
            return Whole()(pixels, draws, size, mean_rgb)
        return [evaluation_image(image, size, self.shorter_side) for image in pixels]


@dataclasses.dataclass(frozen=True)
class PaddedCrop:
    """A window, at a random place, of the image with `padding` pixels of the mean colour around it.

    He et al., "Deep Residual Learning for Image Recognition", 2016, §4.2. They pad with zeros after the mean is
    subtracted, which the mean colour is before.
    """

    padding: int = 4
    num_draws: ClassVar[int] = 2  # top, left

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> np.ndarray:
        """As `Whole`: uint8 [n, *size, 3]."""
        padded = pad(Whole()(pixels, draws, size, mean_rgb), self.padding, mean_rgb)
        return windows(padded, np.floor(draws * (2 * self.padding + 1)).astype(int), size)


@dataclasses.dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, between `area`'s shares of it, resized (bicubic).

    Szegedy et al., "Going Deeper with Convolutions", 2015, §6.
    """

    area: tuple[float, float] = (0.08, 1.0)
    num_draws: ClassVar[int] = 2 * _TRIES + 2  # areas, aspects, top, left

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> Pixels:
        """As `Whole`: n of uint8 [*size, c]."""
        del mean_rgb
        parts = random_parts(np.array([image.shape[:2] for image in pixels]), draws, self.area)
        return [
            resize(image[top : top + height, left : left + width], size, "pillow")
            for image, (top, left, height, width) in zip(pixels, parts.tolist(), strict=True)
        ]


Crop = PaddedCrop | ResizedCrop
Preparation = Whole | Centre | Crop


def create_crop(kind: str, *, padding: int, area: tuple[float, float]) -> Crop | None:
    """The crop that `config.data` names: 'padded', 'resized', or 'none'.

    Raises: ConfigError if it is none of these.
    """
    if kind == "none":
        return None
    if kind == "padded":
        return PaddedCrop(padding)
    if kind == "resized":
        return ResizedCrop((float(area[0]), float(area[1])))
    raise ConfigError(f"crop is {kind!r}; it is none, padded or resized")


def evaluation_image(image: np.ndarray, size: tuple[int, int], shorter_side: int) -> np.ndarray:
    """An image as evaluation takes it: resized with its aspect (bicubic), and the centre cut out.

    Args:
      image: uint8 [h, w, c].
      size: height and width of the result, neither more than `shorter_side`.
      shorter_side: its length after resizing; the other is rounded down. 0 resizes the whole image to `size`.
    Returns: uint8 [*size, c].
    """
    if not shorter_side:
        return resize(image, size, "pillow")
    longest = _LONGEST * min(image.shape[:2])
    image = middle(image, (min(image.shape[0], longest), min(image.shape[1], longest)))
    height, width = image.shape[:2]
    shape = (shorter_side * height // min(height, width), shorter_side * width // min(height, width))
    return middle(resize(image, shape, "pillow"), size)


def middle(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle [*size, c] of an image [h, w, c] that is no smaller; half a pixel up and left where it must be."""
    top, left = (image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]


def pad(pixels: Pixels, padding: int, colour: np.ndarray) -> np.ndarray:
    """Puts a margin around images of one size.

    Args:
      pixels: n images [h, w, c].
      padding: pixels on every side.
      colour: of the margin, uint8 [3].
    Returns: uint8 [n, h + 2·padding, w + 2·padding, 3].
    """
    height, width = pixels[0].shape[:2]
    padded = np.empty((len(pixels), height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded.reshape(*padded.shape[:2], -1)[...] = np.tile(colour, padded.shape[2])  # long rows are filled fastest
    copy_images(padded[:, padding : padding + height, padding : padding + width], pixels)
    return padded


def windows(pixels: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cuts one window out of each image.

    Args:
      pixels: uint8 [n, h, w, c].
      corners: top and left of each window, integers [n, 2].
      size: height and width of the windows.
    Returns: uint8 [n, *size, c].
    """
    count, height, _, channels = pixels.shape
    rows = pixels.reshape(count, height, -1)
    every = np.lib.stride_tricks.sliding_window_view(rows, (size[0], size[1] * channels), axis=(1, 2))
    return every[np.arange(count), corners[:, 0], channels * corners[:, 1]].reshape(count, *size, channels)


def random_parts(shapes: np.ndarray, draws: np.ndarray, area: tuple[float, float]) -> np.ndarray:
    """Draws a part of each image, as torchvision's RandomResizedCrop does.

    Ten times a share of the image's area is drawn evenly, and an aspect, evenly in its logarithm, between 3/4 and 4/3;
    the first part that fits is put at a random place. If none fits it is the centre: the whole image, or the most of it
    that has an allowed aspect.

    Args:
      shapes: height and width of each image, integers [n, 2].
      draws: of [0, 1), float64 [n, 22]: ten shares, ten aspects, top, left.
      area: least and largest share.
    Returns: top, left, height and width of the parts, int64 [n, 4].
    """
    shares, aspects, places = np.split(draws, (_TRIES, 2 * _TRIES), axis=1)
    pixels = shapes.prod(1, keepdims=True) * (area[0] + (area[1] - area[0]) * shares)
    low, high = np.log(_ASPECTS)
    root = np.exp((low + (high - low) * aspects) / 2)
    tried = np.round(np.sqrt(pixels)[..., None] * np.stack([1 / root, root], -1)).astype(int)  # [n, 10, 2]
    fits = ((tried > 0) & (tried <= shapes[:, None])).all(-1)
    first = tried[np.arange(len(shapes)), fits.argmax(1)]
    chosen = np.where(fits.any(1, keepdims=True), first, _central(shapes))
    room = shapes - chosen
    corners = np.where(fits.any(1, keepdims=True), np.floor(places * (room + 1)).astype(int), room // 2)
    return np.concatenate([corners, chosen], axis=1)


def copy_images(out: np.ndarray, pixels: Pixels) -> None:
    """Copies images of one size into `out` [n, h, w, 3], gray ones into all three channels."""
    if isinstance(pixels, np.ndarray):
        out[...] = pixels
    else:
        for row, image in enumerate(pixels):
            out[row] = image


def _central(shapes: np.ndarray) -> np.ndarray:
    """Height and width of the most of each image that has an allowed aspect, integers [n, 2]."""
    height, width = shapes.T
    low, high = _ASPECTS
    return np.stack(
        [np.minimum(height, np.round(width / low)), np.minimum(width, np.round(height * high))], axis=1
    ).astype(int)
