"""Layers that the NNX heads share.

Modules that have the fields of a Linen module store such a module as `config`, so that fields, defaults and checks are
defined only once. Attributes that hold parameters have the same names as the Linen parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from gmsop_jax import models
from gmsop_jax.models.checks import check_train
from gmsop_jax.models.gate import shared_fields
from gmsop_jax.models.layers import he_normal
from gmsop_jax.ops import batch_norm, dropout, linear_logits
from gmsop_jax.ops.arrays import AnyArray


class ModuleWithMode(nnx.Module):
    """A module that behaves differently in training and evaluation; it starts in evaluation mode.

    Attributes:
      deterministic: True in evaluation, False in training; set by `eval()`, `train()` and `nnx.view`.
    """

    deterministic: bool

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the mode for `nnx.view`.

        Args:
          deterministic: True for evaluation, False for training.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _is_training(self, train: bool | None) -> bool:
        check_train(train)
        return not self.deterministic if train is None else train


class BatchNorm(ModuleWithMode):
    """Batch normalisation over all axes but the last, with MatConvNet's running statistics; see `ops.batch_norm`.

    The fields are those of `gmsop_jax.models.BatchNorm`: running_rate, epsilon, axis_name and dtype. All initial values
    are constants, so `rngs` is not used.
    """

    def __init__(self, num_features: int, *, rngs: nnx.Rngs, **fields: Any):
        self.config = models.BatchNorm(**fields)
        self.scale = nnx.Param(jnp.ones(num_features))
        self.bias = nnx.Param(jnp.zeros(num_features))
        self.mean = nnx.BatchStat(jnp.zeros(num_features))
        self.sigma = nnx.BatchStat(jnp.ones(num_features))
        self.deterministic = True

    def __call__(
        self, x: Float[AnyArray, "*b c"], train: bool | None = None, where: Shaped[AnyArray, "*b"] | None = None
    ) -> Float[Array, "*b c"]:
        """Normalises x by the statistics of the batch in training, and by the running statistics otherwise.

        Args:
          x: features.
          train: whether to use the statistics of the batch and to update the running ones; None means the module's
            mode.
          where: a mask, or weights of the rows of x in the statistics.
        """
        config, train = self.config, self._is_training(train)
        y, mean, sigma = batch_norm(
            x,
            self.scale[...],
            self.bias[...],
            self.mean[...],
            self.sigma[...],
            train=train,
            running_rate=config.running_rate,
            epsilon=config.epsilon,
            where=where,
            axis_name=config.axis_name,
            dtype=config.dtype,
        )
        if train:
            self.mean[...], self.sigma[...] = mean, sigma
        return y


def make_norm(factory: Any, num_features: int, rngs: nnx.Rngs, **fields: Any) -> BatchNorm:
    """Creates an NNX batch norm with the settings of the Linen batch norm that `factory` creates.

    Raises:
      ValueError: if the factory does not create a `gmsop_jax.models.BatchNorm`.
    """
    norm = factory(**fields)
    if not isinstance(norm, models.BatchNorm):
        raise ValueError(
            "an NNX head needs norm=gmsop_jax.models.BatchNorm or a functools.partial of it, but norm creates a"
            f" {type(norm).__name__}"
        )
    return BatchNorm(num_features, rngs=rngs, **shared_fields(norm, models.BatchNorm))


class ReluConvolutions(ModuleWithMode):
    """1×1 convolutions without bias, each followed by an optional batch norm and by ReLU.

    Modules with such layers inherit from this class, so that the layers have the same names as in Linen: `conv1` and
    `conv1_bn` for the prefix `conv`.
    """

    config: Any

    def _add_convolutions(self, prefix: str, in_features: int, widths: Any, *, batch_norm: bool, rngs: nnx.Rngs) -> int:
        """Creates the layers and returns the width of the last one."""
        dtype = self.config.dtype
        for i, width in enumerate(widths, 1):
            layer = nnx.Linear(in_features, width, use_bias=False, dtype=dtype, kernel_init=he_normal, rngs=rngs)
            setattr(self, f"{prefix}{i}", layer)
            if batch_norm:
                setattr(self, f"{prefix}{i}_bn", make_norm(self.config.norm, width, rngs, dtype=dtype))
            in_features = width
        return in_features

    def _apply_convolutions(self, prefix: str, x: Any, widths: Any, train: bool, where: Any) -> Array:
        for i in range(1, len(widths) + 1):
            x = getattr(self, f"{prefix}{i}")(x)
            norm = getattr(self, f"{prefix}{i}_bn", None)
            x = jax.nn.relu(x if norm is None else norm(x, train, where))
        return x


class Classifier(nnx.Module):
    """Linear classifier with float32 logits (float64 for float64 features); see `ops.linear_logits`."""

    def __init__(self, in_features: int, num_classes: int, dtype: Any = None, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(he_normal(rngs.params(), (in_features, num_classes)))
        self.bias = nnx.Param(jnp.zeros(num_classes))
        self.dtype = dtype

    def __call__(self, x: Float[AnyArray, "b f"]) -> Float[Array, "b classes"]:
        """Computes the logits."""
        return linear_logits(x, self.kernel[...], self.bias[...], self.dtype)


class Dropout(nnx.Module):
    """Sets each element to 0 with probability `rate` in training; see `ops.dropout`."""

    def __init__(self, rate: float, axis_name: str | None = None, *, rngs: nnx.Rngs):
        self.rate, self.axis_name = rate, axis_name
        self.rngs = rngs["dropout"].fork() if rate else None

    def __call__(self, x: Float[AnyArray, "b ..."], train: bool = False) -> Float[Array, "b ..."]:
        """Applies dropout in training, and returns x otherwise."""
        if not train or self.rngs is None:
            return jnp.asarray(x)
        return dropout(x, self.rate, self.rngs(), self.axis_name)
