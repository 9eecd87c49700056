import numpy as np

from gmsop_jax.data.order import coin_flips, permutation


def test_permutation_is_one_and_depends_on_its_key():
    first = permutation(1000, 0, 1)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(first, permutation(1000, 0, 1))
    assert (first != permutation(1000, 0, 2)).any()
    assert (first != permutation(1000, 1, 1)).any()


def test_permutation_never_changes():
    # Written down once: shards and runs made by earlier releases rely on it.
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_coins_are_fair():
    flips = coin_flips(10_000, 3, 1, 4)
    assert abs(flips.mean() - 0.5) < 0.02  # four standard deviations
