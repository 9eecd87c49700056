import numpy as np
import pytest

from gmsop_jax.data.randomness import Shuffle, coin_flips, permutation, uniforms


def test_permutation_is_one_and_depends_on_its_key():
    first = permutation(1000, 0, 1)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(first, permutation(1000, 0, 1))
    assert (first != permutation(1000, 0, 2)).any()
    assert (first != permutation(1000, 1, 1)).any()


def test_permutation_never_changes():
    # Written down once: shards and runs made by earlier releases rely on it.
    assert permutation(8, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]


def test_shuffle_never_changes():
    # Written down once: runs are resumed by it. Another order needs another pipeline.ORDER_VERSION.
    assert Shuffle(8, 0)(np.arange(8)).tolist() == [3, 0, 4, 7, 5, 1, 2, 6]
    assert Shuffle(5000, 3, 0, 1)(np.array([0, 1, 4999])).tolist() == [836, 3570, 3525]


@pytest.mark.parametrize("counts", [range(1, 150), [4999, 5000, 5041, 65536]])
def test_shuffle_is_a_permutation(counts):
    for count in counts:
        np.testing.assert_array_equal(np.sort(Shuffle(count, 7)(np.arange(count))), np.arange(count))


def test_shuffle_computes_any_part_alone():
    shuffle, positions = Shuffle(3000, 1, 2), np.array([2999, 5, 5, 1700])
    np.testing.assert_array_equal(shuffle(positions), shuffle(np.arange(3000))[positions])
    assert 0 <= Shuffle(10**11, 0)(np.array([10**11 - 1]))[0] < 10**11  # would take 2 TB as a permutation


@pytest.mark.parametrize("count", [5, 10, 30])
def test_shuffle_is_even(count):
    """Each pair of elements comes equally often to the first two positions."""
    first, second = np.array([Shuffle(count, 0, epoch)(np.arange(2)) for epoch in range(10_000)]).T
    counts = np.zeros((count, count))
    np.add.at(counts, (first, second), 1)
    expected = 10_000 / (count * (count - 1))
    chi_squared = ((counts[~np.eye(count, dtype=bool)] - expected) ** 2 / expected).sum()
    freedom = count * (count - 1) - 1
    assert abs(chi_squared - freedom) < 5 * np.sqrt(2 * freedom)  # five standard deviations


def test_shuffle_leaves_no_trace_of_the_order():
    order = Shuffle(100_000, 5)(np.arange(100_000))
    for lag in (1, 316, 317):  # the sides of its grid
        assert abs(np.corrcoef(order[:-lag], order[lag:])[0, 1]) < 5 / np.sqrt(100_000)
    batches = order[:99_840].reshape(-1, 256)
    for labels in (batches // 10_000, batches % 10):
        counts = np.stack([(labels == label).sum(1) for label in range(10)])
        assert abs(((counts - 25.6) ** 2 / 25.6).sum(0).mean() - 9) < 1  # as of independent draws


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
