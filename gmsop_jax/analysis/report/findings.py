"""Findings about a run, in sentences that are computed from its predictions."""

import math
from collections.abc import Sequence

import numpy as np

from gmsop_jax.analysis.report.gate_errors import GateErrors
from gmsop_jax.analysis.report.predictions import Predictions
from gmsop_jax.analysis.report.significance import (
    LEVEL,
    class_information,
    differs,
    lifts,
    paired_difference,
    permutation_test,
    proportion_interval,
)

_MAX_CLASSES = 3  # maximum number of classes that are named for each candidate


def describe(predictions: Predictions, num_selected: int) -> list[str]:
    """Returns paragraphs about the errors of a network and, if it has a gate, about its candidates."""
    paragraphs = [_errors(predictions)]
    if predictions.errors is not None:
        paragraphs += [
            _evenness(predictions, num_selected),
            _uses(predictions),
            _controls(predictions.errors),
            _number_selected(predictions.errors, num_selected),
            _candidates(predictions.errors),
        ]
    return paragraphs


def uses(predictions: Predictions) -> list[list[tuple[str, float]]]:
    """Returns for each candidate the classes that use it more than the average, with their lift, largest first.

    Only lifts that are significant are included; see `significance.lifts`.
    """
    lift, significant = lifts(predictions.gate_weights, predictions.labels, len(predictions.classes))
    return [
        [(predictions.classes[c], float(lift[c, i])) for c in np.argsort(-lift[:, i]) if significant[c, i]]
        for i in range(lift.shape[1])
    ]


def _errors(predictions: Predictions) -> str:
    wrong, m = predictions.labels != predictions.predicted, len(predictions.labels)
    low, high = proportion_interval(int(wrong.sum()), m)
    text = (
        f"The network misclassifies {int(wrong.sum()):,} of {m:,} images, {100 * wrong.mean():.1f} % (95 % interval"
        f" {low:.1f} to {high:.1f} %)."
    )
    by_class = predictions.by_class(wrong)
    hardest = int(np.nanargmax(by_class))
    inside = wrong[predictions.labels == hardest]
    low, _ = proportion_interval(int(inside.sum()), len(inside))
    if low > 100 * wrong.mean():
        text += f" The class with the largest error is {predictions.classes[hardest]} ({100 * inside.mean():.1f} %)."
    elif wrong.any():
        text += " No class has an error that is clearly above this mean."
    return text


def _evenness(predictions: Predictions, num_selected: int) -> str:
    weights = predictions.gate_weights
    n = weights.shape[1]
    mean = weights.mean(0) / weights.mean(0).sum()
    effective = 2 ** float(-np.sum(mean * np.log2(np.where(mean > 0, mean, 1))))
    information, chance, p = permutation_test(class_information, weights, predictions.labels)
    text = (
        f"The gate selects {num_selected} of {n} candidates for each image. The weights of an image have an entropy of"
        f" {predictions.entropy.mean():.2f} bits on average; a random gate with equal weights for {num_selected}"
        f" candidates has {math.log2(num_selected):.2f} bits, and a uniform gate over all {n} candidates"
        f" {math.log2(n):.2f} bits. Over all images, the candidates are used as evenly as {effective:.1f} candidates"
        f" with equal shares; a uniform or random gate uses all {n} equally. The weights give {information:.3f} bits of"
        " information about the class of an image."
    )
    if p <= LEVEL:
        return f"{text} A gate that ignores the class would give {chance:.3f} bits by chance (p = {p:.3f})."
    return (
        f"{text} A gate that ignores the class would give as much by chance ({chance:.3f} bits; p = {p:.2f}), so"
        " nothing indicates that the candidates specialise in classes."
    )


def _uses(predictions: Predictions) -> str:
    sentences = []
    for i, classes in enumerate(uses(predictions)):
        if classes:
            names = _join([f"{name} ({lift:.1f} times the average)" for name, lift in classes[:_MAX_CLASSES]])
            sentences.append(f"Candidate {i} is used most for {names}.")
    unspecific = predictions.gate_weights.shape[1] - len(sentences)
    if not sentences:
        return "No candidate is used significantly more for one class than for the others."
    if unspecific:
        sentences.append(f"For {_count(unspecific, 'candidate')}, no class stands out.")
    return " ".join(sentences)


def _controls(errors: GateErrors) -> str:
    def compare(wrong: np.ndarray) -> str:
        return f"{100 * wrong.mean():.1f} % ({change(wrong, errors.gate)} points)"

    replaced = {
        "equal weights": errors.equal,
        "all candidates": errors.uniform,
        "random candidates": errors.random,
        "another image's weights": errors.shuffled,
    }
    sure = [name for name, wrong in replaced.items() if differs(wrong, errors.gate, len(replaced))]
    verdict = (
        f"The difference is significant for {_join(sure)}."
        if sure
        else "No difference is significant, so these images do not show that the choice of the gate matters."
    )
    return (
        f"With the weights of the gate, the error is {100 * errors.gate.mean():.1f} %. It is {compare(errors.equal)} if"
        f" the selected candidates get equal weights, {compare(errors.uniform)} with equal weights for all candidates,"
        f" {compare(errors.random)} with candidates that are drawn at random, and {compare(errors.shuffled)} with the"
        f" weights that the gate gives to another image. {verdict} The network was not trained with these replacements."
    )


def _number_selected(errors: GateErrors, num_selected: int) -> str:
    values = ", ".join(f"{100 * wrong.mean():.1f}" for wrong in errors.top_k)
    text = f"If the gate selects K = 1, …, {len(errors.top_k)} candidates, the errors are {values} %."
    sure = [k for k, wrong in enumerate(errors.top_k, 1) if differs(wrong, errors.gate, len(errors.top_k) - 1)]
    if not sure:
        return f"{text} None of them differs significantly from that of K = {num_selected}."
    return f"{text} The error for K = {_join(sure)} differs significantly from that for K = {num_selected}."


def _candidates(errors: GateErrors) -> str:
    alone = 100 * errors.alone.mean(1)
    changes = [paired_difference(wrong, errors.gate)[0] for wrong in errors.without]
    sure = [i for i, wrong in enumerate(errors.without) if differs(wrong, errors.gate, len(errors.without))]
    text = (
        f"A single candidate alone gives an error between {alone.min():.1f} and {alone.max():.1f} %. Excluding one"
        f" candidate changes the error by {_signed(min(changes))} to {_signed(max(changes))} points."
    )
    if not sure:
        return f"{text} No change is significant, so no single candidate is indispensable."
    return f"{text} The change is significant for {_join([f'candidate {i}' for i in sure])}."


def change(wrong: np.ndarray, reference: np.ndarray) -> str:
    """Returns the change of the error in points, with its 95 % interval, such as "+1.7 ± 3.2"."""
    mean, half = paired_difference(wrong, reference)
    return f"{_signed(mean)} ± {half:.1f}"


def _signed(points: float) -> str:
    return f"{points:+.1f}".replace("-", "−")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _join(items: Sequence[object]) -> str:
    *others, last = map(str, items)
    return f"{', '.join(others)} and {last}" if others else last
