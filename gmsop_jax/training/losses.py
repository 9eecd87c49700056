"""Losses of a batch."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"] | None = None,
    *,
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Sum over the batch of −Σ_c q_c log softmax(logits)_c,  q = (1 − ε)·onehot(label) + ε/classes.

    A sum and not a mean, so that parts of a batch and padded batches add up right. Without smoothing it is
    that of −log softmax(logits)[label].

    Args:
      logits: float32 or float64.
      labels: class indices from 0.
      mask: False for padding, which counts nothing.
      smoothing: ε, the share of the target that is spread over all classes, the label's too (Szegedy et
        al., 2016).

    Returns: a scalar, in nats.
    """
    if smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses if mask is None else jnp.where(mask, losses, 0))
