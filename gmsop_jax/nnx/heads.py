"""Heads as NNX modules. All are created and called in the same way.

`Head(in_features, num_classes, rngs=rngs, **fields)` takes the number of channels and the fields of the Linen head of
the same name. `head(x, train, gate_noise, where)` has the same arguments and results as the Linen head; see
`gmsop_jax.models.heads`. A head starts in evaluation mode. `head.train()`, `head.eval()` and
`nnx.view(head, deterministic=…)` switch the mode, and the argument `train` overrides it.
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from gmsop_jax import models
from gmsop_jax.models.checks import is_count
from gmsop_jax.models.gate import shared_fields
from gmsop_jax.models.heads import attention_init, start_init, without_gate
from gmsop_jax.models.layers import he_normal
from gmsop_jax.nnx.layers import Classifier, Dropout, ReluConvolutions, make_norm
from gmsop_jax.nnx.mixture import GatedMixture, Mixture
from gmsop_jax.ops import (
    average_pool,
    covariance_pool,
    flatten_positions,
    matrix_power,
    multi_head_cross_covariance_pool,
    second_order_pool,
    triangle_vector,
)
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.dropcov import adaptive_channel_dropout, channel_attention
from gmsop_jax.ops.layers import nonempty_images

_Features = Float[AnyArray, "b *p c"]
_Mask = Shaped[AnyArray, "b *p"] | None
_Output = tuple[Float[Array, "b classes"], Mapping[str, Array]]


def _triangle(width: int) -> int:
    return width * (width + 1) // 2


class _Signature:
    """The signature of a head's constructor with all fields, for `help` and editors."""

    def __get__(self, head: Any, cls: Any) -> inspect.Signature:
        if head is not None or "linen" not in vars(cls):
            raise AttributeError("__signature__")
        of_linen = inspect.signature(cls.linen).parameters
        in_features, num_classes, rngs = list(inspect.signature(Head.__init__).parameters.values())[1:4]
        fields = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in of_linen.items()
            if name not in ("num_classes", "parent", "name")
        ]
        return inspect.Signature([in_features, num_classes, rngs, *fields])


class Head(ReluConvolutions):
    """Base class of the heads, which holds the Linen counterpart and the mode.

    Raises:
      TypeError: if `rngs` is not an `nnx.Rngs`.
      ValueError: if `in_features` or a field is out of range, or if a head is called with another number of channels.

    Attributes:
      linen: the Linen class.
      config: a Linen head with the same fields.
      in_features: number of channels.
      deterministic: True in evaluation, False in training; set by `eval()`, `train()` and `nnx.view`.
    """

    linen: ClassVar[Any]
    __signature__ = _Signature()

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "linen" in vars(cls) and "__init__" not in vars(cls):  # errors about missing arguments then name this class
            inherited: Any = cls.__init__

            def __init__(self: Any, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
                inherited(self, in_features, num_classes, rngs=rngs, **fields)

            __init__.__qualname__ = f"{cls.__qualname__}.__init__"
            cls.__init__ = __init__

    def __init__(self, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
        if not is_count(in_features):
            raise ValueError(f"in_features must be an int of at least 1, got {in_features!r}")
        if not isinstance(rngs, nnx.Rngs):
            raise TypeError(f"rngs must be an nnx.Rngs, such as nnx.Rngs(0), got {type(rngs).__name__}")
        self.in_features = in_features
        self.config = self.linen(num_classes, **fields)
        self.deterministic = True

    def _check_channels(self, x: Any) -> None:
        if np.shape(x)[-1:] != (self.in_features,):
            raise ValueError(
                f"the last axis of the features must have in_features={self.in_features} channels, got shape"
                f" {np.shape(x)}"
            )


class _PoolingHead(Head):
    """Projection → pooling → classifier."""

    def __init__(self, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
        super().__init__(in_features, num_classes, rngs=rngs, **fields)
        widths, batch_norm = self.config.projection_widths, self.config.projection_batch_norm
        width = self._add_convolutions("projection", in_features, widths, batch_norm=batch_norm, rngs=rngs)
        self.classifier = Classifier(self._pooled_width(width), num_classes, self.config.dtype, rngs=rngs)

    def _pooled_width(self, width: int) -> int:
        return _triangle(width)

    def _pool(self, x: Float[AnyArray, "b p c"], where: Any, train: bool) -> Float[Array, "b f"]:
        raise NotImplementedError

    def __call__(
        self, x: _Features, train: bool | None = None, gate_noise: AnyArray | None = None, where: _Mask = None
    ) -> _Output:
        """Pools and classifies. `gate_noise` is ignored, because there is no gate."""
        train = self._is_training(train)
        self._check_channels(x)
        x, where = flatten_positions(x, where)
        x = self._apply_convolutions("projection", x, self.config.projection_widths, train, where)
        features = self._pool(x, where, train)
        return self.classifier(features), {**without_gate(features), "features": features}


class GAPHead(_PoolingHead):
    """Global average pooling; see `gmsop_jax.models.GAPHead`."""

    linen = models.GAPHead

    def _pooled_width(self, width):
        return width

    def _pool(self, x, where, train):
        return average_pool(x, where=where)


class CovarianceHead(_PoolingHead):
    """Second-order pooling without normalisation (SOP); see `gmsop_jax.models.CovarianceHead`."""

    linen = models.CovarianceHead

    def _pool(self, x, where, train):
        return triangle_vector(covariance_pool(x, where=where, precision=self.config.pool_precision))


class SecondOrderHead(_PoolingHead):
    """Square-root-normalised covariance pooling (SR-SOP, iSQRT-COV); see `gmsop_jax.models.SecondOrderHead`.

    Example:
      >>> import jax.numpy as jnp
      >>> head = SecondOrderHead(4, 10, num_iters=5, rngs=nnx.Rngs(0))
      >>> tokens, mask = jnp.ones((2, 7, 4)), jnp.ones((2, 7), bool).at[0, 5:].set(False)
      >>> logits, aux = head(tokens, where=mask)
      >>> logits.shape, aux["features"].shape
      ((2, 10), (2, 10))
    """

    linen = models.SecondOrderHead

    def _pool(self, x, where, train):
        config = self.config
        return second_order_pool(
            x, config.num_iters, where=where, coefficients=config.coefficients, precision=config.pool_precision
        )


class MPNCOVHead(_PoolingHead):
    """Powers of the covariance by eigendecomposition (MPN-COV); see `gmsop_jax.models.MPNCOVHead`."""

    linen = models.MPNCOVHead

    def _pool(self, x, where, train):
        power, precision = self.config.power, self.config.pool_precision
        sigma = covariance_pool(x, where=where, precision=precision)
        return triangle_vector(matrix_power(sigma, power, precision=precision))


class CrossCovarianceHead(_PoolingHead):
    """Multi-head cross-covariance pooling of tokens (SoT); see `gmsop_jax.models.CrossCovarianceHead`."""

    linen = models.CrossCovarianceHead

    def __init__(self, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
        super().__init__(in_features, num_classes, rngs=rngs, **fields)
        config = self.config
        width, channels = (in_features, *config.projection_widths)[-1], 2 * config.num_heads * config.head_width
        self.queries_keys = nnx.Linear(
            width, channels, use_bias=False, dtype=config.dtype, kernel_init=he_normal, rngs=rngs
        )
        self.start = nnx.Param(start_init(rngs.params(), (config.head_width,)))

    def _pooled_width(self, width):
        return self.config.num_heads * self.config.head_width**2

    def _pool(self, x, where, train):
        config = self.config
        return multi_head_cross_covariance_pool(
            self.queries_keys(jnp.asarray(x)),
            self.start[...],
            config.num_heads,
            config.power,
            where=where,
            precision=config.pool_precision,
        )


class DropCovHead(_PoolingHead):
    """Covariance pooling with adaptive channel dropout in training (DropCov); see `gmsop_jax.models.DropCovHead`.

    Training draws from the stream `dropout` of the `rngs` that the head was created with.
    """

    linen = models.DropCovHead

    def __init__(self, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
        super().__init__(in_features, num_classes, rngs=rngs, **fields)
        self.attention = nnx.Param(attention_init(rngs.params(), (3,)))
        self.rngs = rngs["dropout"].fork()

    def _pool(self, x, where, train):
        sigma = covariance_pool(x, where=where, precision=self.config.pool_precision)
        if train:
            attention = channel_attention(average_pool(x, where=where), self.attention[...])
            images, axis_name = nonempty_images(where), self.config.axis_name
            sigma = adaptive_channel_dropout(sigma, attention, self.rngs(), where=images, axis_name=axis_name)
        return triangle_vector(sigma)


class _MixtureHead(Head):
    """Mixture → batch norm → dropout → classifier."""

    def _add_layers(self, rngs: nnx.Rngs) -> None:
        """Creates the layers after the mixture."""
        config = self.config
        width = config.candidate_widths[-1]
        width = width if config.order == 1 else _triangle(width)
        width *= config.num_candidates if getattr(config, "combine", "average") == "concatenate" else 1
        self.bn = make_norm(config.norm, width, rngs)
        self.dropout = Dropout(config.dropout_rate, config.axis_name, rngs=rngs)
        self.classifier = Classifier(width, config.num_classes, config.dtype, rngs=rngs)

    def _classify(self, features: Array, aux: Mapping[str, Array], train: bool, where: _Mask) -> _Output:
        y = self.dropout(self.bn(features, train, nonempty_images(where)), train)
        return self.classifier(y), {**aux, "features": features}


class MixtureHead(_MixtureHead):
    """Averaged or concatenated mixture; see `gmsop_jax.models.MixtureHead`.

    Training draws from the stream `dropout` of the `rngs` that the head was created with.
    """

    linen = models.MixtureHead

    def __init__(self, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
        super().__init__(in_features, num_classes, rngs=rngs, **fields)
        self.mixture = Mixture(in_features, rngs=rngs, **shared_fields(self.config, models.Mixture))
        self._add_layers(rngs)

    def __call__(
        self, x: _Features, train: bool | None = None, gate_noise: AnyArray | None = None, where: _Mask = None
    ) -> _Output:
        """Pools and classifies. `gate_noise` is ignored, because there is no gate."""
        self._check_channels(x)
        features = self.mixture(x, where)
        return self._classify(features, without_gate(features), self._is_training(train), where)


class GatedMixtureHead(_MixtureHead):
    """GM-SOP (order 2) or GM-GAP (order 1); see `gmsop_jax.models.GatedMixtureHead`.

    Training draws from the streams `gating` and `dropout` of the `rngs` that the head was created with.

    Example:
      >>> import jax.numpy as jnp
      >>> fields = {"num_candidates": 4, "num_selected": 2, "candidate_widths": (16, 8)}
      >>> head = GatedMixtureHead(32, 10, **fields, rngs=nnx.Rngs(0))
      >>> logits, aux = head(jnp.ones((2, 6, 6, 32)), train=True)
      >>> logits.shape, aux["features"].shape, aux["gate_weights"].shape
      ((2, 10), (2, 36), (2, 4))
    """

    linen = models.GatedMixtureHead

    def __init__(self, in_features: int, num_classes: int, *, rngs: nnx.Rngs, **fields: Any):
        super().__init__(in_features, num_classes, rngs=rngs, **fields)
        self.mixture = GatedMixture(in_features, rngs=rngs, **shared_fields(self.config, models.GatedMixture))
        self._add_layers(rngs)

    def __call__(
        self, x: _Features, train: bool | None = None, gate_noise: AnyArray | None = None, where: _Mask = None
    ) -> _Output:
        """Pools and classifies. `gate_noise` replaces the draw from the stream `gating`."""
        self._check_channels(x)
        train = self._is_training(train)
        features, aux = self.mixture(x, train, gate_noise, where)
        return self._classify(features, aux, train, where)


HEADS = (
    CovarianceHead,
    CrossCovarianceHead,
    DropCovHead,
    GAPHead,
    GatedMixtureHead,
    MPNCOVHead,
    MixtureHead,
    SecondOrderHead,
)
