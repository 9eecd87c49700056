"""The gate: which candidates an image selects, with which weights, and how evenly a batch uses them."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.random import draw_rows

Gradient = Literal["straight_through", "masked"]
Softmax = Literal["selected", "all"]
Noise = Literal["image", "candidate", "fixed", "none"]
BalanceOn = Literal["weights", "softmax"]


class GateOutput(NamedTuple):
    """The decisions of a gate for each image of a batch.

    Attributes:
      logits: h, including the noise.
      indices: indices of the selected candidates, in decreasing order of their logits.
      weights: weights of all candidates, 0 for those that are not selected.
      importance: importance of each candidate for each image; the balance loss depends on its sum over the batch.
      balance_loss: the result of `balance_loss` for `importance`.
    """

    logits: Float[Array, "b n"]
    indices: Int[Array, "b k"]
    weights: Float[Array, "b n"]
    importance: Float[Array, "b n"]
    balance_loss: Float[Array, ""]


def apply_gate(
    features: Float[AnyArray, "b f"],
    kernel: Float[AnyArray, "f n"],
    noise_kernel: Float[AnyArray, "f n"] | None = None,
    noise: Float[AnyArray, "b ..."] | None = None,
    *,
    num_selected: int,
    gradient: Gradient = "straight_through",
    softmax: Softmax = "selected",
    balance_on: BalanceOn = "weights",
    balance_ddof: int = 1,
    where: Bool[Array, " b"] | None = None,
    tie_key: Array | None = None,
    axis_name: str | None = None,
) -> GateOutput:
    """Noisy top-K gate on pooled features.

    h = W_gᵀf + γ · softplus(W_nᵀf),  w = softmax(h restricted to TopK(h))   (GM-SOP, eq. 3–6)

    Args:
      features: f.
      kernel: W_g.
      noise_kernel: W_n. Without it, γ is multiplied by 1/n instead of the softplus.
      noise: γ, as `draw_gate_noise` returns it, [b, 1] or [b, n]; None adds no noise.
      num_selected: number k of candidates that each image selects.
      gradient, softmax: see `selection_weights`.
      balance_on: what the balance loss is computed from: the `weights`, or the `softmax` of W_gᵀf over all n.
      balance_ddof: see `balance_loss`.
      where: the images to include in the balance loss; None includes all.
      tie_key: PRNG key for choosing candidates at random when all logits are equal; see `select_top_k`.
      axis_name: pmap or shard_map axis over which the batch is split.

    Raises:
      ValueError: see `select_top_k` and `selection_weights`.
    """
    clean = _product(features, kernel)
    logits = clean
    if noise is not None:
        scale = 1 / clean.shape[-1] if noise_kernel is None else jax.nn.softplus(_product(features, noise_kernel))
        logits = clean + noise * scale
    indices = select_top_k(logits, num_selected, tie_key, axis_name)
    weights = selection_weights(logits, indices, gradient, softmax)
    importance = weights if balance_on == "weights" else jax.nn.softmax(clean, axis=-1)
    if where is not None:
        importance = jnp.where(where[:, None], importance, 0)
    return GateOutput(logits, indices, weights, importance, balance_loss(importance, axis_name, balance_ddof))


def draw_gate_noise(
    noise: Noise,
    shape: tuple[Any, int],  # the batch size may be symbolic
    dtype: DTypeLike,
    *,
    given: Float[AnyArray, "b ..."] | None = None,
    key: Array | None = None,
    axis_name: str | None = None,
) -> Float[Array, "b ..."] | None:
    """The noise γ of a gate: one normally distributed number for each image, or for each image and candidate.

    Args:
      noise: `image` for [b, 1]; `candidate` or `fixed` for [b, n]; `none` for no noise.
      shape: (b, n), the numbers of images and candidates.
      dtype: dtype of the result.
      given: γ, used instead of a draw: [b] or [b, n].
      key: PRNG key, the same on every device; None means no noise unless `given` is set.
      axis_name: pmap or shard_map axis over which the batch is split.

    Returns: γ, or None if there is no noise.

    Raises:
      ValueError: if `given` has the wrong shape.
    """
    b = shape[0]
    needed = (b,) if noise in ("image", "none") else shape
    if given is not None and given.shape != needed:
        raise ValueError(f"gate_noise must have shape {needed}, got {given.shape}")
    if noise == "none":
        return None
    if given is None:
        if key is None:
            return None
        given = draw_rows(functools.partial(jax.random.normal, dtype=dtype), key, needed, axis_name)
    return jnp.asarray(given, dtype).reshape(b, -1)


def _product(features: AnyArray, kernel: AnyArray) -> Array:
    return jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST)


def top_k_gate(
    logits: Float[AnyArray, "*b n"],
    k: int,
    gradient: Gradient = "straight_through",
    rng: Array | None = None,
) -> tuple[Float[Array, "*b n"], Int[Array, "*b k"]]:
    """Selects the k largest logits of each image and computes their weights by a softmax.

    w = softmax(h restricted to TopK(h)), 0 elsewhere   (GM-SOP, eq. 4–5)

    Args:
      logits: h. Half precision is converted to float32.
      k: number of candidates to select, 1 ≤ k ≤ n.
      gradient: `straight_through` uses the gradient of softmax(h) over all n candidates. `masked` uses the
        gradient of the softmax over the selected ones, as the authors' code does.
      rng: PRNG key for the random selection when all logits are equal; see `select_top_k`.

    Returns: (weights, indices of the selected candidates). Each row of weights has k non-zero entries, which sum to 1.
      In float32, the weight of a selected logit that is about 100 below the largest underflows to 0.

    Raises:
      ValueError: if k is out of range or `gradient` is unknown.

    Example:
      >>> weights, indices = top_k_gate(jnp.array([[0.0, 2.0, 2.0, 1.0]]), 2)
      >>> weights, indices
      (Array([[0. , 0.5, 0.5, 0. ]], dtype=float32), Array([[1, 2]], dtype=int32))
    """
    indices = select_top_k(logits, k, rng)
    return selection_weights(logits, indices, gradient), indices


def select_top_k(
    logits: Float[AnyArray, "*b n"], k: int, rng: Array | None = None, axis_name: str | None = None
) -> Int[Array, "*b k"]:
    """Indices of the k largest logits of each image. Among equal logits, the lowest index comes first.

    If `rng` is given and all logits of every image are equal, as with the gate's constant initialisation, then k
    candidates are drawn at random for each image, so that all candidates start to learn. Logits are treated as equal
    within 16 ulps, because equal columns of a matrix product may differ in their last bits.

    Args:
      logits: h.
      k: number of candidates to select, 1 ≤ k ≤ n.
      rng: PRNG key; without it, equal logits are selected by their index.
      axis_name: pmap or shard_map axis over which the batch is split.

    Returns: indices, in decreasing order of the logits.

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
    # argsort instead of top_k, for which XLA would gather a batch that is split over devices
    return jnp.argsort(-logits, axis=-1, stable=True)[..., :k]


def _all_tie(logits: Array, axis_name: str | None) -> Array:
    spread = jnp.max(logits, axis=-1) - jnp.min(logits, axis=-1)
    rounding = 16 * jnp.finfo(logits.dtype).eps * jnp.max(jnp.abs(logits), axis=-1)
    ties = jnp.all(spread <= rounding)
    return ties if axis_name is None else jax.lax.pmin(ties.astype(jnp.int32), axis_name) == 1


def selection_weights(
    logits: Float[AnyArray, "*b n"],
    indices: Int[AnyArray, "*b k"],
    gradient: Gradient = "straight_through",
    softmax: Softmax = "selected",
) -> Float[Array, "*b n"]:
    """Softmax of the selected logits, and 0 for the other candidates.

    Args:
      logits: h.
      indices: indices of the selected candidates.
      gradient: `straight_through` uses the gradient of softmax(h) over all n candidates; `masked` uses the gradient of
        the weights as they are computed.
      softmax: `selected` normalises over the selected candidates, so that their weights sum to 1 (GM-SOP, eq. 5);
        `all` normalises over all n and then sets the others to 0 (V-MoE, eq. 1: TOPₖ(softmax(h))).

    Returns: the weights, float32 or float64.

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
    """Measures how unevenly a batch uses the candidates: 0 if all have the same total weight.

    L = (std(s)/mean(s))², sᵢ = Σ_batch importanceᵢ   (GM-SOP, eq. 6, without its factor α)

    Args:
      importance: the gate's weights, or, for V-MoE's importance loss (with ddof=0), the softmax of the logits without
        noise over all n. Only the sum over the batch matters, so gradient accumulation can pass partial sums.
      axis_name: pmap or shard_map axis over which the batch is split. The importance is summed over it first, because
        the loss of a batch is not the mean of the losses of its parts.
      ddof: the variance is divided by n − ddof: 1 in the authors' code, 0 in Shazeer et al. 2017.

    Returns: a scalar; 0 for a single candidate or an empty batch.
    """
    usage = jnp.sum(importance, axis=0)
    if axis_name is not None:
        usage = jax.lax.psum(usage, axis_name)
    if usage.shape[0] == 1:
        return jnp.zeros((), usage.dtype)
    mean = jnp.mean(usage)
    return jnp.var(usage, ddof=ddof) / jnp.where(mean == 0, 1, mean) ** 2
