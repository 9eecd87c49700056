"""The training loss: cross entropy, label smoothing and mixup (Zhang et al., 2018)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

# step.step_rngs splits a step's key into two streams; fold_in(key, i) is part i of such a split, so this is a third.
MIXUP_STREAM = 2


def cross_entropy(
    logits: Float[Array, "b classes"],
    labels: Int[Array, "b"],
    mask: Bool[Array, "b"] | None = None,
    *,
    smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Sums the cross entropy over a batch.

    L = Σ_b −Σ_c q_c log softmax(logits)_c,  q = (1 − ε)·onehot(label) + ε/classes

    This is a sum rather than a mean, so that the parts of a split or padded batch add up.

    Args:
      logits: float32 or float64.
      labels: class indices, counted from 0.
      mask: False for padding, which is left out.
      smoothing: ε, the share of the target that is spread evenly over all classes (Szegedy et al., 2016).

    Returns: a scalar, in nats.
    """
    if smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses if mask is None else jnp.where(mask, losses, 0))


def draw_share(seed: int, step: Array, alpha: float) -> Float[Array, ""]:
    """Draws the share of each row's own image in mixup: max(λ, 1 − λ) for λ ~ Beta(α, α).

    One draw serves all pairs of a step. It depends on the seed and the step alone, so all devices draw the
    same number.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), MIXUP_STREAM)
    share = jax.random.beta(key, alpha, alpha)
    return jnp.maximum(share, 1 - share)


def swap_neighbours(x: Shaped[Array, "b ..."]) -> Shaped[Array, "b ..."]:
    """Swaps rows 2i and 2i + 1; the last of an odd number of rows stays where it is.

    Pairing neighbours, rather than permuting the batch, forms the same pairs on many devices as on one, as
    long as each device holds an even number of rows. The rows are in random order anyway.

    Example:
      >>> swap_neighbours(jnp.arange(5)).tolist()
      [1, 0, 3, 2, 4]
    """
    even = x.shape[0] // 2 * 2
    swapped = x[:even].reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(-1, *x.shape[1:])
    return jnp.concatenate([swapped, x[even:]]) if even < x.shape[0] else swapped


def mix_batch(batch: Mapping[str, Array], share: Float[Array, ""]) -> dict[str, Array]:
    """Mixes each image with its neighbour: λ·x + (1 − λ)·x'.

    Args:
      batch: `image` [b, h, w, 3] and `label` [b]; other entries are passed through.
      share: λ.

    Returns: the batch with float32 images, and the neighbour's label as `other_label`.
    """
    images = batch["image"].astype(jnp.float32)
    mixed = share * images + (1 - share) * swap_neighbours(images)
    return {**batch, "image": mixed, "other_label": swap_neighbours(batch["label"])}
