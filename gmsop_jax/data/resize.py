"""Bicubic resizing of uint8 images: bit-exact with MATLAB's imresize, or by Pillow."""

import functools
from typing import Literal, get_args

import numpy as np
from PIL import Image

Method = Literal["matlab", "pillow"]
METHODS: tuple[Method, ...] = get_args(Method)
_BLOCK = 8  # output samples that are computed by one matrix product
_HALF = 0.5 + 1e-9  # rounds half up; the excess covers rounding errors in sums whose exact value is a tie


def resize(image: np.ndarray, size: tuple[int, int], method: Method) -> np.ndarray:
    """Resizes an image by bicubic interpolation with antialiasing.

    Args:
      image: uint8 [h, w, c], c = 1 or 3.
      size: (height, width) of the result.
      method: 'matlab' for `imresize`, or 'pillow'. They take the same time; their results differ in 3 to 23 % of the
        bytes.

    Returns: uint8 [*size, c]; `image` itself if it already has this size.
    """
    if image.shape[:2] == size:
        return image
    if method == "matlab":
        return imresize(image, size)
    source = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resized = source.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(resized).reshape(*size, image.shape[2])


def imresize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes an image as MATLAB's `imresize(image, size)` does by default, bit for bit.

    When the image shrinks, Keys' cubic kernel with a = −½ is widened accordingly. Borders are mirrored and
    weights normalised. The dimension with the smaller scale is resized first (rows in case of a tie), and
    values are rounded and clamped to uint8 after each of the two passes.

    Args:
      image: uint8 [h, w, c].
      size: (height, width) of the result.

    Returns: uint8 [*size, c].

    Example:
      >>> imresize(np.full((4, 4, 1), 7, np.uint8), (2, 3)).tolist()
      [[[7], [7], [7]], [[7], [7], [7]]]
    """
    scales = [size[axis] / image.shape[axis] for axis in (0, 1)]
    for axis in sorted((0, 1), key=lambda axis: scales[axis]):
        image = _pass(image, axis, size[axis])
    return image


def _pass(image: np.ndarray, axis: int, length: int) -> np.ndarray:
    rows = np.moveaxis(image, axis, 0)
    flat = rows.reshape(len(rows), -1).astype(np.float64)
    values = np.concatenate([weights @ flat[band] for band, weights in _bands(len(rows), length)])
    rounded = np.clip(np.floor(values + _HALF), 0, 255).astype(np.uint8)
    return np.moveaxis(rounded.reshape(length, *rows.shape[1:]), 0, axis)


@functools.lru_cache(maxsize=64)
def _bands(source: int, target: int) -> list[tuple[slice, np.ndarray]]:
    """Returns the weights of each block of outputs, with the band of inputs that it depends on.

    Products of small blocks involve far fewer zeros than one large product, and BLAS starts no threads for them.
    """
    weights = _weights(source, target)
    bands = []
    for start in range(0, target, _BLOCK):
        block = weights[start : start + _BLOCK]
        used = np.flatnonzero(block.any(0))
        band = slice(int(used[0]), int(used[-1]) + 1)
        bands.append((band, np.ascontiguousarray(block[:, band])))
    return bands


def _weights(source: int, target: int) -> np.ndarray:
    """Returns the weight of each input sample in each output sample, float64 [target, source]."""
    scale = target / source
    stretch = min(scale, 1.0)  # a value below 1 widens the kernel
    centre = (np.arange(target) + 0.5) / scale - 0.5
    taps = int(np.ceil(4 / stretch)) + 2
    positions = np.floor(centre - 2 / stretch)[:, None] + np.arange(taps)
    weights = _kernel(stretch * (centre[:, None] - positions))
    weights /= weights.sum(1, keepdims=True)
    mirrored = positions.astype(int) % (2 * source)
    mirrored = np.minimum(mirrored, 2 * source - 1 - mirrored)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], mirrored), weights)
    return matrix


def _kernel(x: np.ndarray) -> np.ndarray:
    """Evaluates Keys' cubic kernel with a = −½."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))
