"""Pure training and evaluation steps: arrays in, arrays out."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, UInt8
from numpy.typing import ArrayLike

from gmsop_jax.losses import cross_entropy
from gmsop_jax.metrics import count_errors

Batch = Mapping[str, Array]
Metrics = dict[str, Array]


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step.

    Attributes:
      step: optimiser steps done, int32 scalar.
      params: parameters.
      batch_stats: batch norm's running moments; {} in a network without.
      opt_state: of the optimiser.
    """

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """For `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(variables: Mapping[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step, from what `model.init` gave."""
    params = variables["params"]
    batch_stats = variables.get("batch_stats", {})
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def normalize(images: UInt8[Array, "b h w 3"], mean_rgb: ArrayLike) -> Float[Array, "b h w 3"]:
    """Float32 pixels with the training set's mean colour (0–255) subtracted."""
    return images.astype(jnp.float32) - jnp.asarray(mean_rgb, jnp.float32)


def step_rngs(seed: int, step: Array) -> dict[str, Array]:
    """Keys of the RNG streams, a function of seed and step alone."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    gating, dropout = jax.random.split(key)
    return {"gating": gating, "dropout": dropout}


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    mean_rgb: ArrayLike,
    balance_weight: float = 100.0,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The training step (state, batch) → (state, metrics).

    Loss: (Σ cross entropy + α · balance loss)/B, for B the size of the batch   (GM-SOP, eq. 7)

    Args:
      model: gives `(logits, aux)`.
      optimizer: from `create_optimizer`, or any of optax.
      mean_rgb: [3], mean colour of the training set.
      balance_weight: α.
      seed: of gate noise and dropout.

    Returns: a function for `jax.jit`. `batch` has `image` uint8 [b, h, w, 3] and `label` int32 [b],
      and may have `gate_noise` [b] to replace the draw; metrics are `loss_sum` (cross entropy),
      `top1_errors`, `top5_errors`, `count`, `balance_loss` and `grad_norm`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        images = normalize(batch["image"], mean_rgb)
        size = images.shape[0]

        def loss_function(params):
            (logits, aux), updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                gate_noise=batch.get("gate_noise"),
                mutable=["batch_stats"],
                rngs=step_rngs(seed, state.step),
            )
            loss_sum = cross_entropy(logits, batch["label"])
            loss = (loss_sum + balance_weight * aux["balance_loss"]) / size
            return loss, (logits, loss_sum, aux["balance_loss"], updates["batch_stats"])

        grads, (logits, loss_sum, balance, batch_stats) = jax.grad(loss_function, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = count_errors(logits, batch["label"]) | {
            "loss_sum": loss_sum,
            "balance_loss": balance,
            "grad_norm": optax.tree.norm(grads),
        }
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    return train_step


def make_eval_step(model: nn.Module, *, mean_rgb: ArrayLike) -> Callable[[Mapping[str, Any], Batch], Metrics]:
    """The evaluation step (variables, batch) → metrics.

    Returns: a function for `jax.jit`. `batch` has `image`, `label` and `mask` (False for padding);
      metrics are `loss_sum`, `top1_errors`, `top5_errors`, `count`, and `gate_weight_sum` [n].
    """

    def eval_step(variables: Mapping[str, Any], batch: Batch) -> Metrics:
        logits, aux = model.apply(variables, normalize(batch["image"], mean_rgb), train=False)
        return count_errors(logits, batch["label"], batch["mask"]) | {
            "loss_sum": cross_entropy(logits, batch["label"], batch["mask"]),
            "gate_weight_sum": jnp.sum(aux["gate_weights"], axis=0, where=batch["mask"][:, None]),
        }

    return eval_step
