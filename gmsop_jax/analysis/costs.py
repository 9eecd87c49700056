"""The cost of a network: parameters, features, and multiply-adds by formula and as the compiler counts them."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gmsop_jax.config import ConfigDict
from gmsop_jax.models import (
    CovarianceHead,
    Gate,
    GatedMixture,
    Mixture,
    MPNCOVHead,
    Network,
    SecondOrderHead,
    count_parameters,
    create_model,
)
from gmsop_jax.models.layers import Classifier

_EIGH_MACS = 9  # times d³, with eigenvectors: Golub and Van Loan, Matrix Computations, section 8.3


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of the forward pass of one image.

    Attributes:
      parameters: number of trainable parameters.
      features: dimension of the pooled vector.
      macs: multiply-adds by formula, see `multiply_adds`.
      compiled_macs: half of the floating-point operations that XLA counts, or NaN if it reports none. XLA also counts
        element-wise operations, and leaves out the part of a convolution that meets padding.
    """

    parameters: int
    features: int
    macs: int
    compiled_macs: float


def cost(model: ConfigDict, image_size: int) -> Cost:
    """The cost of the network that `config.model` describes, for square images; computed from shapes alone."""
    model = ConfigDict(model.to_dict())
    model.dispatch = "gather"  # XLA counts a single iteration of a loop
    network = create_model(model)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    variables: Any = jax.eval_shape(network.init, jax.random.key(0), images)
    _, aux = jax.eval_shape(network.apply, variables, images)
    counted = jax.jit(network.apply).lower(variables, images).cost_analysis()
    return Cost(
        parameters=count_parameters(variables["params"]),
        features=aux["features"].shape[-1],
        macs=multiply_adds(network, variables, images),
        compiled_macs=counted["flops"] / 2 if counted else math.nan,
    )


def multiply_adds(network: Network, variables: Any, images: jax.ShapeDtypeStruct) -> int:
    """The multiply-adds of convolutions, matrix products, covariances and square roots.

    As usual, biases, batch norms, activations and average pooling are not counted. A gated mixture counts the
    candidates that an image selects, and an eigendecomposition counts as 9 d³.
    """
    total = 0

    def count(call, arguments, keywords, context):
        nonlocal total
        y = call(*arguments, **keywords)
        if context.method_name == "__call__":
            total += _own_macs(context.module, arguments[0], y)
        return y

    with nn.intercept_methods(count):
        jax.eval_shape(network.apply, variables, images)
    return total


@functools.singledispatch
def _own_macs(module: Any, x: Any, y: Any) -> int:
    """The multiply-adds of a module itself, without its submodules, from input x to output y."""
    return 0


@_own_macs.register
def _(module: nn.Conv, x: Any, y: Any) -> int:
    return y.size * math.prod(_kernel_size(module)) * x.shape[-1] // module.feature_group_count


def _kernel_size(module: nn.Conv) -> tuple[int, ...]:
    size = module.kernel_size
    return (size,) if isinstance(size, int) else tuple(size)


@_own_macs.register(nn.Dense)
@_own_macs.register(Classifier)
def _(module: nn.Dense | Classifier, x: Any, y: Any) -> int:
    return y.size * x.shape[-1]


@_own_macs.register(CovarianceHead)
@_own_macs.register(SecondOrderHead)
@_own_macs.register(MPNCOVHead)
def _(module: CovarianceHead | SecondOrderHead | MPNCOVHead, x: Any, y: Any) -> int:
    width = [x.shape[-1], *module.projection_widths][-1]
    covariance = math.prod(x.shape[:-1]) * width**2
    if isinstance(module, SecondOrderHead):
        return covariance + len(x) * newton_schulz_macs(width, module.num_iters)
    return covariance + (len(x) * _EIGH_MACS * width**3 if isinstance(module, MPNCOVHead) else 0)


@_own_macs.register
def _(module: Gate, x: Any, y: Any) -> int:
    width = [x.shape[-1], *module.gate_widths][-1]
    order = module.gate_order or 2
    features = width * (width + 1) // 2 if order == 2 else width
    return _pooling_macs(x, width, order, module.num_iters) + features * y.logits.size


@_own_macs.register(Mixture)
@_own_macs.register(GatedMixture)
def _(module: Mixture | GatedMixture, x: Any, y: Any) -> int:
    candidates = module.num_selected if isinstance(module, GatedMixture) else module.num_candidates
    widths = [x.shape[-1], *module.candidate_widths]
    projections = sum(a * b for a, b in itertools.pairwise(widths)) * math.prod(x.shape[:-1])
    return candidates * (projections + _pooling_macs(x, widths[-1], module.order, module.num_iters))


def _pooling_macs(x: Any, width: int, order: int, num_iters: int) -> int:
    if order == 1:
        return 0
    return math.prod(x.shape[:-1]) * width**2 + len(x) * newton_schulz_macs(width, num_iters)


def newton_schulz_macs(width: int, num_iters: int) -> int:
    """Of n coupled steps: 3(n − 1) products of d×d matrices, or 1 for n = 1; ours needs one less for n = 3."""
    return max(1, 3 * (num_iters - 1)) * width**3
