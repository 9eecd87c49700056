"""Flax (Linen) modules: backbones that give a map of features, heads that pool and classify it."""

from gmsop_jax.models.gating import Gate
from gmsop_jax.models.heads import GAPHead, GatedMixtureHead, SecondOrderHead
from gmsop_jax.models.layers import BatchNorm
from gmsop_jax.models.mixture import GatedMixture
from gmsop_jax.models.network import Network, count_parameters, create_model
from gmsop_jax.models.resnet import ResNet

__all__ = [
    "BatchNorm",
    "GAPHead",
    "Gate",
    "GatedMixture",
    "GatedMixtureHead",
    "Network",
    "ResNet",
    "SecondOrderHead",
    "count_parameters",
    "create_model",
]
