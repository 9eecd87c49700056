"""The gate's arithmetic: which candidates an image selects, with what weights, and the balance loss."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.random import draw_rows

Gradient = Literal["straight_through", "masked"]
Softmax = Literal["selected", "all"]


def top_k_gate(
    logits: Float[AnyArray, "b n"],
    k: int,
    gradient: Gradient = "straight_through",
    rng: Array | None = None,
) -> tuple[Float[Array, "b n"], Int[Array, "b k"]]:
    """Selects the k largest logits of each image and weighs them by their softmax.

    w = softmax(h restricted to TopK(h)), 0 elsewhere   (GM-SOP, eq. 4–5)

    Args:
      logits: h; half precision is widened to float32.
      k: how many are selected, 1 ≤ k ≤ n.
      gradient: `straight_through` passes the gradient of softmax(h) over all n; `masked` that of the
        softmax over the selected, as the authors' code.
      rng: key for the draw of k candidates when all logits tie (see `select_top_k`).

    Returns: (weights with k non-zeros a row that sum to 1, indices of the selected). A selected logit some
      100 below the largest gets less than float32 can hold, which is 0.

    Raises:
      ValueError: if k is out of range or `gradient` unknown.

    Example:
      >>> weights, indices = top_k_gate(jnp.array([[0.0, 2.0, 2.0, 1.0]]), 2)
      >>> weights, indices
      (Array([[0. , 0.5, 0.5, 0. ]], dtype=float32), Array([[1, 2]], dtype=int32))
    """
    indices = select_top_k(logits, k, rng)
    return selection_weights(logits, indices, gradient), indices


def select_top_k(
    logits: Float[AnyArray, "b n"], k: int, rng: Array | None = None, axis_name: str | None = None
) -> Int[Array, "b k"]:
    """Indices of the k largest logits of each image; of equal ones the lower index goes first.

    If every logit of every image ties (to 16 units of rounding: equal columns of a matrix product need
    not come out equal in bits), as at the gate's constant start, and `rng` is given, k candidates are
    drawn at random for each image instead, so that all of them begin to learn.

    Args:
      logits: [b, n].
      k: how many, 1 ≤ k ≤ n.
      rng: key of the draw; without it ties go to the lower index.
      axis_name: pmap or shard_map axis over which the batch is split.

    Returns: indices, the largest logit's first.

    Raises:
      ValueError: if k is out of range.
    """
    logits = jnp.asarray(logits)
    n = logits.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"k must be between 1 and the number of candidates {n}, got {k}")
    logits = jax.lax.stop_gradient(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    if rng is not None and k < n:
        draw = draw_rows(jax.random.uniform, rng, logits.shape, axis_name)
        logits = jnp.where(_all_tie(logits, axis_name), draw, logits)
    # a stable sort: for top_k XLA would gather a batch that is split over devices
    return jnp.argsort(-logits, axis=-1, stable=True)[..., :k]


def _all_tie(logits: Array, axis_name: str | None) -> Array:
    spread = jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1)
    rounding = 16 * jnp.finfo(logits.dtype).eps * jnp.max(jnp.abs(logits), axis=-1)
    ties = jnp.all(spread <= rounding)
    return ties if axis_name is None else jax.lax.pmin(ties.astype(jnp.int32), axis_name) == 1


def selection_weights(
    logits: Float[AnyArray, "b n"],
    indices: Int[AnyArray, "b k"],
    gradient: Gradient = "straight_through",
    softmax: Softmax = "selected",
) -> Float[Array, "b n"]:
    """Softmax of the selected logits, 0 elsewhere.

    Args:
      logits: h.
      indices: of the selected.
      gradient: `straight_through` passes the gradient of softmax(h) over all n; `masked` that of the
        weights as they are.
      softmax: `selected` normalises over the selected, whose weights sum to 1 (GM-SOP, eq. 5); `all` over
        all n before the others are dropped, so that they sum to less (V-MoE, eq. 1: TOPₖ(softmax(h))).

    Raises:
      ValueError: if `gradient` or `softmax` is unknown.
    """
    if softmax not in ("selected", "all"):
        raise ValueError(f"softmax must be 'selected' or 'all', got {softmax!r}")
    logits, indices = jnp.asarray(logits), jnp.asarray(indices)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    selected = jnp.any(indices[..., None] == jnp.arange(logits.shape[-1]), axis=-2)
    if softmax == "selected":
        hard = jax.nn.softmax(jnp.where(selected, logits, -jnp.inf), axis=-1)
    else:
        hard = jnp.where(selected, jax.nn.softmax(logits, axis=-1), 0)
    if gradient == "masked":
        return hard
    if gradient == "straight_through":
        soft = jax.nn.softmax(logits, axis=-1)
        return jax.lax.stop_gradient(hard) + (soft - jax.lax.stop_gradient(soft))
    raise ValueError(f"gradient must be 'straight_through' or 'masked', got {gradient!r}")


def balance_loss(importance: Float[AnyArray, "b n"], axis_name: str | None = None, ddof: int = 1) -> Float[Array, ""]:
    """How unevenly a batch uses the candidates: 0 when all carry the same weight.

    L = (std(s)/mean(s))², sᵢ = Σ_batch importanceᵢ   (GM-SOP, eq. 6, without its factor α)

    Args:
      importance: gate weights, or for V-MoE's importance loss the softmax of the noiseless logits over all n
        (with ddof=0). Rows may be summed beforehand: only the sum over the batch matters, so gradient
        accumulation passes the sums of its parts.
      axis_name: pmap or shard_map axis over which the batch is split; s is summed over it first, since
        the loss of the whole batch is not the mean of its parts'.
      ddof: the variance is the sum of squares over n − ddof: 1 as the authors, 0 as Shazeer et al. 2017.

    Returns: a scalar; 0 for a single candidate.
    """
    usage = jnp.sum(importance, axis=0)
    if axis_name is not None:
        usage = jax.lax.psum(usage, axis_name)
    if usage.shape[0] == 1:
        return jnp.zeros((), usage.dtype)
    return jnp.var(usage, ddof=ddof) / jnp.mean(usage) ** 2
