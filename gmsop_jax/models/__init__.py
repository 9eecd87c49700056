"""Flax (Linen) modules: backbones that compute feature maps, and heads that pool and classify features."""

from gmsop_jax.models.gate import Gate
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
from gmsop_jax.models.mixture import GatedMixture, Mixture
from gmsop_jax.models.network import Network, count_parameters, create_model
from gmsop_jax.models.resnet import BottleneckResNet, ResNet
from gmsop_jax.ops import GateOutput

__all__ = [
    "BatchNorm",
    "BottleneckResNet",
    "CovarianceHead",
    "CrossCovarianceHead",
    "DropCovHead",
    "GAPHead",
    "Gate",
    "GateOutput",
    "GatedMixture",
    "GatedMixtureHead",
    "MPNCOVHead",
    "Mixture",
    "MixtureHead",
    "Network",
    "ResNet",
    "SecondOrderHead",
    "count_parameters",
    "create_model",
]
