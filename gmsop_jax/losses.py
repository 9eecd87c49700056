"""Losses of a batch."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"] | None = None,
) -> Float[Array, ""]:
    """Sum over the batch of −log softmax(logits)[label].

    A sum and not a mean, so that parts of a batch and padded batches add up right.

    Args:
      logits: float32 or float64.
      labels: class indices from 0.
      mask: False for padding, which counts nothing.

    Returns: a scalar, in nats.
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses if mask is None else jnp.where(mask, losses, 0))
