"""Heads: from a map of features to logits, all with one contract.

`head(x, train=…, gate_noise=None)` takes any [b, h, w, c] and returns `(logits, aux)`: logits are
[b, num_classes], float32 or float64; `aux` holds `features` [b, f] (the pooled vector), `gate_weights`
[b, n] and `balance_loss`, which for a head without gate are ones [b, 1] and 0.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gmsop_jax.models.gating import pool
from gmsop_jax.models.layers import BatchNorm, Dropout, he_normal
from gmsop_jax.models.mixture import GatedMixture
from gmsop_jax.ops.dispatch import Dispatch
from gmsop_jax.ops.top_k import Gradient

_Map = Float[Array, "b h w c"]
_Output = tuple[Float[Array, "b classes"], Mapping[str, Array]]


def _classify(features: Array, num_classes: int, dtype: jnp.dtype | None) -> Array:
    dense = nn.Dense(num_classes, dtype=dtype, kernel_init=he_normal, name="classifier")
    logits = dense(features)
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


class _PoolingHead(nn.Module):
    """One pooling for every image, then the classifier."""

    num_classes: int
    projection_widths: Sequence[int] = ()
    dtype: jnp.dtype | None = None

    def _pool(self, x: Array) -> Array:
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: _Map, *, train: bool, gate_noise: Array | None = None) -> _Output:
        """Pools and classifies; `gate_noise` is ignored, there is no gate."""
        for i, width in enumerate(self.projection_widths, 1):
            convolution = nn.Dense(
                width, use_bias=False, dtype=self.dtype, kernel_init=he_normal, name=f"projection{i}"
            )
            x = jax.nn.relu(convolution(x))
        features = self._pool(x.reshape(x.shape[0], -1, x.shape[-1]))
        aux = {
            "features": features,
            "gate_weights": jnp.ones((x.shape[0], 1), features.dtype),
            "balance_loss": jnp.zeros((), features.dtype),
        }
        return _classify(features, self.num_classes, self.dtype), aux


class GAPHead(_PoolingHead):
    """Global average pooling: f = c, or the last of `projection_widths`.

    Attributes:
      num_classes: of the classifier.
      projection_widths: of 1×1 convolutions without bias, each with ReLU, before the pooling; one of 512
        or 8256 makes the paper's -512d and -8256d baselines.
      dtype: of projection and classifier; None follows features and parameters.
    """

    def _pool(self, x):
        return pool(x, 1, 1)


class SecondOrderHead(_PoolingHead):
    """SR-SOP (iSQRT-COV): square-root-normalised covariance pooling, f = c(c + 1)/2.

    Attributes:
      num_classes: of the classifier.
      projection_widths: as in `GAPHead`; those of a mixture's candidate make parametric SR-SOP, which is
        one candidate without a gate.
      dtype: of projection and classifier; None follows features and parameters.
      num_iters: Newton–Schulz steps; 3 as GM-SOP, 5 as iSQRT-COV.
    """

    num_iters: int = 3

    def _pool(self, x):
        return pool(x, 2, self.num_iters)


class GatedMixtureHead(nn.Module):
    """GM-SOP (order 2) or GM-GAP (order 1): `GatedMixture` → batch norm → dropout → classifier.

    `aux['features']` is the mixture's vector before batch norm: f = d(d + 1)/2 or d, for d the last of
    `candidate_widths`. Training needs the RNG streams `gating` (unless gate_noise is given) and
    `dropout`.

    Attributes:
      num_classes: of the classifier.
      dropout_rate: 0 for none.
      others: as in `GatedMixture`.
    """

    num_classes: int
    num_candidates: int = 16
    num_selected: int = 8
    candidate_widths: Sequence[int] = (256, 128)
    gate_widths: Sequence[int] = (256, 128)
    order: int = 2
    num_iters: int = 3
    gradient: Gradient = "straight_through"
    dispatch: Dispatch = "auto"
    dropout_rate: float = 0.2
    dtype: jnp.dtype | None = None
    axis_name: str | None = None
    per_device_bn: bool = False

    @nn.compact
    def __call__(self, x: _Map, *, train: bool, gate_noise: Array | None = None) -> _Output:
        """Pools and classifies; `gate_noise` [b] replaces the draw from the stream `gating`."""
        mixture = GatedMixture(
            self.num_candidates,
            self.num_selected,
            self.candidate_widths,
            self.gate_widths,
            self.order,
            self.num_iters,
            self.gradient,
            self.dispatch,
            dtype=self.dtype,
            axis_name=self.axis_name,
            per_device_bn=self.per_device_bn,
            name="mixture",
        )
        features, aux = mixture(x, train=train, gate_noise=gate_noise)
        y = BatchNorm(axis_name=None if self.per_device_bn else self.axis_name, name="bn")(features, train=train)
        y = Dropout(self.dropout_rate, self.axis_name)(y, train=train)
        return _classify(y, self.num_classes, self.dtype), {**aux, "features": features}
