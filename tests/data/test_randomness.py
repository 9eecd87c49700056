import numpy as np

from gmsop_jax.data.randomness import coin_flips, permutation, uniforms


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


def test_uniforms_never_change():
    # Written down once, as the permutation.
    values = uniforms(3, 0)
    assert (values * 2.0**53).astype(int).tolist() == [5737240835340368, 2430022687152954, 369056694262205]
    np.testing.assert_array_equal(uniforms(2, 0), values[:2])


def test_uniforms_are_even():
    values = uniforms(40_000, 3, 1, 4)
    assert values.dtype == np.float64
    assert (values >= 0).all()
    assert (values < 1).all()
    assert abs(np.histogram(values, 8, (0, 1))[0] / 5000 - 1).max() < 0.06  # four standard deviations
