"""Heads: from features to logits. All heads are called in the same way.

`head(x, train=False, gate_noise=None, where=None)` returns `(logits, aux)`. Here, x is a feature map [b, h, w, c] or
tokens [b, l, c], and `where` is a mask or weights of the positions, [b, h, w] or [b, l]. Logits are [b, num_classes],
float32 or float64. `aux` contains `features` [b, f] (the pooled vector), `gate_weights` [b, n], `importance` [b, n] and
`balance_loss`. In a head without a gate, the weights and the importance are ones [b, 1] and the balance loss is 0.

With a mask, the result is the same as if the positions of weight 0 did not exist; their values may be NaN or infinite.
The pooling and the statistics of batch norm ignore them. An image whose positions all have weight 0 has zero features;
the statistics of batch norm and the balance loss ignore it.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from gmsop_jax.models.checks import CheckedModule, check_train
from gmsop_jax.models.gate import GateFields, PoolingFields, shared_fields
from gmsop_jax.models.layers import (
    BatchNorm,
    Classifier,
    Dropout,
    ModuleFactory,
    dropout_key,
    he_normal,
    normalize,
    relu_convolution,
)
from gmsop_jax.models.mixture import GatedMixture, Mixture
from gmsop_jax.ops import (
    adaptive_channel_dropout,
    average_pool,
    channel_attention,
    covariance_pool,
    flatten_positions,
    matrix_power,
    multi_head_cross_covariance_pool,
    second_order_pool,
    triangle_vector,
)
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.coefficients import Coefficients
from gmsop_jax.ops.covariance import Where
from gmsop_jax.ops.dispatch import Dispatch
from gmsop_jax.ops.layers import nonempty_images

_Features = Float[AnyArray, "b *p c"]
_Mask = Shaped[AnyArray, "b *p"] | None
_Output = tuple[Float[Array, "b classes"], Mapping[str, Array]]


def without_gate(features: Array) -> dict[str, Array]:
    """Returns what `aux` contains in a head without a gate, in place of the outputs of the gate."""
    one = jnp.ones((features.shape[0], 1), features.dtype)
    return {"balance_loss": jnp.zeros((), features.dtype), "gate_weights": one, "importance": one}


class _PoolingHead(CheckedModule):
    """Projection → pooling → classifier. `SecondOrderHead` describes the fields."""

    num_classes: int
    projection_widths: Sequence[int] = ()
    projection_batch_norm: bool = False
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None
    pool_precision: PrecisionLike = None

    def _pool(self, x: Float[AnyArray, "b p c"], where: Where | None, train: bool) -> Float[Array, "b f"]:
        raise NotImplementedError

    @nn.compact
    def __call__(
        self, x: _Features, train: bool = False, gate_noise: AnyArray | None = None, where: _Mask = None
    ) -> _Output:
        """Pools and classifies. `gate_noise` is ignored, because there is no gate."""
        check_train(train)
        x, where = flatten_positions(x, where)
        for i, width in enumerate(self.projection_widths, 1):
            name, batch_norm = f"projection{i}", self.projection_batch_norm
            x = relu_convolution(self, x, width, name, train=train, where=where, batch_norm=batch_norm)
        features = self._pool(x, where, train)
        aux = {**without_gate(features), "features": features}
        return Classifier(self.num_classes, self.dtype, name="classifier")(features), aux


class GAPHead(_PoolingHead):
    """Global average pooling: f = c, or the last of `projection_widths`.

    One projection to 512 or 8256 channels gives the paper's baselines -512d and -8256d. For the fields, see
    `SecondOrderHead`.
    """

    def _pool(self, x, where, train):
        return average_pool(x, where=where)


class CovarianceHead(_PoolingHead):
    """Second-order pooling without normalisation (SOP): the upper triangle of the covariance, f = c(c + 1)/2.

    For the fields, see `SecondOrderHead`.
    """

    def _pool(self, x, where, train):
        return triangle_vector(covariance_pool(x, where=where, precision=self.pool_precision))


class SecondOrderHead(_PoolingHead):
    """SR-SOP: square-root-normalised covariance pooling, f = c(c + 1)/2.

    With a projection to 256 channels, batch norm and 5 iterations, this is the head of iSQRT-COV (Li et al. 2018).

    Attributes:
      num_classes: number of classes.
      projection_widths: widths of the 1×1 convolutions before the pooling. They have no bias, and each is followed by
        ReLU. With the `candidate_widths` of a mixture, this is parametric SR-SOP: one candidate without a gate.
      projection_batch_norm: whether each of these convolutions has batch norm before its ReLU.
      norm: creates these batch norms.
      dtype: dtype of projection and classifier; None infers it from features and parameters.
      pool_precision: precision of the matrix products in the pooling; None depends on the device, see
        `ops.matrix_precision`.
      num_iters: number of Newton–Schulz iterations; 3 in GM-SOP, 5 in iSQRT-COV.
      coefficients: coefficients of the iteration, `newton_schulz` or `minimax`; see `ops.newton_schulz_sqrt`.

    Example:
      >>> import jax
      >>> head = SecondOrderHead(10)
      >>> tokens, mask = jnp.ones((2, 7, 4)), jnp.ones((2, 7), bool).at[0, 5:].set(False)
      >>> variables = head.init(jax.random.key(0), tokens)
      >>> logits, aux = head.apply(variables, tokens, where=mask)
      >>> logits.shape, aux["features"].shape
      ((2, 10), (2, 10))
    """

    num_iters: int = 3
    coefficients: Coefficients = "newton_schulz"

    def _pool(self, x, where, train):
        return second_order_pool(
            x, self.num_iters, where=where, coefficients=self.coefficients, precision=self.pool_precision
        )


class MPNCOVHead(_PoolingHead):
    """MPN-COV: powers of the covariance by eigendecomposition (Li et al. 2017), f = c(c + 1)/2.

    Attributes:
      power: α of Σ^α; see `ops.matrix_power`.
      others: see `SecondOrderHead`.
    """

    power: float = 0.5

    def _pool(self, x, where, train):
        sigma = covariance_pool(x, where=where, precision=self.pool_precision)
        return triangle_vector(matrix_power(sigma, self.power, precision=self.pool_precision))


class CrossCovarianceHead(_PoolingHead):
    """Multi-head cross-covariance pooling with singular-value power normalisation, f = num_heads · head_width².

    One linear map without bias computes the queries and keys of all heads. Their cross-covariance over tokens is
    normalised by `ops.normalize_singular_value` (SoT, Xie et al. 2021). Pass the tokens without the class token.

    Attributes:
      num_heads: number of heads, each with one cross-covariance matrix.
      head_width: r, the number of channels of a head's queries and keys.
      power: exponent α of the normalisation.
      others: see `SecondOrderHead`.
    """

    num_heads: int = 6
    head_width: int = 32
    power: float = 0.5

    def _pool(self, x, where, train):
        width = 2 * self.num_heads * self.head_width
        x = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=he_normal, name="queries_keys")(x)
        start = self.param("start", start_init, (self.head_width,))
        return multi_head_cross_covariance_pool(
            x, start, self.num_heads, self.power, where=where, precision=self.pool_precision
        )


start_init = nn.initializers.normal(1.0)  # of the initial vector of the power iteration, as in the authors' code


class DropCovHead(_PoolingHead):
    """DropCov: covariance pooling without normalisation, with adaptive channel dropout in training, f = c(c + 1)/2.

    In training, channel attention scales the features, and whole channels are dropped; see
    `ops.adaptive_channel_dropout` (Wang et al., NeurIPS 2022). In evaluation, the head is the same as `CovarianceHead`.
    Training needs the RNG stream `dropout`.

    Attributes:
      projection_widths, projection_batch_norm: see `SecondOrderHead`; the authors project to 256 channels with batch
        norm.
      axis_name: pmap or shard_map axis over which the batch is split. The dropout rate and mask are then those of the
        whole batch.
      others: see `SecondOrderHead`.
    """

    axis_name: str | None = None

    def _pool(self, x, where, train):
        kernel = self.param("attention", attention_init, (3,))
        sigma = covariance_pool(x, where=where, precision=self.pool_precision)
        if train and not self.is_initializing():
            attention = channel_attention(average_pool(x, where=where), kernel)
            key, images = dropout_key(self), nonempty_images(where)
            sigma = adaptive_channel_dropout(sigma, attention, key, where=images, axis_name=self.axis_name)
        return triangle_vector(sigma)


def attention_init(key: Array, shape: tuple[int, ...]) -> Array:
    """PyTorch's default initializer of convolutions: uniform in ±1/√fan_in."""
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class _MixtureHead(PoolingFields):
    """Mixture → batch norm → dropout → classifier."""

    num_classes: int
    num_candidates: int = 16
    candidate_widths: Sequence[int] = (256, 128)
    order: int = 2
    dropout_rate: float = 0.2
    axis_name: str | None = None
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    def _classify(self, features: Array, aux: Mapping[str, Array], train: bool, where: _Mask) -> _Output:
        y = normalize(self.norm(name="bn"), features, train, nonempty_images(where))
        y = Dropout(self.dropout_rate, self.axis_name)(y, train)
        return Classifier(self.num_classes, self.dtype, name="classifier")(y), {**aux, "features": features}


class MixtureHead(_MixtureHead):
    """Averaged or concatenated mixture: `Mixture` → batch norm → dropout → classifier.

    These are the paper's Ave-GAP and Ave-SOP, and their counterparts with concatenation. Every candidate runs on every
    image. Training with dropout needs the RNG stream `dropout`.

    Attributes:
      num_classes: number of classes.
      num_candidates, candidate_widths, order, num_iters, coefficients, pool_precision, combine: see `Mixture`.
      dropout_rate: probability of setting a feature to 0 in training; 0 disables dropout.
      axis_name: pmap or shard_map axis over which the batch is split; see `Dropout`.
      norm: creates the batch norm.
      dtype: dtype of convolutions and classifier; None infers it from features and parameters.
    """

    combine: Literal["average", "concatenate"] = "average"

    @nn.compact
    def __call__(
        self, x: _Features, train: bool = False, gate_noise: AnyArray | None = None, where: _Mask = None
    ) -> _Output:
        """Pools and classifies. `gate_noise` is ignored, because there is no gate."""
        check_train(train)
        features = Mixture(**shared_fields(self, Mixture), name="mixture")(x, where)
        return self._classify(features, without_gate(features), train, where)


class GatedMixtureHead(_MixtureHead, GateFields):
    """GM-SOP (order 2) or GM-GAP (order 1): `GatedMixture` → batch norm → dropout → classifier.

    `aux['features']` is the output of the mixture, before batch norm: f = d(d + 1)/2 or d, where d is the last of
    `candidate_widths`. Training needs the RNG streams `gating` (unless gate_noise is given) and `dropout`.

    Attributes:
      num_classes: number of classes.
      dropout_rate: probability of setting a feature to 0 in training; 0 disables dropout.
      others: see `GatedMixture` and `Gate`.

    Example:
      >>> import jax
      >>> head = GatedMixtureHead(10, num_candidates=4, num_selected=2, candidate_widths=(16, 8))
      >>> features = jax.random.normal(jax.random.key(0), (2, 6, 6, 32))
      >>> variables = head.init(jax.random.key(1), features)
      >>> logits, aux = head.apply(variables, features)
      >>> logits.shape, aux["features"].shape, aux["gate_weights"].shape
      ((2, 10), (2, 36), (2, 4))
    """

    dispatch: Dispatch = "auto"

    @nn.compact
    def __call__(
        self, x: _Features, train: bool = False, gate_noise: AnyArray | None = None, where: _Mask = None
    ) -> _Output:
        """Pools and classifies. `gate_noise` replaces the draw from the stream `gating`; see `Gate`."""
        check_train(train)
        mixture = GatedMixture(**shared_fields(self, GatedMixture), name="mixture")
        features, aux = mixture(x, train, gate_noise, where)
        return self._classify(features, aux, train, where)
