"""The optimisers, SGD as the authors' and AdamW, and their learning rates."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gmsop_jax.errors import ConfigError, did_you_mean

RateFactors = Sequence[tuple[str, float]]


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


def create_schedule(
    learning_rates: Sequence[tuple[float, int]],
    steps_per_epoch: int,
    *,
    kind: str = "steps",
    warmup_epochs: float = 0.0,
) -> optax.Schedule:
    """Learning rates in steps or along half a cosine, perhaps after a linear rise.

    cosine: rate · (1 + cos(π t/T))/2 at step t, counted from 0, of T = epochs · steps_per_epoch; 0 from T on.
    Warm-up over w = warmup_epochs · steps_per_epoch steps, rounded, multiplies this by min(1, (t + 1)/w).

    Args:
      learning_rates: pairs (rate, epochs); one for cosine.
      steps_per_epoch: optimiser steps in an epoch.
      kind: steps, as `piecewise_schedule`, or cosine.
      warmup_epochs: of the rise, which are among the others; 0: none.

    Returns: step → learning rate.

    Raises:
      ValueError: if a cosine has several pairs, or `kind` is none of these.
    """
    if kind == "steps":
        schedule = piecewise_schedule(learning_rates, steps_per_epoch)
    elif kind == "cosine":
        ((rate, epochs),) = learning_rates
        schedule = optax.cosine_decay_schedule(rate, epochs * steps_per_epoch)
    else:
        raise ValueError(f"the schedule must be steps or cosine, got {kind!r}")
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps <= 1:
        return schedule
    rise = optax.linear_schedule(1 / warmup_steps, 1.0, warmup_steps - 1)
    return lambda step: rise(step) * schedule(step)


def create_optimizer(
    schedule: optax.Schedule,
    *,
    kind: str = "sgd",
    momentum: float = 0.9,
    beta2: float = 0.999,
    nesterov: bool = False,
    weight_decay: float = 1e-4,
    pixel_scale: float = 60.0,
    rate_factors: RateFactors = (),
) -> optax.GradientTransformation:
    """SGD with momentum, or AdamW; weight decay on every parameter.

    sgd:    g ← ∂ + λ·p;  m ← μ·m + g;  u = m;  p ← p − lr·f·u    (u = g + μ·m with Nesterov's momentum)
    adamw:  m ← μ·m + (1 − μ)·∂;  v ← β₂·v + (1 − β₂)·∂²;  u = m̂/(√v̂ + 10⁻⁸) + λ·p;  p ← p − lr·f·u,
            where m̂ = m/(1 − μᵗ) and v̂ = v/(1 − β₂ᵗ) at step t, counted from 1

    The authors' m has the opposite sign.

    The stem's kernel, which meets pixels of size `pixel_scale` and is that much smaller than a usual one,
    moves as if the pixels were divided by it and the kernel multiplied. Of SGD's step that takes
    1/pixel_scale²: once for the gradient, once for the kernel (the weight decay is then 1/pixel_scale² of
    the others', as the authors'). Adam's step doesn't depend on the gradient's scale, so there m̂/(√v̂ + 10⁻⁸)
    is divided by pixel_scale once, and the decay is that of the others.

    Args:
      schedule: step → learning rate.
      kind: sgd or adamw.
      momentum: μ.
      beta2: β₂ of AdamW.
      nesterov: Nesterov's momentum, of SGD.
      weight_decay: λ.
      pixel_scale: of the backbone; 1 treats the stem as any other parameter.
      rate_factors: pairs (part, f): see `rate_factor_tree`.

    Returns: a transformation whose updates are added to the parameters. Its `init` raises ConfigError if a
      part of `rate_factors` is none of the parameters'.

    Raises:
      ValueError: if `kind` is none of these.
    """
    decay = optax.add_decayed_weights(weight_decay)
    if kind == "sgd":
        parts = [decay, optax.trace(momentum, nesterov), _scale_stem(1 / pixel_scale**2)]
    elif kind == "adamw":
        parts = [optax.scale_by_adam(momentum, beta2), _scale_stem(1 / pixel_scale), decay]
    else:
        raise ValueError(f"the optimiser must be sgd or adamw, got {kind!r}")
    if rate_factors:
        parts.append(_scale_parts(rate_factors))
    return optax.chain(*parts, optax.scale_by_learning_rate(schedule))


def from_config(config: Any, steps_per_epoch: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser that `config.train` describes, and its schedule."""
    t = config.train
    schedule = create_schedule(t.learning_rates, steps_per_epoch, kind=t.schedule, warmup_epochs=t.warmup_epochs)
    optimizer = create_optimizer(
        schedule,
        kind=t.optimizer,
        momentum=t.momentum,
        beta2=t.beta2,
        nesterov=t.nesterov,
        weight_decay=t.weight_decay,
        pixel_scale=config.model.pixel_scale,
        rate_factors=t.rate_factors,
    )
    return optimizer, schedule


def rate_factor_tree(params: Any, rate_factors: RateFactors) -> Any:
    """The factor of each parameter's learning rate.

    Args:
      params: nested dictionaries.
      rate_factors: pairs (part, factor); a part is the start of a parameter's path, whole names joined by
        `/`, like `backbone` or `backbone/stage1_block1`. Of pairs that match, the last one holds.

    Returns: the same tree, of numbers; 1 where none matches.

    Raises:
      ConfigError: if a part matches no parameter.

    Example:
      >>> rate_factor_tree({"backbone": {"a": 0, "b": 0}, "head": 0}, [("backbone", 0.1), ("backbone/b", 0)])
      {'backbone': {'a': 0.1, 'b': 0}, 'head': 1.0}
    """
    known: set[str] = set()

    def factor(path, _) -> float:
        names = [str(getattr(key, "key", key)) for key in path]
        starts = {"/".join(names[: i + 1]) for i in range(len(names))}
        known.update(starts)
        return [1.0, *(value for part, value in rate_factors if part in starts)][-1]

    tree = jax.tree_util.tree_map_with_path(factor, params)
    for part, _ in rate_factors:
        if part not in known:
            parts = ", ".join(sorted(name for name in known if "/" not in name))
            hint = did_you_mean(part, sorted(known), limit=3, otherwise=f"parts are {parts} and what they contain")
            raise ConfigError(
                f"config.train.rate_factors names {part!r}, which no parameter's path starts with; {hint}"
            )
    return tree


def _scale_parts(rate_factors: RateFactors) -> optax.GradientTransformation:
    """Updates times their factor; exactly 0 for a factor of 0, whatever the gradient is."""

    def init(params):
        rate_factor_tree(params, rate_factors)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        factors = rate_factor_tree(updates, rate_factors)
        return jax.tree.map(lambda u, f: u * f if f else jnp.zeros_like(u), updates, factors), state

    return optax.GradientTransformation(init, update)


def _scale_stem(factor: float) -> optax.GradientTransformation:
    return optax.masked(optax.scale(factor), _is_stem_kernel)


def _is_stem_kernel(params: Any) -> Any:
    def matches(path, _):
        return tuple(getattr(key, "key", None) for key in path) == ("backbone", "stem", "kernel")

    return jax.tree_util.tree_map_with_path(matches, params)
