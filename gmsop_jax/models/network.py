"""Networks of a backbone and a head, created from a configuration."""

import dataclasses
import functools
from collections.abc import Mapping
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

# Name: (class of the module, fields that the name sets).
_HEADS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "gap": (GAPHead, {}),
    "sop": (CovarianceHead, {}),
    "srsop": (SecondOrderHead, {}),
    "mpncov": (MPNCOVHead, {}),
    "dropcov": (DropCovHead, {}),
    "sot": (CrossCovarianceHead, {}),
    "gmgap": (GatedMixtureHead, {"order": 1}),
    "gmsop": (GatedMixtureHead, {"order": 2}),
    "avegap": (MixtureHead, {"order": 1}),
    "avesop": (MixtureHead, {"order": 2}),
    "concatgap": (MixtureHead, {"order": 1, "combine": "concatenate"}),
    "concatsop": (MixtureHead, {"order": 2, "combine": "concatenate"}),
}
_RESNET34 = {"blocks_per_stage": (3, 4, 6, 3), "stage_widths": (64, 128, 256, 512), "stem_width": 64}
_BACKBONES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "narrow": (ResNet, {}),
    "resnet34": (ResNet, _RESNET34),
    "resnet50": (BottleneckResNet, {"blocks_per_stage": (3, 4, 6, 3)}),
    "resnet101": (BottleneckResNet, {"blocks_per_stage": (3, 4, 23, 3)}),
    "resnext50_32x4d": (BottleneckResNet, {"blocks_per_stage": (3, 4, 6, 3), "groups": 32, "group_width": 4}),
    "resnext101_32x4d": (BottleneckResNet, {"blocks_per_stage": (3, 4, 23, 3), "groups": 32, "group_width": 4}),
    "resnext101_64x4d": (BottleneckResNet, {"blocks_per_stage": (3, 4, 23, 3), "groups": 64, "group_width": 4}),
}
HEADS = tuple(_HEADS)
GATED = tuple(name for name, (head, _) in _HEADS.items() if head is GatedMixtureHead)
MIXTURES = tuple(name for name, (head, _) in _HEADS.items() if head in (GatedMixtureHead, MixtureHead))
BACKBONES = tuple(_BACKBONES)


class Network(nn.Module):
    """A backbone followed by a head.

    Attributes:
      backbone: module with `__call__(images, *, train)` → [b, h, w, c].
      head: module with the interface described in `models.heads`.
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
      axis_name: pmap or shard_map axis over which the batch is split; batch norm, balance loss and random numbers are
        those of the whole batch.
      per_device_bn: if True, batch norm uses the statistics of each device's part instead.

    Returns: a module for `init(rngs, images)` and `apply(variables, images, train=…, gate_noise=None)`
      → `(logits, aux)`.

    Raises:
      ValueError: if num_classes is not set, or a field of the backbone or head has a value that is not allowed.
      TypeError: if compute_dtype is not the name of a dtype.

    Example:
      >>> from gmsop_jax.config import model_defaults
      >>> config = model_defaults()
      >>> config.num_classes = 10
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> model = create_model(config)
      >>> variables = jax.jit(model.init)(jax.random.key(0), images)
      >>> logits, aux = jax.jit(model.apply)(variables, images)
      >>> logits.shape, aux["features"].shape, aux["gate_weights"].shape
      ((2, 10), (2, 8256), (2, 16))
    """
    if config.num_classes < 1:
        raise ValueError(f"config.model.num_classes must be at least 1, got {config.num_classes}")
    if config.head not in HEADS:
        raise ValueError(f"config.model.head must be one of {', '.join(HEADS)}; got {config.head!r}")
    if config.backbone not in BACKBONES:
        raise ValueError(f"config.model.backbone must be one of {', '.join(BACKBONES)}; got {config.backbone!r}")
    bn_axis = None if per_device_bn else axis_name
    given = {
        "norm": functools.partial(BatchNorm, running_rate=config.batch_norm_rate, axis_name=bn_axis),
        "dtype": jnp.dtype(config.compute_dtype) if config.compute_dtype else None,
        "pool_precision": config.pool_precision or None,
        "axis_name": axis_name,
    }
    return Network(_create(*_BACKBONES[config.backbone], given, config), _create(*_HEADS[config.head], given, config))


def _create(module: type[nn.Module], fixed: Mapping[str, Any], given: Mapping[str, Any], config: Any) -> nn.Module:
    """Creates a module. Fields that are neither fixed nor given are taken from `config` by name."""
    fields = {}
    for name in (field.name for field in dataclasses.fields(module)):
        if name in fixed or name in given:
            fields[name] = fixed[name] if name in fixed else given[name]
        elif hasattr(config, name):
            value = getattr(config, name)
            fields[name] = tuple(value) if isinstance(value, list) else value
    return module(**fields)


def count_parameters(params: Any) -> int:
    """Returns the number of parameters in `variables["params"]`, which excludes the statistics of batch norm."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
