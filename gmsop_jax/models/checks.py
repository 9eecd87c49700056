"""Checks of the fields of modules, which run when a module is constructed."""

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from gmsop_jax.ops.precision import ALLOWED_PRECISIONS, is_precision


def is_count(value: Any) -> bool:
    """Whether a value is an int of at least 1."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 1


def _are_counts(value: Any) -> bool:
    return isinstance(value, Sequence) and all(map(is_count, value))


def _is_number(value: Any, low: float, high: float = float("inf")) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= float(value) < high


_COUNT = (is_count, "an int of at least 1")
_WIDTHS = (lambda value: _are_counts(value) and len(value) > 0, "a tuple of one or more positive ints, such as (256,)")
_ANY_WIDTHS = (_are_counts, "a tuple of positive ints, such as (256,), or ()")


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    return (lambda value: not isinstance(value, bool) and value in choices), f"one of {', '.join(map(repr, choices))}"


# Name of a field, which means the same in every module: (condition, description).
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("num_classes", "num_heads", "head_width", "num_candidates", "num_selected", "num_iters"), _COUNT),
    **dict.fromkeys(("width", "stride", "stem_width", "width_factor", "groups", "group_width"), _COUNT),
    "candidate_widths": _WIDTHS,
    "stage_widths": _WIDTHS,
    "stage_strides": _WIDTHS,
    "gate_widths": _ANY_WIDTHS,
    "projection_widths": _ANY_WIDTHS,
    "order": _one_of(1, 2),
    "gate_order": _one_of(0, 1, 2),
    "gate_noise": _one_of("image", "candidate", "fixed", "none"),
    "coefficients": _one_of("newton_schulz", "minimax"),
    "pool_precision": (is_precision, ALLOWED_PRECISIONS),
    "gate_softmax": _one_of("selected", "all"),
    "gate_gradient": _one_of("straight_through", "masked"),
    "gate_init": _one_of("constant", "random"),
    "balance_on": _one_of("weights", "softmax"),
    "balance_ddof": _one_of(0, 1),
    "combine": _one_of("average", "concatenate"),
    "dispatch": _one_of("auto", "gather", "group", "loop"),
    "stem": _one_of("large", "small"),
    "rate": (lambda value: _is_number(value, 0, 1), "a number in [0, 1)"),
    "dropout_rate": (lambda value: _is_number(value, 0, 1), "a number in [0, 1)"),
    "running_rate": (lambda value: _is_number(value, 0) and value <= 1, "a number in [0, 1]"),
    "epsilon": (lambda value: _is_number(value, 0), "a number of at least 0"),
    "power": (lambda value: _is_number(value, 0) and value > 0, "a positive number"),
    "pixel_scale": (lambda value: _is_number(value, 0) and value > 0, "a positive number"),
}


def check_train(train: Any) -> None:
    """Checks that `train` is not an array, such as a mask, which most heads would ignore.

    Raises:
      TypeError: if it is an array.
    """
    if np.ndim(train):
        raise TypeError(f"train must be True or False, got an array of shape {np.shape(train)}; pass a mask as where=…")


class CheckedModule(nn.Module):
    """A module that checks the values of its fields when it is constructed.

    Raises:
      ValueError: if a field is out of range; the message names the field, its value and the values that are allowed.
    """

    def __post_init__(self):
        for field in dataclasses.fields(self):
            allowed, description = _RULES.get(field.name, (None, ""))
            value = getattr(self, field.name)
            if allowed is not None and not allowed(value):
                raise ValueError(f"{type(self).__name__}.{field.name} must be {description}, got {value!r}")
        super().__post_init__()


def check_stages(module: nn.Module, num_stages: int, *names: str) -> None:
    """Checks that fields are sequences with one entry for each stage.

    Raises:
      ValueError: if one is not; the message names the field and its value.
    """
    for name in names:
        value = getattr(module, name)
        if not _are_counts(value) or len(value) != num_stages:
            needed = f"{num_stages} positive ints, one for each stage"
            raise ValueError(f"{type(module).__name__}.{name} must be {needed}, got {value!r}")
