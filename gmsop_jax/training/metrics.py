"""Metrics as sums and counts, which add up over steps and devices; ratios are made on the host."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


def count_errors(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"] | None = None,
) -> dict[str, Int[Array, ""]]:
    """How many images of a batch have their label outside the first and the first five guesses.

    Of equal logits the lower class goes first; with fewer than five classes all are among the guesses.

    Returns: `top1_errors`, `top5_errors`, `count`, leaving out what `mask` says is padding.

    Example:
      >>> count_errors(jnp.array([[0.0, 1.0], [0.0, 1.0]]), jnp.array([1, 0]))["top1_errors"]
      Array(1, dtype=int32)
    """
    mask = jnp.ones(labels.shape, bool) if mask is None else mask
    # the label's rank by comparisons: XLA would gather a split batch for its top-k
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = jnp.sum((logits > own) | ((logits == own) & lower), axis=-1)
    finite = jnp.isfinite(logits).all(axis=-1)
    return {
        "top1_errors": jnp.sum(mask & ~(finite & (rank < 1))),
        "top5_errors": jnp.sum(mask & ~(finite & (rank < 5))),
        "count": jnp.sum(mask),
    }


def summarize(sums: Iterable[Mapping[str, np.ndarray]]) -> dict[str, Any]:
    """Ratios from the sums of some steps.

    Args:
      sums: of each step: `loss_sum`, `top1_errors`, `top5_errors`, `count`, perhaps `gate_weight_sum`
        [n]; anything else is averaged over the steps.

    Returns: `loss` (nats per image), `top1_error` and `top5_error` (percent), `candidate_use` (list of
      n: mean gate weights), and the averages.

    Raises:
      ValueError: if there is no step or no image.
    """
    steps = list(sums)
    total = {key: np.sum([step[key] for step in steps], axis=0).tolist() for key in (steps[0] if steps else ())}
    if not total.get("count"):
        raise ValueError("there are no images to make ratios of")
    count = total.pop("count")
    ratios: dict[str, Any] = {"loss": total.pop("loss_sum") / count}
    ratios["top1_error"] = 100 * total.pop("top1_errors") / count
    ratios["top5_error"] = 100 * total.pop("top5_errors") / count
    if "gate_weight_sum" in total:
        ratios["candidate_use"] = [weight / count for weight in total.pop("gate_weight_sum")]
    return ratios | {key: value / len(steps) for key, value in total.items()}
