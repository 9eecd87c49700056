"""Stochastic gradient descent as the authors', and its learning-rate schedule."""

from collections.abc import Sequence
from typing import Any

import jax
import optax


def piecewise_schedule(learning_rates: Sequence[tuple[float, int]], steps_per_epoch: int) -> optax.Schedule:
    """Constant rates, each for its number of epochs; the last goes on after its end.

    Args:
      learning_rates: pairs (rate, epochs).
      steps_per_epoch: optimiser steps in an epoch.

    Returns: step → learning rate.
    """
    rates, epochs = zip(*learning_rates, strict=True)
    boundaries = [sum(epochs[: i + 1]) * steps_per_epoch for i in range(len(epochs) - 1)]
    return optax.join_schedules([optax.constant_schedule(rate) for rate in rates], boundaries)


def create_optimizer(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    pixel_scale: float = 60.0,
) -> optax.GradientTransformation:
    """SGD with momentum and weight decay on every parameter.

    g ← ∂ + λ·p;  m ← μ·m + g;  p ← p − lr·m

    The authors' m has the opposite sign. The stem's kernel, which meets pixels of size `pixel_scale`,
    takes lr/pixel_scale²: as if the pixels were divided by it and the kernel multiplied, but for the
    weight decay, which is then 1/pixel_scale² of the others'.

    Args:
      schedule: step → learning rate.
      momentum: μ.
      weight_decay: λ.
      pixel_scale: of the backbone; 1 treats the stem as any other parameter.

    Returns: a transformation whose updates are added to the parameters.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(decay=momentum),
        optax.masked(optax.scale(1 / pixel_scale**2), _is_stem_kernel),
        optax.scale_by_learning_rate(schedule),
    )


def _is_stem_kernel(params: Any) -> Any:
    def matches(path, _):
        return tuple(getattr(key, "key", None) for key in path) == ("backbone", "stem", "kernel")

    return jax.tree_util.tree_map_with_path(matches, params)
