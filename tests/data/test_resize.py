import functools
import math
from fractions import Fraction

import numpy as np
import pytest

from gmsop_jax.data.resize import imresize, resize


def keys(x: Fraction) -> Fraction:
    x = abs(x)
    if x <= 1:
        return Fraction(3, 2) * x**3 - Fraction(5, 2) * x**2 + 1
    return -(x**3) / 2 + Fraction(5, 2) * x**2 - 4 * x + 2 if x <= 2 else Fraction(0)


@functools.cache
def taps(count: int, length: int, x: int) -> list[tuple[int, Fraction]]:
    """Inputs (0-based) of output x (1-based) and their weights, in MATLAB's own terms and exact numbers."""
    scale = Fraction(length, count)
    width = 4 / scale if scale < 1 else Fraction(4)
    u = x / scale + (1 - 1 / scale) / 2
    left = math.floor(u - width / 2)
    found = []
    for index in range(left, left + math.ceil(width) + 2):
        weight = scale * keys(scale * (u - index)) if scale < 1 else keys(u - index)
        mirrored = (index - 1) % (2 * count) + 1
        found.append((min(mirrored, 2 * count + 1 - mirrored) - 1, weight))
    total = sum(weight for _, weight in found)
    return [(index, weight / total) for index, weight in found]


def slow_line(line: list[int], length: int) -> list[int]:
    """One line of samples, one output after the other, without any rounding but the last."""
    values = (sum(weight * line[index] for index, weight in taps(len(line), length, x)) for x in range(1, length + 1))
    return [min(max(math.floor(value + Fraction(1, 2)), 0), 255) for value in values]


def slow_imresize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    scales = [size[0] / image.shape[0], size[1] / image.shape[1]]
    for axis in (0, 1) if scales[0] <= scales[1] else (1, 0):
        image = np.apply_along_axis(lambda line, n=size[axis]: slow_line(line.tolist(), n), axis, image)
    return image.astype(np.uint8)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64, 64), (25, 25)),  # the scale of Places365: 256 → 100
        ((30, 20), (11, 13)),  # rows first
        ((20, 30), (13, 11)),  # columns first
        ((7, 5), (15, 12)),  # enlarged
        ((9, 4), (3, 8)),  # one of each
        ((5, 5), (1, 1)),
        ((1, 1), (3, 2)),
        ((3, 2), (40, 1)),  # taps beyond a whole mirror image
    ],
)
def test_equals_the_slow_version(shape: tuple[int, int], size: tuple[int, int]):
    image = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(imresize(image, size), slow_imresize(image, size))


def test_sharp_edges_clamp_between_the_passes():
    image = np.zeros((16, 16, 1), np.uint8)
    image[4:12, 4:12] = 255
    np.testing.assert_array_equal(imresize(image, (23, 23)), slow_imresize(image, (23, 23)))


def test_doubling_by_hand():
    # Outputs lie ¼ and ¾ of a sample from their neighbours. The kernel there, in 128ths: 111 at ¼,
    # 29 at ¾, −9 at 1¼, −3 at 1¾. On the line 0 0 128 128, mirrored at its ends, outputs 1 and 2
    # are 0 and −3 (clamped); the 3rd lies at 1¾: −9, clamped; the 4th at 2¼: 29 − 3 = 26; the 5th
    # at 2¾: 111 − 9 = 102; the 6th at 3¼: 128 + 9 = 137; the 7th at 3¾: 128 + 3 = 131; the 8th 128.
    line = np.array([0, 0, 128, 128], np.uint8)
    assert imresize(line[None, :, None], (1, 8))[0, :, 0].tolist() == [0, 0, 0, 26, 102, 137, 131, 128]


def test_halving_by_hand():
    # Output k lies at 2k − ½; the kernel is twice as wide: 111, 29, −9, −3 (of 256) at distances ½,
    # 1½, 2½, 3½. A lone 64 at input 9: output 5 (at 9½) gets 111·64/256 = 27.75, output 4 (at 7½)
    # 29·64/256 = 7.25; outputs 3 and 6 get less than nothing.
    line = np.zeros(16, np.uint8)
    line[8] = 64
    assert imresize(line[None, :, None], (1, 8))[0, :, 0].tolist() == [0, 0, 0, 7, 28, 0, 0, 0]


def test_constant_stays():
    image = np.full((37, 53, 3), 201, np.uint8)
    assert (imresize(image, (100, 20)) == 201).all()


def test_pillow_is_close():
    smooth = (np.add.outer(np.arange(64), np.arange(64)) * 2).astype(np.uint8)[..., None]
    difference = resize(smooth, (25, 25), "pillow").astype(int) - resize(smooth, (25, 25), "matlab")
    assert resize(smooth, (64, 64), "pillow") is smooth
    assert np.abs(difference[2:-2, 2:-2]).max() <= 1
