"""A backbone and a head make a network; a configuration names both."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.heads import GAPHead, GatedMixtureHead, SecondOrderHead
from gmsop_jax.models.resnet import ResNet

HEADS = ("gap", "srsop", "gmgap", "gmsop")


class Network(nn.Module):
    """Any backbone under any head.

    Attributes:
      backbone: module with `__call__(images, *, train)` → [b, h, w, c].
      head: module with the contract of `models.heads`.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(
        self,
        images: Float[Array, "b h w 3"],
        *,
        train: bool = False,
        gate_noise: Float[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b classes"], Mapping[str, Array]]:
        """Logits of mean-subtracted images, and the head's `aux`."""
        features = self.backbone(images, train=train)
        return self.head(features, train=train, gate_noise=gate_noise)


def create_model(config: Any, *, axis_name: str | None = None, per_device_bn: bool = False) -> Network:
    """The network that `config.model` describes.

    Args:
      config: the fields of `gmsop_jax.config.model_defaults()`, with `num_classes` set.
      axis_name: pmap or shard_map axis over which the batch is split; batch norm, balance loss and
        random draws are those of the whole batch.
      per_device_bn: batch norm normalises by the moments of each device's part instead.

    Returns: a module for `init(rngs, images)` and `apply(variables, images, train=…, gate_noise=None)`
      → `(logits, aux)`.

    Raises:
      ValueError: if the head is unknown or num_classes is not set.

    Example:
      >>> from gmsop_jax.config import model_defaults
      >>> config = model_defaults()
      >>> config.num_classes = 10
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> model = create_model(config)
      >>> variables = model.init(jax.random.key(0), images)
      >>> logits, aux = model.apply(variables, images)
      >>> logits.shape, aux["features"].shape, aux["gate_weights"].shape
      ((2, 10), (2, 8256), (2, 16))
    """
    if config.num_classes < 1:
        raise ValueError(f"config.model.num_classes must be at least 1, got {config.num_classes}")
    dtype = jnp.dtype(config.compute_dtype) if config.compute_dtype else None
    backbone = ResNet(
        blocks_per_stage=config.blocks_per_stage,
        width_factor=config.width_factor,
        stage_widths=tuple(config.stage_widths),
        stage_strides=tuple(config.stage_strides),
        stem_width=config.stem_width,
        pixel_scale=config.pixel_scale,
        dtype=dtype,
        axis_name=None if per_device_bn else axis_name,
    )
    return Network(backbone, _create_head(config, dtype, axis_name, per_device_bn))


def _create_head(config: Any, dtype: Any, axis_name: str | None, per_device_bn: bool) -> nn.Module:
    if config.head == "gap":
        return GAPHead(config.num_classes, tuple(config.projection_widths), dtype)
    if config.head == "srsop":
        return SecondOrderHead(config.num_classes, tuple(config.projection_widths), dtype, config.num_iters)
    if config.head not in HEADS:
        raise ValueError(f"config.model.head must be one of {', '.join(HEADS)}; got {config.head!r}")
    return GatedMixtureHead(
        config.num_classes,
        num_candidates=config.num_candidates,
        num_selected=config.num_selected,
        candidate_widths=tuple(config.candidate_widths),
        gate_widths=tuple(config.gate_widths),
        order=1 if config.head == "gmgap" else 2,
        num_iters=config.num_iters,
        gradient=config.gate_gradient,
        dispatch=config.dispatch,
        dropout_rate=config.dropout_rate,
        dtype=dtype,
        axis_name=axis_name,
        per_device_bn=per_device_bn,
    )


def count_parameters(params: Any) -> int:
    """Trainable numbers in a tree of parameters (batch norm's moments are not among them)."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
