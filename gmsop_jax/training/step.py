"""Pure training and evaluation steps: arrays in, arrays out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8
from numpy.typing import ArrayLike

from gmsop_jax.ops import balance_loss
from gmsop_jax.training.averaging import update_average
from gmsop_jax.training.losses import cross_entropy
from gmsop_jax.training.metrics import count_errors
from gmsop_jax.training.mixup import draw_share, mix_batch

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step.

    Attributes:
      step: optimiser steps done, int32 scalar.
      params: parameters.
      batch_stats: batch norm's running moments; {} in a network without.
      opt_state: of the optimiser.
      ema: averages of `params` and `batch_stats` over the steps; None in a run without.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """For `model.apply` in training."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """For `model.apply` in evaluation: the averages where there are any."""
        return self.variables if self.ema is None else self.ema


def create_state(
    variables: Mapping[str, Any], optimizer: optax.GradientTransformation, *, averaged: bool = False
) -> TrainState:
    """The state before the first step, from what `model.init` gave; `averaged` adds the averages."""
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    # copies: the step gives every array's memory away, which it can do but once
    return state.replace(ema=jax.tree.map(jnp.copy, state.variables)) if averaged else state


def normalize(
    images: UInt8[Array, "b h w 3"] | Float[Array, "b h w 3"], mean_rgb: ArrayLike
) -> Float[Array, "b h w 3"]:
    """Float32 pixels with the training set's mean colour (0–255) subtracted."""
    return images.astype(jnp.float32) - jnp.asarray(mean_rgb, jnp.float32)


def step_rngs(seed: int, step: Array) -> dict[str, Array]:
    """Keys of the RNG streams, a function of seed and step alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    gating, dropout = jax.random.split(key)
    return {"gating": gating, "dropout": dropout}


@dataclasses.dataclass(frozen=True)
class _Forward:
    """The forward pass of training: (params, state, batch) → (sums, balance loss, new moments)."""

    model: nn.Module
    mean_rgb: ArrayLike
    seed: int
    axis_name: str | None
    label_smoothing: float
    mixup_alpha: float
    balance_ddof: int

    def __call__(self, params: Any, state: TrainState, batch: Batch, parts: int) -> tuple[Metrics, Array, Any]:
        if self.mixup_alpha:
            batch = mix_batch(batch, self._share(state))
        return self.whole(params, state, batch) if parts == 1 else self.in_parts(params, state, batch, parts)

    def whole(self, params: Any, state: TrainState, batch: Batch) -> tuple[Metrics, Array, Any]:
        sums, aux, batch_stats = self._apply(params, state, batch, step_rngs(self.seed, state.step))
        return sums, aux["balance_loss"], batch_stats

    def in_parts(self, params: Any, state: TrainState, batch: Batch, parts: int) -> tuple[Metrics, Array, Any]:
        def one(_, indexed):
            index, part = indexed
            rngs = {name: jax.random.fold_in(key, index) for name, key in step_rngs(self.seed, state.step).items()}
            sums, aux, batch_stats = self._apply(params, state, part, rngs)
            usage = jnp.sum(aux.get("importance", aux["gate_weights"]), axis=0)
            return None, (sums, usage, batch_stats)

        rows = {name: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for name, x in batch.items()}
        one = jax.checkpoint(one, prevent_cse=False)
        _, (sums, usage, batch_stats) = jax.lax.scan(one, None, (jnp.arange(parts), rows))
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        batch_stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), batch_stats)
        return sums, balance_loss(usage, self.axis_name, self.balance_ddof), batch_stats

    def _apply(self, params: Any, state: TrainState, batch: Batch, rngs: dict[str, Array]):
        (logits, aux), updates = self.model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            normalize(batch["image"], self.mean_rgb),
            train=True,
            gate_noise=batch.get("gate_noise"),
            mutable=["batch_stats"],
            rngs=rngs,
        )
        sums = count_errors(logits, batch["label"]) | {"loss_sum": self._loss(logits, state, batch)}
        return sums, aux, updates.get("batch_stats", {})

    def _loss(self, logits: Array, state: TrainState, batch: Batch) -> Array:
        loss = cross_entropy(logits, batch["label"], smoothing=self.label_smoothing)
        if not self.mixup_alpha:
            return loss
        other = cross_entropy(logits, batch["other_label"], smoothing=self.label_smoothing)
        share = self._share(state)
        return share * loss + (1 - share) * other

    def _share(self, state: TrainState) -> Array:
        return draw_share(self.seed, state.step, self.mixup_alpha)


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    mean_rgb: ArrayLike,
    balance_weight: float = 100.0,
    balance_ddof: int = 1,
    seed: int = 0,
    label_smoothing: float = 0.0,
    mixup_alpha: float = 0.0,
    ema_decay: float = 0.0,
    sub_batches: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step (state, batch) → (state, metrics).

    Loss: (Σ cross entropy + α · balance loss)/B, for B the size of the batch   (GM-SOP, eq. 7)

    With `sub_batches` n the batch goes through the network in n parts, one after the other, and only
    one part's activations are in memory; each part is computed once more in the backward pass. Sums,
    balance loss and gradients are the whole batch's, so the step is the same but for two things: batch
    norm sees one part at a time (its running moments move by the parts' mean), and each part draws its
    own gate noise and dropout.

    Args:
      model: gives `(logits, aux)`.
      optimizer: from `create_optimizer`, or any of optax.
      mean_rgb: [3], mean colour of the training set.
      balance_weight: α.
      balance_ddof: the gate's `balance_ddof`; of use with sub_batches.
      seed: of gate noise, dropout and mixup.
      label_smoothing: ε of `losses.cross_entropy`.
      mixup_alpha: α of mixup, 0 for none: the batch's neighbouring rows are mixed before it is cut into
        parts, and the cross entropy is λ · that of the own label + (1 − λ) · that of the neighbour's; errors
        are counted against the own label, whose λ is at least a half.
      ema_decay: of the averages in a state that has them (`averaging.update_average`).
      sub_batches: n; part j has the rows j, j + n, j + 2n, … A batch that n doesn't divide is cut into
        as many parts as divide both.
      axis_name: pmap or shard_map axis over which the batch is split, the model's too; the new state
        and the metrics are the whole batch's, the same on every device.

    Returns: a function for `jax.jit`, or for `jax.pmap` with `axis_name`. `batch` has `image` uint8
      [b, h, w, 3] and `label` int32 [b], and may have `gate_noise` [b] to replace the draw; metrics are
      `loss_sum` (cross entropy), `top1_errors`, `top5_errors`, `count`, `balance_loss` and `grad_norm`.
    """

    forward = _Forward(model, mean_rgb, seed, axis_name, label_smoothing, mixup_alpha, balance_ddof)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rows = batch["image"].shape[0]
        parts = math.gcd(rows, sub_batches)
        devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)

        def loss_function(params):
            sums, balance, batch_stats = forward(params, state, batch, parts)
            # the devices' losses add up to the batch's, so each takes a part of the balance loss that all know
            loss = (sums["loss_sum"] + balance_weight * balance / devices) / (rows * devices)
            return loss, (sums, balance, batch_stats)

        grads, (sums, balance, batch_stats) = jax.grad(loss_function, has_aux=True)(state.params)
        if axis_name is not None:
            grads, sums = jax.lax.psum((grads, sums), axis_name)
            batch_stats = jax.lax.pmean(batch_stats, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = sums | {"balance_loss": balance, "grad_norm": optax.tree.norm(grads)}
        new = TrainState(state.step + 1, params, batch_stats, opt_state)
        if state.ema is not None:
            new = new.replace(ema=update_average(state.ema, new.variables, state.step, ema_decay))
        return new, metrics

    return train_step


def make_eval_step(
    model: nn.Module, *, mean_rgb: ArrayLike, flip_average: bool = False
) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """The evaluation step (variables, batch) → metrics.

    Args:
      model: gives `(logits, aux)`.
      mean_rgb: [3], mean colour that is subtracted.
      flip_average: take the mean of the logits, and of the gate weights, of each image and its mirror image.

    Returns: a function for `jax.jit`. `batch` has `image`, `label` and `mask` (False for padding);
      metrics are `loss_sum`, `top1_errors`, `top5_errors`, `count`, and `gate_weight_sum` [n].
    """

    def apply(variables: Mapping[str, Any], images: Array) -> tuple[Array, Array]:
        logits, aux = model.apply(variables, normalize(images, mean_rgb), train=False)
        return logits, jnp.asarray(aux["gate_weights"])

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        logits, weights = apply(variables, batch["image"])
        if flip_average:
            mirrored = apply(variables, batch["image"][:, :, ::-1])
            logits, weights = (logits + mirrored[0]) / 2, (weights + mirrored[1]) / 2
        return count_errors(logits, batch["label"], batch["mask"]) | {
            "loss_sum": cross_entropy(logits, batch["label"], batch["mask"]),
            "gate_weight_sum": jnp.sum(weights, axis=0, where=batch["mask"][:, None]),
        }

    return eval_step
