"""Preprocessing of stored images: the whole image, its centre, or a random crop, resized to one size.

A preparation is called with a block of images and a row of random numbers for each of them. It keeps no state, so the
same numbers give the same pixels in any thread or process.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from gmsop_jax.data.resize import resize

Pixels = np.ndarray | list[np.ndarray]  # uint8 [n, h, w, c], or a list of n [h, w, c] of any shapes; c = 1 or 3

_TRIES = 10  # attempts to find a crop that lies inside the image
_ASPECTS = 3 / 4, 4 / 3  # smallest and largest aspect ratio (width / height) of a crop
_MAX_ASPECT = 16  # images with a larger ratio of their sides are cropped to this ratio before they are resized


@dataclasses.dataclass(frozen=True)
class Centre:
    """Resizes the shorter side to `shorter_side` and crops the centre; 0 resizes the whole image instead."""

    shorter_side: int
    num_draws: ClassVar[int] = 0

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> Pixels:
        """Prepares a block of images.

        Args:
          pixels: n images.
          draws: random numbers in [0, 1), float64 [n, num_draws].
          size: height and width of the result; neither is more than `shorter_side`, unless that is 0.
          mean_rgb: colour that surrounds an image, uint8 [3].

        Returns: uint8 [n, *size, c], or a list of n [*size, c].
        """
        del draws, mean_rgb
        if not self.shorter_side and isinstance(pixels, np.ndarray) and pixels.shape[1:3] == size:
            return pixels
        return [evaluation_image(image, size, self.shorter_side) for image in pixels]


@dataclasses.dataclass(frozen=True)
class PaddedCrop:
    """Pads the image with `padding` pixels of the mean colour on every side and crops it at a random position.

    He et al., "Deep Residual Learning for Image Recognition", 2016, §4.2. They pad with zeros after subtracting the
    mean, which is equivalent.
    """

    padding: int
    num_draws: ClassVar[int] = 2  # top, left

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> Pixels:
        """Prepares a block of images; takes the arguments of `Centre` and returns uint8 [n, *size, 3]."""
        padded = pad(Centre(0)(pixels, draws, size, mean_rgb), self.padding, mean_rgb)
        return windows(padded, np.floor(draws * (2 * self.padding + 1)).astype(int), size)


@dataclasses.dataclass(frozen=True)
class ResizedCrop:
    """Resizes a random part of the image, whose fraction of the image's area is between the two numbers in `area`.

    Szegedy et al., "Going Deeper with Convolutions", 2015, §6.
    """

    area: tuple[float, float]
    num_draws: ClassVar[int] = 2 * _TRIES + 2  # areas, aspect ratios, top, left

    def __call__(self, pixels: Pixels, draws: np.ndarray, size: tuple[int, int], mean_rgb: np.ndarray) -> Pixels:
        """Prepares a block of images; takes the arguments of `Centre` and returns a list of n uint8 [*size, c]."""
        del mean_rgb
        crops = random_parts(np.array([image.shape[:2] for image in pixels]), draws, self.area)
        return [
            resize(image[top : top + height, left : left + width], size, "pillow")
            for image, (top, left, height, width) in zip(pixels, crops.tolist(), strict=True)
        ]


Preparation = Centre | PaddedCrop | ResizedCrop


def training_preparation(data: Any) -> Preparation:
    """Creates the preparation of training images that `crop` names in the section `data` of a configuration."""
    low, high = data.crop_area
    crops = {"padded": PaddedCrop(data.crop_padding), "resized": ResizedCrop((float(low), float(high)))}
    return {"none": Centre(0), **crops}[data.crop]


def evaluation_image(image: np.ndarray, size: tuple[int, int], shorter_side: int) -> np.ndarray:
    """Prepares an image for evaluation: resizes its shorter side (bicubic) and crops the centre.

    Args:
      image: uint8 [h, w, c].
      size: height and width of the result, neither more than `shorter_side` unless that is 0.
      shorter_side: length of the shorter side after resizing; that of the longer side is rounded down. 0 resizes the
        whole image to `size`.

    Returns: uint8 [*size, c].
    """
    if not shorter_side:
        return resize(image, size, "pillow")
    longest = _MAX_ASPECT * min(image.shape[:2])
    image = middle(image, (min(image.shape[0], longest), min(image.shape[1], longest)))
    height, width = image.shape[:2]
    shape = (shorter_side * height // min(height, width), shorter_side * width // min(height, width))
    return middle(resize(image, shape, "pillow"), size)


def middle(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the centre crop [*size, c] of an image [h, w, c], at most half a pixel above or left of the centre."""
    top, left = (image.shape[0] - size[0]) // 2, (image.shape[1] - size[1]) // 2
    return image[top : top + size[0], left : left + size[1]]


def pad(pixels: Pixels, padding: int, colour: np.ndarray) -> np.ndarray:
    """Pads n images [h, w, c] of one size on every side with `padding` pixels of a colour, uint8 [3].

    Returns: uint8 [n, h + 2·padding, w + 2·padding, 3].
    """
    height, width = pixels[0].shape[:2]
    padded = np.empty((len(pixels), height + 2 * padding, width + 2 * padding, 3), np.uint8)
    padded.reshape(*padded.shape[:2], -1)[...] = np.tile(colour, padded.shape[2])  # NumPy fills long rows fastest
    copy_images(padded[:, padding : padding + height, padding : padding + width], pixels)
    return padded


def windows(pixels: np.ndarray, corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crops images, uint8 [n, h, w, c], to windows [n, *size, c]; `corners` [n, 2] are the windows' tops and lefts."""
    count, height, _, channels = pixels.shape
    rows = pixels.reshape(count, height, -1)
    every = np.lib.stride_tricks.sliding_window_view(rows, (size[0], size[1] * channels), axis=(1, 2))
    return every[np.arange(count), corners[:, 0], channels * corners[:, 1]].reshape(count, *size, channels)


def random_parts(shapes: np.ndarray, draws: np.ndarray, area: tuple[float, float]) -> np.ndarray:
    """Draws a crop of each image, as torchvision's RandomResizedCrop does.

    Up to ten times, a fraction of the image's area is drawn uniformly, and an aspect ratio (width to height)
    log-uniformly between 3/4 and 4/3. The first crop that fits into the image is placed at random. If none fits, the
    crop is the largest one of an allowed aspect ratio, in the centre of the image.

    Args:
      shapes: height and width of each image, integers [n, 2].
      draws: random numbers in [0, 1), float64 [n, 22]: ten fractions, ten aspect ratios, top, left.
      area: smallest and largest fraction of the area.

    Returns: top, left, height and width of the crops, int64 [n, 4].
    """
    fractions, aspects, places = np.split(draws, (_TRIES, 2 * _TRIES), axis=1)
    pixels = shapes.prod(1, keepdims=True) * (area[0] + (area[1] - area[0]) * fractions)
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
    """Copies images of one size into `out` [n, h, w, 3]; gray images are repeated in all three channels."""
    if isinstance(pixels, np.ndarray):
        out[...] = pixels
    else:
        for row, image in enumerate(pixels):
            out[row] = image


def _central(shapes: np.ndarray) -> np.ndarray:
    """Returns height and width of the largest crop of each image with an allowed aspect ratio, integers [n, 2]."""
    height, width = shapes.T
    low, high = _ASPECTS
    return np.stack(
        [np.minimum(height, np.round(width / low)), np.minimum(width, np.round(height * high))], axis=1
    ).astype(int)
