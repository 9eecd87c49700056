"""Networks of a backbone and a head, created from a configuration."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.heads import (
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    GAPHead,
    GatedMixtureHead,
    MixtureHead,
    MPNCOVHead,
    SecondOrderHead,
)
from gmsop_jax.models.layers import BatchNorm
from gmsop_jax.models.resnet import BottleneckResNet, ResNet
from gmsop_jax.ops.arrays import AnyArray

_Fields = dict[str, Any]

# name → head, created from the fields for heads without a mixture, for mixtures, and for gated mixtures
_HEADS: dict[str, Callable[[Any, _Fields, _Fields, _Fields], nn.Module]] = {
    "gap": lambda m, plain, mixture, gated: GAPHead(**plain),
    "sop": lambda m, plain, mixture, gated: CovarianceHead(**plain),
    "srsop": lambda m, plain, mixture, gated: SecondOrderHead(
        **plain, num_iters=m.num_iters, coefficients=m.coefficients
    ),
    "mpncov": lambda m, plain, mixture, gated: MPNCOVHead(**plain, power=m.power),
    "dropcov": lambda m, plain, mixture, gated: DropCovHead(**plain, axis_name=mixture["axis_name"]),
    "sot": lambda m, plain, mixture, gated: CrossCovarianceHead(
        **plain, num_heads=m.num_heads, head_width=m.head_width, power=m.power
    ),
    "gmgap": lambda m, plain, mixture, gated: GatedMixtureHead(**mixture, **gated, order=1),
    "gmsop": lambda m, plain, mixture, gated: GatedMixtureHead(**mixture, **gated, order=2),
    "avegap": lambda m, plain, mixture, gated: MixtureHead(**mixture, order=1),
    "avesop": lambda m, plain, mixture, gated: MixtureHead(**mixture, order=2),
    "concatgap": lambda m, plain, mixture, gated: MixtureHead(**mixture, order=1, combine="concatenate"),
    "concatsop": lambda m, plain, mixture, gated: MixtureHead(**mixture, order=2, combine="concatenate"),
}
_BOTTLENECKS = {
    "resnet50": {"blocks_per_stage": (3, 4, 6, 3)},
    "resnet101": {"blocks_per_stage": (3, 4, 23, 3)},
    "resnext50_32x4d": {"blocks_per_stage": (3, 4, 6, 3), "groups": 32, "group_width": 4},
    "resnext101_32x4d": {"blocks_per_stage": (3, 4, 23, 3), "groups": 32, "group_width": 4},
    "resnext101_64x4d": {"blocks_per_stage": (3, 4, 23, 3), "groups": 64, "group_width": 4},
}
HEADS = tuple(_HEADS)
MIXTURES = ("gmgap", "gmsop", "avegap", "avesop", "concatgap", "concatsop")
BACKBONES = ("narrow", *_BOTTLENECKS)


class Network(nn.Module):
    """A backbone followed by a head.

    Attributes:
      backbone: module with `__call__(images, *, train)` → [b, h, w, c].
      head: module that is called as described in `models.heads`.
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(
        self,
        images: Float[AnyArray, "b h w 3"],
        train: bool = False,
        gate_noise: Float[AnyArray, "b ..."] | None = None,
    ) -> tuple[Float[Array, "b classes"], Mapping[str, Array]]:
        """Returns the logits of mean-subtracted images, and the head's `aux`."""
        features = self.backbone(images, train=train)
        return self.head(features, train=train, gate_noise=gate_noise)


def create_model(config: Any, *, axis_name: str | None = None, per_device_bn: bool = False) -> Network:
    """Creates the network that `config.model` describes.

    Args:
      config: the fields of `gmsop_jax.config.model_defaults()`, with `num_classes` set.
      axis_name: pmap or shard_map axis over which the batch is split; batch norm, balance loss and
        random draws are those of the whole batch.
      per_device_bn: if True, batch norm uses the moments of each device's part instead.

    Returns: a module for `init(rngs, images)` and `apply(variables, images, train=…, gate_noise=None)`
      → `(logits, aux)`.

    Raises:
      ValueError: if the head or the backbone is unknown, or num_classes is not set.

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
    if config.head not in HEADS:
        raise ValueError(f"config.model.head must be one of {', '.join(HEADS)}; got {config.head!r}")
    if config.backbone not in BACKBONES:
        raise ValueError(f"config.model.backbone must be one of {', '.join(BACKBONES)}; got {config.backbone!r}")
    shared = {
        "norm": functools.partial(
            BatchNorm,
            running_rate=config.batch_norm_rate,
            axis_name=None if per_device_bn else axis_name,
        ),
        "dtype": jnp.dtype(config.compute_dtype) if config.compute_dtype else None,
    }
    return Network(_create_backbone(config, shared), _create_head(config, shared, axis_name))


def _create_backbone(m: Any, shared: _Fields) -> nn.Module:
    fields = {**shared, "stage_strides": tuple(m.stage_strides), "pixel_scale": m.pixel_scale}
    if m.backbone in _BOTTLENECKS:
        return BottleneckResNet(**_BOTTLENECKS[m.backbone], **fields, stem=m.stem)
    return ResNet(
        **fields,
        blocks_per_stage=m.blocks_per_stage,
        width_factor=m.width_factor,
        stage_widths=tuple(m.stage_widths),
        stem_width=m.stem_width,
    )


def _create_head(m: Any, shared: _Fields, axis_name: str | None) -> nn.Module:
    shared = {**shared, "num_classes": m.num_classes, "pool_precision": m.pool_precision or None}
    plain = {
        **shared,
        "projection_widths": tuple(m.projection_widths),
        "projection_batch_norm": m.projection_batch_norm,
    }
    mixture = {
        **shared,
        "num_candidates": m.num_candidates,
        "candidate_widths": tuple(m.candidate_widths),
        "num_iters": m.num_iters,
        "coefficients": m.coefficients,
        "dropout_rate": m.dropout_rate,
        "axis_name": axis_name,
    }
    gated = {
        "num_selected": m.num_selected,
        "gate_widths": tuple(m.gate_widths),
        "dispatch": m.dispatch,
        "gate_order": m.gate_order,
        "gate_noise": m.gate_noise,
        "gate_softmax": m.gate_softmax,
        "gate_gradient": m.gate_gradient,
        "gate_init": m.gate_init,
        "balance_on": m.balance_on,
        "balance_ddof": m.balance_ddof,
    }
    return _HEADS[m.head](m, plain, mixture, gated)


def count_parameters(params: Any) -> int:
    """Returns the number of trainable parameters in a tree, which does not contain the moments of batch norm."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
