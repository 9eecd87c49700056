"""Flax (Linen) modules: backbones that give a map of features, heads that pool and classify it."""

from gmsop_jax.models.gate import Gate, GateOutput
from gmsop_jax.models.heads import (
    CovarianceHead,
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

__all__ = [
    "BatchNorm",
    "BottleneckResNet",
    "CovarianceHead",
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
