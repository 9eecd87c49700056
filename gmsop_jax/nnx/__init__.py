"""The heads as Flax NNX modules, over the same functions as the Linen heads in `gmsop_jax.models`."""

from gmsop_jax.nnx.conversion import from_linen, to_linen
from gmsop_jax.nnx.heads import (
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    GAPHead,
    GatedMixtureHead,
    MixtureHead,
    MPNCOVHead,
    SecondOrderHead,
)
from gmsop_jax.nnx.layers import BatchNorm
from gmsop_jax.nnx.mixture import Gate, GatedMixture, Mixture

__all__ = [
    "BatchNorm",
    "CovarianceHead",
    "CrossCovarianceHead",
    "DropCovHead",
    "GAPHead",
    "Gate",
    "GatedMixture",
    "GatedMixtureHead",
    "MPNCOVHead",
    "Mixture",
    "MixtureHead",
    "SecondOrderHead",
    "from_linen",
    "to_linen",
]
