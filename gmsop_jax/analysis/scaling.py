"""The cost of a training step on many devices, counted from shapes; nothing is measured."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gmsop_jax.config import ConfigDict
from gmsop_jax.models import create_model
from gmsop_jax.training.losses import cross_entropy

_FLOAT = 4


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts for one network.

    Attributes:
      parameters: number of trainable parameters.
      channels: number of channels under batch norm, over all layers.
      batch_norms: number of batch norm layers.
      num_candidates: number of candidates of the gate; 0 for a head without a gate.
      activations: numbers per image that the backward pass stores.
      flops: floating-point operations per image, forward and backward.
    """

    parameters: int
    channels: int
    batch_norms: int
    num_candidates: int
    activations: int
    flops: float

    def bytes_reduced(self) -> int:
        """Bytes that each device all-reduces in one step.

        These are the gradients; the shift and the two moments of each batch norm channel, the gradients of
        these moments, and the mean of its running moments; the use of each candidate, forward and backward;
        the loss and three counts; and whether all logits tie. XLA merges equal sums, such as the bias gradients
        of batch norms whose results are added, so this is an upper bound.
        """
        gated = self.num_candidates > 0
        return _FLOAT * (self.parameters + 7 * self.channels + 2 * self.num_candidates + 4 + gated)

    @property
    def most_reductions(self) -> int:
        """Upper bound on the sequential all-reduces in a step: three for each batch norm, and six more."""
        return 3 * self.batch_norms + 6

    def bytes_per_device(self, images: float) -> float:
        """Bytes of parameters, momentum, gradients, moments, and stored activations."""
        state = 3 * self.parameters + 2 * self.channels
        return _FLOAT * (state + images * self.activations)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device: sustained FLOP/s, bandwidth in bytes/s, and latency of a message in seconds."""

    flops: float
    bandwidth: float
    latency: float

    def efficiency(self, counts: Counts, devices: int, images: float) -> float:
        """Upper bound on the share of time spent computing, if nothing is sent during computation.

        t_compute = images · flops/F;  t_send = 2 (D − 1)/D · bytes/W + reductions · ⌈log₂ D⌉ · latency
        """
        compute = images * counts.flops / self.flops
        ring = 2 * (devices - 1) / devices * counts.bytes_reduced() / self.bandwidth
        messages = counts.most_reductions * math.ceil(math.log2(devices)) * self.latency
        return compute / (compute + ring + messages)


def count(model: ConfigDict, image_size: int) -> Counts:
    """Counts for a network with square images, from shapes alone."""
    network = create_model(model)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)
    stats = variables.get("batch_stats", {})
    norms = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stats) if "mean" in str(path[-1])]
    activations = _kept(network, variables, images, 2) - _kept(network, variables, images, 1)
    return Counts(
        parameters=sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        channels=sum(leaf.size for leaf in norms),
        batch_norms=len(norms),
        num_candidates=model.num_candidates if model.head in ("gmgap", "gmsop") else 0,
        activations=activations,
        flops=3 * _flops(network, variables, images),
    )


def _forward(network: Any, variables: Any, params: Any, images: Any) -> jax.Array:
    rngs = {"gating": jax.random.key(0), "dropout": jax.random.key(1)}
    (logits, _), _ = network.apply(
        {**variables, "params": params}, images, train=True, rngs=rngs, mutable=["batch_stats"]
    )
    return cross_entropy(logits, jnp.zeros(images.shape[0], jnp.int32))


def _kept(network: Any, variables: Any, images: Any, rows: int) -> int:
    def pullback(variables, images):
        return jax.vjp(lambda params: _forward(network, variables, params, images), variables["params"])[1]

    many = jax.ShapeDtypeStruct((rows, *images.shape[1:]), images.dtype)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, variables, many)))


def _flops(network: Any, variables: Any, images: Any) -> float:
    many = jax.ShapeDtypeStruct((8, *images.shape[1:]), images.dtype)
    lowered = jax.jit(lambda v, x: _forward(network, v, v["params"], x)).lower(variables, many)
    costs = lowered.cost_analysis()
    return costs["flops"] / 8 if costs else math.nan
