"""Mixup: training on weighted means of pairs of images (Zhang et al., 2018)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_STREAM = 2  # beside the two that train_step.step_rngs splits off: fold_in(key, i) is the i-th part of a split


def draw_share(seed: int, step: Array, alpha: float) -> Float[Array, ""]:
    """λ ← max(λ, 1 − λ) for λ ~ Beta(α, α): the share of a row's own image, one draw for all pairs of a step.

    A function of seed and step alone, so that all devices draw the same.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), _STREAM)
    share = jax.random.beta(key, alpha, alpha)
    return jnp.maximum(share, 1 - share)


def swap_neighbours(x: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """Rows 2i and 2i + 1 change places; an odd last row stays.

    Neighbours and not a permutation: devices with an even number of rows each make the pairs of the whole
    batch. The batch's own order is random.

    Example:
      >>> swap_neighbours(jnp.arange(5)).tolist()
      [1, 0, 3, 2, 4]
    """
    even = x.shape[0] // 2 * 2
    swapped = x[:even].reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(-1, *x.shape[1:])
    return jnp.concatenate([swapped, x[even:]]) if even < x.shape[0] else swapped


def mix_batch(batch: Mapping[str, Array], share: Float[Array, ""]) -> dict[str, Array]:
    """Mixes each row's image with its neighbour's: λ·x + (1 − λ)·x'.

    Args:
      batch: `image` [b, h, w, 3] and `label` [b]; what else there is stays.
      share: λ.

    Returns: the batch with `image` float32 and the neighbour's label as `other_label`.
    """
    images = batch["image"].astype(jnp.float32)
    mixed = share * images + (1 - share) * swap_neighbours(images)
    return {**batch, "image": mixed, "other_label": swap_neighbours(batch["label"])}
