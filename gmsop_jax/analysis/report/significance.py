"""Tests of whether patterns in the predictions of a network are statistically significant."""

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

LEVEL = 0.01  # significance level; each test divides it by the number of simultaneous comparisons
_PERMUTATIONS = 199
_RESOLUTION = 0.01  # smaller differences are invisible, because weights and probabilities are shown with two digits


def proportion_interval(count: int, total: int) -> tuple[float, float]:
    """Returns the 95 % confidence interval of a proportion (Wilson) in percent.

    Example:
      >>> proportion_interval(10, 100)
      (5.52..., 17.43...)
    """
    interval = scipy.stats.binomtest(count, total).proportion_ci(method="wilson")
    return 100 * float(interval.low), 100 * float(interval.high)


def paired_difference(wrong: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Returns the difference of two errors on the same images, and half the width of its 95 % interval.

    Both are in percentage points.

    Args:
      wrong, reference: whether each image is misclassified [m].
    """
    difference = 100 * (wrong.astype(float) - reference)
    return float(difference.mean()), 1.96 * float(difference.std()) / len(wrong) ** 0.5


def differs(wrong: np.ndarray, reference: np.ndarray, comparisons: int = 1) -> bool:
    """Whether two errors on the same images differ significantly: McNemar's exact test at the 1 % level.

    Args:
      wrong, reference: whether each image is misclassified [m].
      comparisons: number of simultaneous tests, by which the level is divided (Bonferroni).
    """
    only, others = int(np.sum(wrong & ~reference)), int(np.sum(reference & ~wrong))
    return only != others and float(scipy.stats.binomtest(only, only + others).pvalue) < LEVEL / comparisons


def class_information(weights: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mutual information of the class and the candidate of an image, in bits.

    Args:
      weights: the gate's weights [m, n], as probabilities of the candidates.
      labels: classes [m].
    """
    joint = np.zeros((labels.max() + 1, weights.shape[1]))
    np.add.at(joint, labels, weights / weights.sum())
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    used = joint > 0
    return float(np.sum(joint[used] * np.log2(joint[used] / independent[used])))


def variance_between_classes(values: np.ndarray, labels: np.ndarray) -> float:
    """Returns the part of the variance of values [m] that their classes [m] explain."""
    counts = np.maximum(np.bincount(labels), 1)
    means = np.bincount(labels, values) / counts
    return float(np.var(means[labels]))


def permutation_test(
    statistic: Callable[[np.ndarray, np.ndarray], float], values: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float]:
    """Returns the statistic of values and labels, its mean for permuted labels, and the p-value."""
    rng = np.random.default_rng(0)
    found = statistic(values, labels)
    by_chance = [statistic(values, rng.permutation(labels)) for _ in range(_PERMUTATIONS)]
    larger = sum(value >= found for value in by_chance)
    return found, float(np.mean(by_chance)), (1 + larger) / (1 + _PERMUTATIONS)


def lifts(weights: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how much more each class uses each candidate than all images do, and whether that is significant.

    Args:
      weights: the gate's weights [m, n].
      labels: classes [m].
      num_classes: c.

    Returns: the lifts [c, n], mean weight in the class / mean weight (NaN for an empty class or an unused candidate),
      and whether each is significantly above 1: z-test at 1 % over all classes and candidates (Bonferroni).
    """
    counts = np.bincount(labels, minlength=num_classes)[:, None]
    sums = np.zeros((num_classes, weights.shape[1]))
    np.add.at(sums, labels, weights)
    mean, deviation = weights.mean(0), weights.std(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = sums / counts
        z = (means - mean) / (deviation * np.sqrt(1 / counts - 1 / len(labels)))
        significant = z > scipy.stats.norm.isf(LEVEL / sums.size)
        return means / mean, significant & np.isfinite(z)


def stands_out(values: np.ndarray, mirrored: np.ndarray, rows: Sequence[int] | np.ndarray) -> bool:
    """Whether the first or last images of a ranking differ from the others by more than noise.

    The noise is the standard deviation of the difference between the value of an image and that of its mirror image.
    The images stand out if each of them differs from the median of all images by more than twice the noise, and by more
    than 0.01, because smaller differences can't be seen in the values that are shown.

    Args:
      values: what the images are ranked by [m].
      mirrored: the same for the mirror images [m].
      rows: the images in question.
    """
    if not len(rows):
        return False
    noise = float(np.std(values - mirrored))
    distance = np.abs(values[rows] - np.median(values))
    return float(distance.min()) > max(2 * noise, _RESOLUTION)


def significant_pairs(confusion: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs (true, predicted) with more errors than chance explains, in descending order of their errors.

    By chance, the errors of each class are spread evenly over the other classes. The test is binomial, at 1 % over all
    pairs (Bonferroni).
    """
    errors = confusion - np.diag(np.diag(confusion))
    others = max(len(errors) - 1, 1)
    totals = errors.sum(1)
    chance = scipy.stats.binom.sf(errors - 1, totals[:, None], 1 / others)
    order = np.argsort(-errors, axis=None, kind="stable")
    pairs = zip(*np.unravel_index(order, errors.shape), strict=True)
    return [(int(i), int(j)) for i, j in pairs if errors[i, j] and chance[i, j] < LEVEL / (len(errors) * others)]
