"""Exponential moving average of a network's parameters and moments over training."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array


def update_average(average: Any, new: Any, step: Array, decay: float) -> Any:
    """a ← d·a + (1 − d)·new,  d = min(decay, (1 + t)/(10 + t)).

    The average starts as the initial values. The smaller d of early steps lets go of them soon: after ten
    steps their share is 10⁻⁵, where a decay of 0.999 alone would leave 99 %.

    Args:
      average: a tree of arrays.
      new: the same tree after the step.
      step: t, steps done before this one.
      decay: the largest d.

    Returns: the new average.
    """
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(new, average, 1 - d)
