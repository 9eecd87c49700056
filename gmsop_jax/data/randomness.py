"""Randomness as a function of numbers alone.

Only what NumPy promises to keep across releases is used (SeedSequence and the bit generators' raw
output, not the distributions on top), so shards and the order of training stay the same wherever
and whenever they are made.
"""

import numpy as np


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of 0…count − 1, int64 [count], from `count` and a non-negative key alone."""
    return np.argsort(_bits(count, key), kind="stable")


def coin_flips(count: int, *key: int) -> np.ndarray:
    """Fair coin flips bool [count], from a non-negative key alone."""
    return _bits(count, key) >> np.uint64(63) == 1


def uniforms(count: int, *key: int) -> np.ndarray:
    """Numbers evenly of [0, 1), multiples of 2⁻⁵³, float64 [count], from a non-negative key alone.

    A longer draw with the same key begins with the shorter one.
    """
    return (_bits(count, key) >> np.uint64(11)) * 2.0**-53


def _bits(count: int, key: tuple[int, ...]) -> np.ndarray:
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)
