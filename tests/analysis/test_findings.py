"""The words of the report, for predictions whose statistics are known."""

from typing import Any, cast

import numpy as np
import pytest

from gmsop_jax.analysis.report.findings import describe
from gmsop_jax.analysis.report.gate_errors import GateErrors
from gmsop_jax.analysis.report.predictions import Predictions
from gmsop_jax.analysis.report.significance import (
    class_information,
    differs,
    lifts,
    paired_difference,
    permutation_test,
    significant_pairs,
    stands_out,
)

M = 400


def _predictions(weights: np.ndarray, **errors: np.ndarray) -> Predictions:
    """M images of two classes, 10 % of which are misclassified with the gate; other errors are the same or given."""
    labels = np.arange(M) % 2
    wrong = np.arange(M) < M // 10
    n = weights.shape[1]
    single = dict.fromkeys(("gate", "equal", "uniform", "random", "shuffled"), wrong)
    several = {name: np.tile(wrong, (n, 1)) for name in ("top_k", "alone", "without")}
    return Predictions(
        classes=("cat", "dog"),
        split="val",
        total=M,
        labels=labels,
        predicted=np.where(wrong, 1 - labels, labels),
        confidence=np.full(M, 0.9),
        gate_weights=weights,
        mirrored_confidence=np.full(M, 0.9),
        mirrored_weights=weights,
        errors=GateErrors(**{**single, **several, **errors}),
        reader=cast(Any, None),
        positions=np.arange(M),
    )


def test_a_gate_that_knows_the_class():
    """Cats use candidates 0 and 1, dogs 0 and 2; without candidate 1, the cats are misclassified."""
    cats = np.arange(M) % 2 == 0
    weights = np.where(cats[:, None], [0.5, 0.5, 0], [0.5, 0, 0.5])
    without = np.tile(np.arange(M) < M // 10, (3, 1))
    without[1] |= cats
    text = " ".join(describe(_predictions(weights, without=without), 2))
    assert "misclassifies 40 of 400 images, 10.0 % (95 % interval 7.4 to 13.3 %)" in text
    assert "an entropy of 1.00 bits on average" in text
    assert "as evenly as 2.8 candidates" in text  # 2 to the power of 1.5 bits
    assert "The weights give 0.500 bits of information" in text
    assert "(p = 0.005)" in text
    assert "Candidate 1 is used most for cat (2.0 times the average)." in text
    assert "Candidate 2 is used most for dog (2.0 times the average)." in text
    assert "For 1 candidate, no class stands out." in text
    assert "changes the error by +0.0 to +45.0 points. The change is significant for candidate 1." in text


def test_a_gate_that_ignores_the_image():
    rng = np.random.default_rng(0)
    weights = rng.permuted(np.tile([0.5, 0.5, 0, 0], (M, 1)), axis=1)
    text = " ".join(describe(_predictions(weights), 2))
    assert "A gate that ignores the class would give as much by chance" in text
    assert "No candidate is used significantly more for one class" in text
    assert "so these images do not show that the choice of the gate matters" in text
    assert "None of them differs significantly from that of K = 2" in text
    assert "no single candidate is indispensable" in text


def test_errors_with_replaced_weights_are_compared_on_the_same_images():
    always = np.ones(M, bool)
    top_k = np.stack([always, np.arange(M) < 40, np.arange(M) < 42])
    text = " ".join(describe(_predictions(np.full((M, 3), 1 / 3), shuffled=always, top_k=top_k), 2))
    assert "and 100.0 % (+90.0 ± 2.9 points) with the weights that the gate gives to another image" in text
    assert "The difference is significant for another image's weights." in text
    assert "K = 1, …, 3 candidates, the errors are 100.0, 10.0, 10.5 %." in text
    assert "The error for K = 1 differs significantly from that for K = 2." in text


def test_paired_difference():
    wrong, reference = np.array([1, 1, 0, 0], bool), np.array([0, 1, 0, 0], bool)
    # differences 100, 0, 0, 0: mean 25, standard deviation √1875
    assert paired_difference(wrong, reference) == pytest.approx((25, 1.96 * 1875**0.5 / 2))


@pytest.mark.parametrize(("only", "significant"), [(7, False), (8, True)])
def test_mcnemar(only, significant):
    """If all discordant images favour one side, p = 2 · 2⁻ⁿ: 1.6 % for 7 images, 0.8 % for 8."""
    wrong = np.arange(100) < only
    assert differs(wrong, np.zeros(100, bool)) == significant
    assert not differs(wrong, np.zeros(100, bool), comparisons=2)


def test_lifts():
    weights, labels = np.repeat([[1.0, 0.0], [0.0, 1.0]], [30, 10], axis=0), np.repeat([0, 1], [30, 10])
    lift, significant = lifts(weights, labels, 3)
    np.testing.assert_allclose(lift, [[4 / 3, 0], [0, 4], [np.nan, np.nan]])
    assert significant.tolist() == [[True, False], [False, True], [False, False]]


def test_permutations_of_the_labels():
    labels = np.repeat([0, 1], 50)
    found, chance, p = permutation_test(class_information, np.eye(2)[labels], labels)
    assert found == pytest.approx(1)
    assert chance < 0.05
    assert p == 1 / 200
    constant = np.full((100, 2), 0.5)
    assert permutation_test(class_information, constant, labels)[2] == 1


def test_images_stand_out_if_they_differ_by_more_than_their_mirror_images():
    values = np.linspace(0, 1, 101)
    first = np.array([100, 99, 98])
    noise = np.where(np.arange(101) % 2, 0.1, -0.1)
    assert stands_out(values, values + noise, first)
    assert not stands_out(values, values + 3 * noise, first)
    assert not stands_out(0.25 + values / 1000, 0.25 + values / 1000, first)  # the same to two digits
    assert not stands_out(values, values, np.array([], int))


def test_pairs_of_classes():
    confusion = np.array([[50, 9, 1, 0], [2, 50, 2, 2], [0, 0, 50, 0], [12, 0, 0, 40]])
    assert significant_pairs(confusion) == [(3, 0), (0, 1)]
    assert significant_pairs(np.array([[40, 10], [0, 50]])) == []
