"""Layers that the backbones and heads share."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gmsop_jax.models.checks import CheckedModule
from gmsop_jax.ops import draw_rows
from gmsop_jax.ops.arrays import AnyArray

ModuleFactory = Callable[..., nn.Module]  # a module's class, or a functools.partial of it

# N(0, 2/fan_in), as the authors initialise every convolution and the classifier
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def flatten_map(x: Float[AnyArray, "b h w c"]) -> Float[Array, "b p c"]:
    """A map of features as p = h · w positions.

    Raises:
      ValueError: if x does not have four axes.
    """
    if x.ndim != 4:
        raise ValueError(f"a head needs a map of features [b, h, w, c], got shape {x.shape}")
    return jnp.asarray(x).reshape(x.shape[0], -1, x.shape[-1])


class Classifier(CheckedModule):
    """Linear classifier with float32 logits (float64 for float64 features).

    logits = xᵀ W + b

    In half precision the products are accumulated in float32, and the logits are not rounded back, because
    bfloat16 would make the largest logits of many images tie.

    Attributes:
      num_classes: number of classes.
      dtype: dtype of the product's operands; None follows features and parameters.
    """

    num_classes: int
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b f"]) -> Float[Array, "b classes"]:
        """Computes the logits."""
        kernel = self.param("kernel", he_normal, (x.shape[-1], self.num_classes))
        bias = self.param("bias", nn.initializers.zeros, (self.num_classes,))
        dtype = self.dtype or jnp.result_type(x, kernel)
        logits_dtype = jnp.promote_types(dtype, jnp.float32)
        x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
        return jnp.matmul(x, kernel, preferred_element_type=logits_dtype) + jnp.asarray(bias, logits_dtype)


def _all_but_last(x: Array) -> tuple[int, ...]:
    return tuple(range(x.ndim - 1))


class BatchNorm(CheckedModule):
    """Batch normalisation over all axes but the last, with MatConvNet's running moments.

    y = scale · (x − μ)/σ + bias,  σ = √(var + ε), biased variance.

    The collection `batch_stats` holds running means of μ and of σ itself (`mean`, `sigma`), not of the
    variance; at test time x is divided by the running σ, with no ε added again. They start at 0 and 1
    (MatConvNet: 0 and 0), so that a network which never trained can be evaluated.

    Attributes:
      running_rate: share of the batch in the running moments: r ← (1 − rate)·r + rate·batch.
      epsilon: ε.
      axis_name: pmap or shard_map axis whose devices share one batch; None keeps the moments per
        device (under jit the batch is the global one anyway).
      dtype: of the result; None follows x and the parameters. Moments are never below float32.
    """

    running_rate: float = 0.3
    epsilon: float = 1e-5
    axis_name: str | None = None
    dtype: DTypeLike | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "... c"], train: bool = False) -> Float[Array, "... c"]:
        """Normalises x, by the batch's moments in training and the running ones otherwise."""
        c = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        running_mean = self.variable("batch_stats", "mean", lambda: jnp.zeros(c, scale.dtype))
        running_sigma = self.variable("batch_stats", "sigma", lambda: jnp.ones(c, scale.dtype))
        x = jnp.asarray(x)
        dtype = self.dtype or jnp.result_type(x, scale)
        x = x.astype(jnp.promote_types(jnp.result_type(x, scale), jnp.float32))
        if train:
            # Moments of x − shift: in those of x itself, E[x²] − E[x]² cancels where |μ| is much larger than σ.
            shift = self._shift(x)
            x = x - shift
            centre, sigma = self._batch_moments(x)
            if not self.is_initializing():
                self._update(running_mean, shift + centre)
                self._update(running_sigma, sigma)
        else:
            centre, sigma = jnp.asarray(running_mean.value), jnp.asarray(running_sigma.value)
        return ((x - centre) * (jnp.asarray(scale) / sigma) + jnp.asarray(bias)).astype(dtype)

    def _shift(self, x: Array) -> Array:
        """The mean of each device's first row, averaged over devices: within √b · σ of μ for a batch of b rows."""
        shift = jax.lax.stop_gradient(jnp.mean(x[:1], _all_but_last(x)))
        return self._over_devices(shift)

    def _batch_moments(self, x: Array) -> tuple[Array, Array]:
        axes = _all_but_last(x)
        mean, square = self._over_devices((jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)))
        return mean, jnp.sqrt(jnp.maximum(square - jnp.square(mean), 0) + self.epsilon)

    def _over_devices(self, moments: Any) -> Any:
        if self.axis_name is None or self.is_initializing():
            return moments
        return jax.lax.pmean(moments, self.axis_name)

    def _update(self, running: nn.Variable, batch: Array) -> None:
        old = jnp.asarray(running.value)
        running.value = (old + self.running_rate * (batch - old)).astype(old.dtype)


class Dropout(CheckedModule):
    """Zeroes each number with probability `rate`, divides the others by 1 − rate; as `nn.Dropout`.

    Attributes:
      rate: 0 for none.
      axis_name: pmap or shard_map axis over which the batch, the first axis, is split; the draw is then
        the same as one device's for the whole batch.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b ..."], train: bool = False) -> Float[Array, "b ..."]:
        """Drops in training (RNG stream `dropout`), passes x through otherwise."""
        x = jnp.asarray(x)
        if not train or self.rate == 0:
            return x

        def draw(rng, shape):
            return jax.random.bernoulli(rng, 1 - self.rate, shape)

        kept = draw_rows(draw, self.make_rng("dropout"), x.shape, self.axis_name)
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros_like(x))
