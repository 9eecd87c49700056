"""Training and evaluation steps, and the training loss, as pure functions of arrays."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt8

from gmsop_jax.ops import balance_loss
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.training.metrics import count_errors

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
# (params, state, batch, rngs) → (sums over the rows, aux of the model, batch_stats)
Forward = Callable[[Any, "TrainState", Batch, dict[str, Array]], tuple[Metrics, dict[str, Any], Any]]

# `step_rngs` splits a step's key into two streams; fold_in(key, i) is part i of such a split, so this is a third.
MIXUP_STREAM = 2


class TrainState(flax.struct.PyTreeNode):
    """The arrays that training carries from step to step, or their shapes.

    Attributes:
      step: number of optimiser steps that are done, an int32 scalar.
      batch_stats: running statistics of batch norm; {} for a network without batch norm.
      ema: moving averages of `params` and `batch_stats`; None in a run without averages.
    """

    step: Any
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for `model.apply` in training."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """Variables for `model.apply` in evaluation: the averages, if there are any."""
        return self.variables if self.ema is None else self.ema


def create_state(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """Creates the state before the first step from the variables of `model.init`, with averages if `averaged`."""
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    # Copy the arrays: a train step donates its input buffers, so parameters and averages must not share memory.
    return state.replace(ema=jax.tree.map(jnp.copy, state.variables)) if averaged else state


def normalize(
    images: UInt8[AnyArray, "b h w 3"] | Float[AnyArray, "b h w 3"], mean_rgb: Sequence[float] | AnyArray
) -> Float[Array, "b h w 3"]:
    """Subtracts the training set's mean colour (0–255) from the images, in float32."""
    return jnp.asarray(images, jnp.float32) - jnp.asarray(mean_rgb, jnp.float32)


def step_rngs(seed: int, step: Array) -> dict[str, Array]:
    """Returns the keys of the RNG streams `gating` and `dropout`, which depend on the seed and the step alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    gating, dropout = jax.random.split(key)
    return {"gating": gating, "dropout": dropout}


def cross_entropy(
    logits: Float[AnyArray, "b classes"],
    labels: Int[AnyArray, "b"],
    mask: Bool[AnyArray, "b"] | None = None,
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
      smoothing: ε, the fraction of the target that is spread evenly over all classes (Szegedy et al., 2016).

    Returns: a scalar, in nats.
    """
    if smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype), smoothing)
        losses = optax.softmax_cross_entropy(logits, targets)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses if mask is None else jnp.where(mask, losses, 0))


def draw_share(seed: int, step: Array, alpha: float) -> Float[Array, ""]:
    """Draws the weight of each row's own image in mixup: max(λ, 1 − λ) for λ ~ Beta(α, α).

    One draw serves all pairs of a step. It depends on the seed and the step alone, so all devices draw the
    same number.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), MIXUP_STREAM)
    weight = jax.random.beta(key, alpha, alpha)
    return jnp.maximum(weight, 1 - weight)


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
    """Mixes each image in `image` [b, h, w, 3] with its neighbour: λ·x + (1 − λ)·x', where λ is `share`.

    Returns: the batch with float32 images, and the neighbour's label as `other_label`.
    """
    images = batch["image"].astype(jnp.float32)
    mixed = share * images + (1 - share) * swap_neighbours(images)
    return {**batch, "image": mixed, "other_label": swap_neighbours(batch["label"])}


def update_average(average: Any, new: Any, step: Array, decay: float) -> Any:
    """Updates an exponential moving average of a tree of arrays, where t (`step`) counts the steps before this one.

    a ← d·a + (1 − d)·new,  d = min(decay, (1 + t)/(10 + t))

    The average starts at the initial values. The smaller d of the first steps forgets them quickly: after
    ten steps, their weight is 10⁻⁵, whereas it would still be 99 % with a constant decay of 0.999.
    """
    d = jnp.minimum(decay, (1 + step) / (10 + step))
    return optax.incremental_update(new, average, 1 - d)


def make_loss(
    model: nn.Module,
    train: Any,
    *,
    seed: int,
    mean_rgb: Sequence[float] | AnyArray,
    balance_ddof: int,
    axis_name: str | None = None,
) -> Callable[[Any, TrainState, Batch], tuple[Array, tuple[Metrics, Array, Any]]]:
    """Makes the training loss.

    loss = (Σ cross entropy + α · balance loss)/B for a batch of B images   (GM-SOP, eq. 7)

    With `train.mixup_alpha`, neighbouring rows of the batch are mixed first. The cross entropy is then λ times that of
    a row's own label plus 1 − λ times that of its neighbour's label. Errors are counted against the row's own label,
    because λ ≥ ½.

    Args: as in `make_train_step`.

    Returns: a function (params, state, batch) → (loss, (sums, balance loss, batch_stats)). On several devices, the loss
      is this device's part of that of the whole batch, and `sums` (`loss_sum`, `top1_errors`, `top5_errors`, `count`)
      are those of its rows.
    """
    forward = _make_forward(model, train, seed, mean_rgb)
    balance = functools.partial(balance_loss, axis_name=axis_name, ddof=balance_ddof)

    def loss_function(params: Any, state: TrainState, batch: Batch):
        rows, rngs = batch["image"].shape[0], step_rngs(seed, state.step)
        if train.mixup_alpha:
            batch = mix_batch(batch, draw_share(seed, state.step, train.mixup_alpha))
        parts = math.gcd(rows, train.sub_batches)
        compute = forward if parts == 1 else _in_parts(forward, parts, balance)
        sums, aux, batch_stats = compute(params, state, batch, rngs)
        # The losses of the devices add up to that of the batch, so each adds a fraction of the balance loss, which is
        # the same on all of them.
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        loss = (sums["loss_sum"] + train.balance_weight * aux["balance_loss"] / devices) / (rows * devices)
        return loss, (sums, aux["balance_loss"], batch_stats)

    return loss_function


def _make_forward(model: nn.Module, train: Any, seed: int, mean_rgb: Sequence[float] | AnyArray) -> Forward:
    """Makes the forward pass of a batch, or of a part of one; with mixup, its rows are mixed already."""

    def forward(params: Any, state: TrainState, batch: Batch, rngs: dict[str, Array]):
        (logits, aux), updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch["image"], mean_rgb),
            train=True,
            gate_noise=batch.get("gate_noise"),
            mutable=["batch_stats"],
            rngs=rngs,
        )
        loss = cross_entropy(logits, batch["label"], smoothing=train.label_smoothing)
        if train.mixup_alpha:
            share = draw_share(seed, state.step, train.mixup_alpha)
            other = cross_entropy(logits, batch["other_label"], smoothing=train.label_smoothing)
            loss = share * loss + (1 - share) * other
        sums = {"loss_sum": loss, **count_errors(logits, batch["label"])}
        return sums, aux, updates.get("batch_stats", {})

    return forward


def _in_parts(forward: Forward, parts: int, balance: Callable[[Array], Array]) -> Forward:
    """Makes a forward pass that computes a batch in parts, one at a time (`train.sub_batches`).

    Part j of n consists of rows j, j + n, j + 2n, … Only one part's activations are in memory at a time, and each
    part's forward pass is computed twice. The sums, the balance loss and the gradient are those of the whole batch. Two
    things differ: batch norm normalises each part separately (and averages the updates of its running statistics over
    the parts), and each part draws its own gate noise and dropout.
    """

    def forward_in_parts(params: Any, state: TrainState, batch: Batch, rngs: dict[str, Array]):
        def one(indexed: tuple[Array, Batch]):
            index, part = indexed
            part_rngs = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            sums, aux, batch_stats = forward(params, state, part, part_rngs)
            return sums, batch_stats, jnp.sum(aux.get("importance", aux["gate_weights"]), axis=0)

        rows = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
        sums, batch_stats, usage = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (jnp.arange(parts), rows))
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        batch_stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), batch_stats)
        return sums, {"balance_loss": balance(usage)}, batch_stats

    return forward_in_parts


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    train: Any,
    *,
    seed: int,
    mean_rgb: Sequence[float] | AnyArray,
    balance_ddof: int,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the training step (state, batch) → (state, metrics), which minimises the loss of `make_loss`.

    Args:
      model: returns `(logits, aux)`.
      optimizer: from `create_optimizer`, or any optax optimiser. It receives the state's `step`.
      train: the section `train` of a configuration.
      seed: seed of the gate noise, dropout and mixup.
      mean_rgb: [3], mean colour of the training set.
      balance_ddof: that of the gate, `config.model.balance_ddof`; only used with `train.sub_batches` > 1.
      axis_name: pmap or shard_map axis over which the batch is split, for this step and the model. The new state and
        the metrics are those of the whole batch, equal on all devices. None if one program processes the whole batch.

    Returns: a function of the state and a batch with `image` uint8 [b, h, w, 3], `label` int32 [b] and optionally
      `gate_noise` [b] or [b, n], which replaces the draw. Its metrics are `loss_sum` (cross entropy), `top1_errors`,
      `top5_errors`, `count`, `balance_loss` and `grad_norm`.
    """
    optimizer = optax.with_extra_args_support(optimizer)
    loss = make_loss(model, train, seed=seed, mean_rgb=mean_rgb, balance_ddof=balance_ddof, axis_name=axis_name)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, (sums, balance, batch_stats) = jax.grad(loss, has_aux=True)(state.params, state, batch)
        if axis_name is not None:
            grads, sums = jax.lax.psum((grads, sums), axis_name)
            batch_stats = jax.lax.pmean(batch_stats, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, step=state.step)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)
        if state.ema is not None:
            new = new.replace(ema=update_average(state.ema, new.variables, state.step, train.ema_decay))
        return new, {**sums, "balance_loss": balance, "grad_norm": optax.tree.norm(grads)}

    return train_step


def make_eval_step(
    model: nn.Module, *, mean_rgb: Sequence[float] | AnyArray, flip_average: bool, axis_name: str | None = None
) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """Makes the evaluation step (variables, batch) → metrics.

    Args:
      model: returns `(logits, aux)`.
      mean_rgb: [3], mean colour of the training set.
      flip_average: whether to average the logits and the gate weights over each image and its mirror image.
      axis_name: pmap or shard_map axis over which the batch is split, for this step and the model.

    Returns: a function of the variables and a batch with `image`, `label` and `mask` (bool [b], False for padding).
      Its metrics are `loss_sum`, `top1_errors`, `top5_errors`, `count` and `gate_weight_sum` [n].
    """

    def apply(variables: Mapping[str, Any], images: Array) -> tuple[Array, Array]:
        logits, aux = model.apply(variables, normalize(images, mean_rgb), train=False)
        return logits, jnp.asarray(aux["gate_weights"])

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        logits, weights = apply(variables, batch["image"])
        if flip_average:
            mirrored = apply(variables, batch["image"][:, :, ::-1])
            logits, weights = (logits + mirrored[0]) / 2, (weights + mirrored[1]) / 2
        sums = count_errors(logits, batch["label"], batch["mask"]) | {
            "loss_sum": cross_entropy(logits, batch["label"], batch["mask"]),
            "gate_weight_sum": jnp.sum(weights, axis=0, where=batch["mask"][:, None]),
        }
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step
