"""Layers that the backbones and heads share."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from gmsop_jax.models.checks import CheckedModule
from gmsop_jax.ops import batch_norm, dropout, linear_logits
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.covariance import Where

ModuleFactory = Callable[..., nn.Module]  # the class of a module, or a functools.partial of it

# N(0, 2/fan_in), as the authors initialise every convolution and the classifier
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def relu_convolution(
    module: Any,
    x: Float[AnyArray, "b p c"],
    width: int,
    name: str,
    *,
    train: bool,
    where: Where | None,
    batch_norm: bool,
) -> Float[Array, "b p width"]:
    """Applies a 1×1 convolution without bias, an optional batch norm, and ReLU, as submodules of `module`.

    The convolution has the given name, and the batch norm that name with the suffix `_bn`. `module.norm` creates
    the batch norm, and `module.dtype` is the dtype of both.
    """
    x = nn.Dense(width, use_bias=False, dtype=module.dtype, kernel_init=he_normal, name=name)(x)
    if batch_norm:
        x = normalize(module.norm(dtype=module.dtype, name=f"{name}_bn"), x, train, where)
    return jax.nn.relu(x)


def normalize(norm: Any, x: Float[AnyArray, "*b c"], train: bool, where: Shaped[AnyArray, "*b"] | None) -> Array:
    """Calls a batch norm. Passes `where` only if there is a mask, because a user's batch norm may not accept it."""
    return norm(x, train=train) if where is None else norm(x, train=train, where=where)


class Classifier(CheckedModule):
    """Linear classifier with float32 logits (float64 for float64 features); see `ops.linear_logits`.

    Attributes:
      num_classes: number of classes.
      dtype: dtype of the product's operands; None infers it from features and parameters.
    """

    num_classes: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b f"]) -> Float[Array, "b classes"]:
        """Computes the logits."""
        kernel = self.param("kernel", he_normal, (x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        return linear_logits(x, kernel, bias, self.dtype)


class BatchNorm(CheckedModule):
    """Batch normalisation over all axes but the last, with MatConvNet's running statistics; see `ops.batch_norm`.

    The collection `batch_stats` holds the running averages of μ and of σ itself (`mean`, `sigma`). They start at 0
    and 1 (in MatConvNet, at 0 and 0), so that a network can be evaluated before it is trained.

    Attributes:
      running_rate: weight of the batch in the running statistics: r ← (1 − rate)·r + rate·batch.
      epsilon: ε.
      axis_name: pmap or shard_map axis over which the batch is split. With None, each device normalises by the
        statistics of its own part (under jit, by those of the whole batch).
      dtype: dtype of the result; None infers it from x and the parameters. Statistics are computed in at least float32.
    """

    running_rate: float = 0.3
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(
        self, x: Float[AnyArray, "*b c"], train: bool = False, where: Shaped[AnyArray, "*b"] | None = None
    ) -> Float[Array, "*b c"]:
        """Normalises x by the statistics of the batch in training, and by the running statistics otherwise.

        Args:
          x: features.
          train: whether to use the statistics of the batch and to update the running ones.
          where: a mask, or weights of the rows of x in the statistics.
        """
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(c, scale.dtype))
        sigma = self.variable("batch_stats", "sigma", lambda: jnp.ones(c, scale.dtype))
        y, new_mean, new_sigma = batch_norm(
            x,
            scale,
            bias,
            mean.value,
            sigma.value,
            train=train,
            running_rate=self.running_rate,
            epsilon=self.epsilon,
            where=where,
            axis_name=None if self.is_initializing() else self.axis_name,
            dtype=self.dtype,
        )
        if train and not self.is_initializing():
            mean.value, sigma.value = new_mean, new_sigma
        return y


def dropout_key(module: nn.Module) -> Array:
    """A key from the RNG stream `dropout`, or from `params` if only that exists, as in `init`.

    Raises:
      ValueError: if there is neither.
    """
    if not (module.has_rng("dropout") or module.has_rng("params")):
        raise ValueError("training draws a dropout mask: pass rngs={'dropout': key} to apply, or train=False")
    return module.make_rng("dropout")


class Dropout(CheckedModule):
    """Sets each element to 0 with probability `rate` in training; see `ops.dropout`.

    Attributes:
      rate: the probability; 0 disables dropout.
      axis_name: pmap or shard_map axis over which the batch is split.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b ..."], train: bool = False) -> Float[Array, "b ..."]:
        """Applies dropout in training (RNG stream `dropout`), and returns x otherwise."""
        x = jnp.asarray(x)
        if not train or self.rate == 0:
            return x
        return dropout(x, self.rate, dropout_key(self), self.axis_name)
