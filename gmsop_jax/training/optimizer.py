"""The optimisers (SGD as in the authors' code, and AdamW) and their learning rates."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gmsop_jax.errors import ConfigError, did_you_mean

RateFactors = Sequence[tuple[str, float]]


def create_schedule(train: Any, steps_per_epoch: int) -> optax.Schedule:
    """Creates the learning rate as a function of the step, counted from 0.

    `steps`: each rate of `learning_rates` applies for its number of epochs, and the last one afterwards too.
    `cosine`: rate · (1 + cos(π t/T))/2 at step t of T = epochs · steps_per_epoch, and 0 from T on.
    During a warm-up of w = warmup_epochs · steps_per_epoch steps, rounded to a whole number, either is multiplied by
    min(1, (t + 1)/w).

    Args:
      train: `config.train`, of which `schedule`, `learning_rates` and `warmup_epochs` are used.
      steps_per_epoch: optimiser steps in an epoch.

    Raises:
      ValueError: if the schedule is unknown, or cosine is given several rates.
    """
    if train.schedule == "steps":
        rates, epochs = zip(*train.learning_rates, strict=True)
        boundaries = [sum(epochs[: i + 1]) * steps_per_epoch for i in range(len(epochs) - 1)]
        schedule = optax.join_schedules([optax.constant_schedule(rate) for rate in rates], boundaries)
    elif train.schedule == "cosine":
        ((rate, epochs),) = train.learning_rates
        schedule = optax.cosine_decay_schedule(rate, epochs * steps_per_epoch)
    else:
        raise ValueError(f"the schedule must be steps or cosine, got {train.schedule!r}")
    warmup_steps = round(train.warmup_epochs * steps_per_epoch)
    if warmup_steps <= 1:
        return schedule
    rise = optax.linear_schedule(1 / warmup_steps, 1.0, warmup_steps - 1)
    return lambda step: rise(step) * schedule(step)


def create_optimizer(train: Any, schedule: optax.Schedule, pixel_scale: float) -> optax.GradientTransformationExtraArgs:
    """Creates SGD with momentum, or AdamW; weight decay applies to every parameter.

    sgd:    g ← ∂ + λ·p;  m ← μ·m + g;  u = m;  p ← p − lr·f·u    (u = g + μ·m with Nesterov momentum)
    adamw:  m ← μ·m + (1 − μ)·∂;  v ← β₂·v + (1 − β₂)·∂²;  u = m̂/(√v̂ + 10⁻⁸) + λ·p;  p ← p − lr·f·u,
            where m̂ = m/(1 − μᵗ) and v̂ = v/(1 − β₂ᵗ) at step t, counted from 1

    In the authors' code, m has the opposite sign.

    The inputs of the stem's kernel are pixels of magnitude `pixel_scale`, and its entries are smaller than usual by
    that factor. It is updated as if the pixels were divided by pixel_scale and the kernel multiplied by it. For SGD,
    this multiplies the update by 1/pixel_scale²: one factor for the gradient and one for the kernel. (Its weight decay
    is then 1/pixel_scale² of that of other parameters, as in the authors' code.) Adam's step does not depend on the
    scale of the gradient, so m̂/(√v̂ + 10⁻⁸) is divided by pixel_scale once, and the decay is unchanged.

    Args:
      train: `config.train`, of which `optimizer`, `momentum` (μ), `beta2` (β₂), `nesterov`, `weight_decay`
        (λ) and `rate_factors` (f, see `rate_factor_tree`) are used.
      schedule: step → learning rate.
      pixel_scale: `config.model.pixel_scale`; if it is 1, the stem is updated like any other parameter.

    Returns: a transformation whose updates are added to the parameters. Its `update` takes the training
      `step`, counted from 0, which then determines the learning rate and Adam's bias correction; without it, the
      optimiser counts its own updates. Its `init` raises ConfigError if `rate_factors` names a part that the
      parameters do not have.

    Raises:
      ValueError: if the optimiser is unknown.
    """
    decay = optax.add_decayed_weights(train.weight_decay)
    if train.optimizer == "sgd":
        parts = [decay, optax.trace(train.momentum, train.nesterov), _scale_stem(1 / pixel_scale**2)]
    elif train.optimizer == "adamw":
        parts = [optax.scale_by_adam(train.momentum, train.beta2), _scale_stem(1 / pixel_scale), decay]
    else:
        raise ValueError(f"the optimiser must be sgd or adamw, got {train.optimizer!r}")
    if train.rate_factors:
        parts.append(_scale_parts(train.rate_factors))
    return _follow_step(optax.chain(*parts, optax.scale_by_learning_rate(schedule)))


def _follow_step(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Sets the optimiser's counts to the training step, so that a skipped step doesn't shift later ones."""

    def update(updates, state, params=None, *, step=None, **_):
        if step is not None:
            state = optax.tree.set(state, count=step)
        return optimizer.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def rate_factor_tree(params: Any, rate_factors: RateFactors) -> Any:
    """Finds the factor of each parameter's learning rate.

    Args:
      params: nested dictionaries.
      rate_factors: pairs (part, factor). A part is a prefix of a parameter's path that consists of whole names
        joined by `/`, such as `backbone` or `backbone/stage1_block1`. If several pairs match a parameter, the
        last one applies.

    Returns: the same tree with a factor for each parameter; 1 where no pair matches.

    Raises:
      ConfigError: if no parameter is in one of the parts.

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
    """Multiplies each update by its factor. A factor of 0 gives exactly 0, even for an infinite gradient."""

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
