"""The cost of a training step on many devices, counted from shapes and planned by XLA; nothing is measured."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gmsop_jax.analysis.costs import abstract_network
from gmsop_jax.config import ConfigDict
from gmsop_jax.models import count_parameters
from gmsop_jax.models.network import GATED
from gmsop_jax.training.parallel import compiler_options
from gmsop_jax.training.step import cross_entropy

_FLOAT = 4  # bytes
_ROWS = 8  # images in the batch whose operations XLA counts


@dataclasses.dataclass(frozen=True)
class Counts:
    """Counts for one network.

    Attributes:
      parameters: number of trainable parameters.
      channels: number of channels that batch norms normalise, over all layers.
      batch_norms: number of batch norm layers.
      num_candidates: number of candidates of the gate; 0 for a head without a gate.
      flops: floating-point operations per image, forward and backward.
    """

    parameters: int
    channels: int
    batch_norms: int
    num_candidates: int
    flops: float

    def bytes_reduced(self) -> int:
        """Bytes that each device all-reduces in one step; `docs/scaling.md` lists what they are.

        This is an upper bound: XLA merges equal sums, such as the bias gradients of batch norms whose results are
        added.
        """
        gated = self.num_candidates > 0
        return _FLOAT * (self.parameters + 7 * self.channels + 2 * self.num_candidates + 4 + gated)

    @property
    def most_reductions(self) -> int:
        """Upper bound on the sequential all-reduces in a step: three for each batch norm, and six more."""
        return 3 * self.batch_norms + 6

    @property
    def bytes_of_state(self) -> int:
        """Bytes of parameters, momentum, gradients and running statistics."""
        return _FLOAT * (3 * self.parameters + 2 * self.channels)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A device: sustained FLOP/s, bandwidth in bytes/s, and latency of a message in seconds."""

    flops: float
    bandwidth: float
    latency: float

    def efficiency(self, counts: Counts, devices: int, images: float) -> float:
        """Upper bound on the fraction of time spent computing, if communication does not overlap computation.

        t_compute = images · flops/F;  t_send = 2 (D − 1)/D · bytes/W + reductions · ⌈log₂ D⌉ · latency
        """
        compute = images * counts.flops / self.flops
        ring = 2 * (devices - 1) / devices * counts.bytes_reduced() / self.bandwidth
        messages = counts.most_reductions * math.ceil(math.log2(devices)) * self.latency
        return compute / (compute + ring + messages)


def count(model: ConfigDict, image_size: int) -> Counts:
    """Counts a network for square images, from shapes alone."""
    loss, variables, batch = _training_loss(model, image_size)
    forward = jax.jit(loss).lower(variables["params"], variables, batch(_ROWS)).cost_analysis()
    batch_stats = jax.tree_util.tree_leaves_with_path(variables.get("batch_stats", {}))
    means = [leaf for path, leaf in batch_stats if "mean" in str(path[-1])]
    return Counts(
        parameters=count_parameters(variables["params"]),
        channels=sum(leaf.size for leaf in means),
        batch_norms=len(means),
        num_candidates=model.num_candidates if model.head in GATED else 0,
        flops=3 * forward["flops"] / _ROWS if forward else math.nan,
    )


def planned_bytes(model: ConfigDict, image_size: int, rows: int = _ROWS) -> float:
    """Bytes of temporary memory per image that XLA plans for the loss and its gradient on the default backend.

    It is the slope between batches of `rows` and of three times as many images. Both programs are compiled, which takes
    up to a minute for the published networks.
    """
    loss, variables, batch = _training_loss(model, image_size)
    gradient = jax.jit(jax.value_and_grad(loss), compiler_options=compiler_options())

    def temporary(images: int) -> int:
        plan: Any = gradient.lower(variables["params"], variables, batch(images)).compile().memory_analysis()
        return plan.temp_size_in_bytes

    return (temporary(3 * rows) - temporary(rows)) / (2 * rows)


def _training_loss(model: ConfigDict, image_size: int) -> tuple[Callable, Any, Callable[[int], jax.ShapeDtypeStruct]]:
    """Returns (loss of parameters, variables and images; shapes of the variables; shape of a batch of n images)."""
    network, variables, images = abstract_network(model, image_size)

    def loss(params: Any, variables: Any, images: jax.Array) -> jax.Array:
        rngs = {"gating": jax.random.key(0), "dropout": jax.random.key(1)}
        variables = {**variables, "params": params}
        (logits, _), _ = network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return cross_entropy(logits, jnp.zeros(images.shape[0], jnp.int32))

    return loss, variables, lambda rows: jax.ShapeDtypeStruct((rows, *images.shape[1:]), images.dtype)
