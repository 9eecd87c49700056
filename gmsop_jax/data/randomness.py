"""Permutations and random numbers that are functions of a key alone.

A key consists of one or more non-negative integers, such as a seed, a purpose and an epoch. Only those parts of NumPy
are used that guarantee the same numbers in every release (SeedSequence and the raw output of PCG64, but not the
distributions), so shards and the order of training are the same on every machine.
"""

import math

import numpy as np

_ROUNDS = 8  # rounds of a shuffle; each changes l and then r


def permutation(count: int, *key: int) -> np.ndarray:
    """Returns a permutation of 0…count − 1, int64 [count]. It takes about 20 bytes of memory per element."""
    return np.argsort(_bits(count, key), kind="stable")


class Shuffle:
    """A permutation of 0…count − 1, any part of which is computed on demand from O(√count) random numbers.

    A Feistel network: with a = ⌈√count⌉ and b = ⌈count / a⌉, an element is written as l + a·r. Each round adds to l
    (modulo a) a random number that r selects, then to r (modulo b) one that l selects. Each step is invertible, so this
    permutes 0…ab − 1. A result of `count` or more is permuted again until it is smaller. `count` must be at least 1.

    Example:
      >>> shuffle = Shuffle(5, 0)
      >>> shuffle(np.arange(5)).tolist()
      [4, 0, 3, 1, 2]
    """

    def __init__(self, count: int, *key: int) -> None:
        self._count = count
        self._left = math.isqrt(count - 1) + 1
        self._right = -(-count // self._left)
        bits = _bits(_ROUNDS * (self._left + self._right), key).reshape(_ROUNDS, -1)
        self._left_steps = (bits[:, : self._right] % np.uint64(self._left)).astype(np.int64)
        self._right_steps = (bits[:, self._right :] % np.uint64(self._right)).astype(np.int64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the elements at some positions, int64 [n] for integers [n] in 0…count − 1."""
        elements = self._permute(positions)
        while (outside := elements >= self._count).any():
            elements[outside] = self._permute(elements[outside])
        return elements

    def _permute(self, elements: np.ndarray) -> np.ndarray:
        right, left = np.divmod(elements, self._left)
        for left_steps, right_steps in zip(self._left_steps, self._right_steps, strict=True):
            left = (left + left_steps[right]) % self._left
            right = (right + right_steps[left]) % self._right
        return left + self._left * right


def coin_flips(count: int, *key: int) -> np.ndarray:
    """Returns fair coin flips, bool [count]."""
    return _bits(count, key) >> np.uint64(63) == 1


def uniforms(count: int, *key: int) -> np.ndarray:
    """Returns numbers drawn uniformly from [0, 1), multiples of 2⁻⁵³, float64 [count].

    A longer draw with the same key begins with the shorter one.
    """
    return (_bits(count, key) >> np.uint64(11)) * 2.0**-53


def _bits(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
