"""The cost of a network: parameters, features, and the multiply-adds of its forward pass."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from gmsop_jax.config import ConfigDict
from gmsop_jax.models import Network, count_parameters, create_model

_EIGH_MACS = 9  # times d³, with eigenvectors: Golub and Van Loan, Matrix Computations, section 8.3


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of the forward pass of one image.

    Attributes:
      parameters: number of trainable parameters.
      features: dimension of the pooled vector.
      macs: multiply-adds, see `multiply_adds`.
      compiled_macs: half of the floating-point operations that XLA counts, or NaN if it reports none. XLA also counts
        element-wise operations, and excludes the part of a convolution that overlaps the padding.
    """

    parameters: int
    features: int
    macs: int
    compiled_macs: float


def cost(model: ConfigDict, image_size: int) -> Cost:
    """Returns the cost of the network that `config.model` describes, for square images, computed from shapes alone."""
    network, variables, images = abstract_network(model, image_size)
    _, aux = jax.eval_shape(network.apply, variables, images)
    counted = jax.jit(network.apply).lower(variables, images).cost_analysis()
    return Cost(
        parameters=count_parameters(variables["params"]),
        features=aux["features"].shape[-1],
        macs=multiply_adds(jax.make_jaxpr(lambda *inputs: network.apply(*inputs)[0])(variables, images).jaxpr),
        compiled_macs=counted["flops"] / 2 if counted else math.nan,
    )


def abstract_network(model: ConfigDict, image_size: int) -> tuple[Network, Any, jax.ShapeDtypeStruct]:
    """Returns a network, and the shapes and dtypes of its variables and of one square image."""
    model = ConfigDict(model.to_dict())
    model.dispatch = "gather"  # the only dispatch whose operations depend on the shapes alone
    network = create_model(model)
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return network, jax.eval_shape(network.init, jax.random.key(0), images), images


def multiply_adds(jaxpr: Any) -> int:
    """Counts the multiply-adds of the convolutions, matrix products and eigendecompositions in a program.

    As usual, element-wise operations and sums are not counted, so biases, batch norm, activations and average pooling
    are free. The mean that covariance pooling subtracts is computed as a product, and counted. Equations that no output
    depends on are not counted. An eigendecomposition counts as 9 d³. Of several branches, only the most expensive one
    is counted.

    Args:
      jaxpr: the program, from `jax.make_jaxpr`. A `while` loop without a fixed length counts as one iteration.

    Example:
      >>> product = jax.make_jaxpr(jnp.matmul)(jnp.zeros((2, 3)), jnp.zeros((3, 4)))
      >>> multiply_adds(product.jaxpr)
      24
    """
    total = 0
    needed = {id(variable) for variable in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(variable) in needed for variable in equation.outvars):
            needed.update(id(variable) for variable in equation.invars)
            total += _macs(equation)
    return total


def _macs(equation: Any) -> int:
    options = equation.params
    shapes = [x.aval for x in (*equation.invars[:2], equation.outvars[0])]
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = options["dimension_numbers"]
            return shapes[-1].size * math.prod(shapes[0].shape[axis] for axis in contracted)
        case "conv_general_dilated":
            outputs_axis = options["dimension_numbers"].rhs_spec[0]
            return shapes[-1].size * shapes[1].size // shapes[1].shape[outputs_axis]
        case "eigh":
            return _EIGH_MACS * shapes[0].size * shapes[0].shape[-1]
    leaves = jax.tree.leaves(list(options.values()), is_leaf=lambda x: hasattr(x, "jaxpr"))
    inner = [multiply_adds(getattr(leaf, "jaxpr", leaf)) for leaf in leaves if hasattr(leaf, "eqns")]
    if not inner:
        return 0
    return max(inner) if equation.primitive.name == "cond" else options.get("length", 1) * sum(inner)
