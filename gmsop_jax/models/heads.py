"""Heads: from a map of features to logits, all with one contract.

`head(x, train=False, gate_noise=None)` takes any [b, h, w, c] and returns `(logits, aux)`: logits are
[b, num_classes], float32 or float64; `aux` holds `features` [b, f] (the pooled vector), `gate_weights`
[b, n], `importance` [b, n] and `balance_loss`, which for a head without gate are ones [b, 1] and 0.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gmsop_jax.models.checks import CheckedModule
from gmsop_jax.models.gate import GateFields, shared_fields
from gmsop_jax.models.layers import BatchNorm, Classifier, Dropout, ModuleFactory, flatten_map, he_normal
from gmsop_jax.models.mixture import GatedMixture, Mixture
from gmsop_jax.ops import average_pool, covariance_pool, matrix_power, second_order_pool, triangle_vector
from gmsop_jax.ops.arrays import AnyArray
from gmsop_jax.ops.dispatch import Dispatch

_Map = Float[AnyArray, "b h w c"]
_Output = tuple[Float[Array, "b classes"], Mapping[str, Array]]


def _without_gate(features: Array) -> dict[str, Array]:
    one = jnp.ones((features.shape[0], 1), features.dtype)
    return {"balance_loss": jnp.zeros((), features.dtype), "gate_weights": one, "importance": one}


class _PoolingHead(CheckedModule):
    """One pooling for every image, then the classifier.

    Attributes:
      num_classes: of the classifier.
      projection_widths: of 1×1 convolutions without bias, each with ReLU, before the pooling.
      projection_batch_norm: whether each of them has batch norm before its ReLU.
      norm: makes these batch norms.
      dtype: of projection and classifier; None follows features and parameters.
    """

    num_classes: int
    projection_widths: Sequence[int] = ()
    projection_batch_norm: bool = False
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    def _pool(self, x: Float[AnyArray, "b p c"]) -> Float[Array, "b f"]:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: _Map, train: bool = False, gate_noise: AnyArray | None = None) -> _Output:
        """Pools and classifies; `gate_noise` is ignored, there is no gate."""
        x = flatten_map(x)
        for i, width in enumerate(self.projection_widths, 1):
            name = f"projection{i}"
            x = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=he_normal, name=name)(x)
            if self.projection_batch_norm:
                x = self.norm(dtype=self.dtype, name=f"{name}_bn")(x, train=train)
            x = jax.nn.relu(x)
        features = self._pool(x)
        aux = {**_without_gate(features), "features": features}
        return Classifier(self.num_classes, self.dtype, name="classifier")(features), aux


class GAPHead(_PoolingHead):
    """Global average pooling: f = c, or the last of `projection_widths`.

    One projection to 512 or 8256 makes the paper's -512d and -8256d baselines. Attributes: as
    `SecondOrderHead`'s, without `num_iters`.
    """

    def _pool(self, x):
        return average_pool(x)


class CovarianceHead(_PoolingHead):
    """Plain second-order pooling (SOP): the covariance's triangle as it is, f = c(c + 1)/2.

    Attributes: as `SecondOrderHead`'s, without `num_iters`.
    """

    def _pool(self, x):
        return triangle_vector(covariance_pool(x))


class SecondOrderHead(_PoolingHead):
    """SR-SOP: square-root-normalised covariance pooling, f = c(c + 1)/2.

    With projection to 256, batch norm and 5 steps this is iSQRT-COV's head (Li et al. 2018).

    Attributes:
      num_classes: of the classifier.
      projection_widths: of 1×1 convolutions without bias, each with ReLU, before the pooling; those of a
        mixture's candidate make parametric SR-SOP, which is one candidate without a gate.
      projection_batch_norm: whether each of them has batch norm before its ReLU.
      norm: makes these batch norms.
      dtype: of projection and classifier; None follows features and parameters.
      num_iters: Newton–Schulz steps; 3 as GM-SOP, 5 as iSQRT-COV.
    """

    num_iters: int = 3

    def _pool(self, x):
        return second_order_pool(x, self.num_iters)


class MPNCOVHead(_PoolingHead):
    """MPN-COV: powers of the covariance by eigendecomposition (Li et al. 2017), f = c(c + 1)/2.

    Attributes:
      power: α of Σ^α, see `ops.matrix_power`.
      others: as `SecondOrderHead`'s.
    """

    power: float = 0.5

    def _pool(self, x):
        return triangle_vector(matrix_power(covariance_pool(x), self.power))


class _MixtureHead(CheckedModule):
    """A mixture → batch norm → dropout → classifier."""

    num_classes: int
    num_candidates: int = 16
    candidate_widths: Sequence[int] = (256, 128)
    order: int = 2
    num_iters: int = 3
    dropout_rate: float = 0.2
    axis_name: str | None = None
    norm: ModuleFactory = BatchNorm
    dtype: DTypeLike | None = None

    def _finish(self, features: Array, aux: Mapping[str, Array], train: bool) -> _Output:
        y = self.norm(name="bn")(features, train=train)
        y = Dropout(self.dropout_rate, self.axis_name)(y, train)
        return Classifier(self.num_classes, self.dtype, name="classifier")(y), {**aux, "features": features}


class MixtureHead(_MixtureHead):
    """Averaged or concatenated mixture: `Mixture` → batch norm → dropout → classifier.

    Ave-GAP and Ave-SOP of the paper, and their concatenations: every candidate runs on every image.
    Training with dropout needs the RNG stream `dropout`.

    Attributes:
      num_classes: of the classifier.
      num_candidates, candidate_widths, order, num_iters, combine: as in `Mixture`.
      dropout_rate: 0 for none.
      axis_name: pmap or shard_map axis over which the batch is split; dropout is then that of the whole.
      norm: makes the batch norm.
      dtype: as in `ResNet`.
    """

    combine: Literal["average", "concatenate"] = "average"

    @nn.compact
    def __call__(self, x: _Map, train: bool = False, gate_noise: AnyArray | None = None) -> _Output:
        """Pools and classifies; `gate_noise` is ignored, there is no gate."""
        features = Mixture(**shared_fields(self, Mixture), name="mixture")(x)
        return self._finish(features, _without_gate(features), train)


class GatedMixtureHead(_MixtureHead, GateFields):
    """GM-SOP (order 2) or GM-GAP (order 1): `GatedMixture` → batch norm → dropout → classifier.

    `aux['features']` is the mixture's vector before batch norm: f = d(d + 1)/2 or d, where d is the last of
    `candidate_widths`. Training draws from the RNG streams `gating` (unless gate_noise is given) and
    `dropout`.

    Attributes:
      num_classes: number of classes.
      dropout_rate: probability with which a feature is zeroed in training; 0 turns dropout off.
      others: see `GatedMixture` and `Gate`.

    Example:
      >>> head = GatedMixtureHead(10, num_candidates=4, num_selected=2, candidate_widths=(16, 8))
      >>> features = jax.random.normal(jax.random.key(0), (2, 6, 6, 32))
      >>> variables = head.init(jax.random.key(1), features)
      >>> logits, aux = head.apply(variables, features)
      >>> logits.shape, aux["features"].shape, aux["gate_weights"].shape
      ((2, 10), (2, 36), (2, 4))
    """

    dispatch: Dispatch = "auto"

    @nn.compact
    def __call__(self, x: _Map, train: bool = False, gate_noise: AnyArray | None = None) -> _Output:
        """Pools and classifies; `gate_noise` replaces the draw from the stream `gating`."""
        mixture = GatedMixture(**shared_fields(self, GatedMixture), name="mixture")
        features, aux = mixture(x, train, gate_noise)
        return self._finish(features, aux, train)
