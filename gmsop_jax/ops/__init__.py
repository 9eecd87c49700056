"""Pure array functions, which depend only on JAX, NumPy and jaxtyping.

Axes: b batch, p positions (height × width), c channels, d side of a matrix, n candidates, k selected candidates.
"""

from gmsop_jax.ops.covariance import average_pool, covariance_pool, second_order_pool
from gmsop_jax.ops.cross_covariance import (
    cross_covariance_pool,
    multi_head_cross_covariance_pool,
    normalize_singular_value,
)
from gmsop_jax.ops.dispatch import apply_all_candidates, apply_candidates, mix_candidates
from gmsop_jax.ops.dropcov import adaptive_channel_dropout, channel_attention, channel_dropout_rate
from gmsop_jax.ops.gate import (
    GateOutput,
    apply_gate,
    balance_loss,
    draw_gate_noise,
    select_top_k,
    selection_weights,
    top_k_gate,
)
from gmsop_jax.ops.layers import batch_norm, dropout, flatten_positions, linear_logits
from gmsop_jax.ops.matrix_power import matrix_power
from gmsop_jax.ops.matrix_sqrt import newton_schulz_inverse_sqrt, newton_schulz_sqrt
from gmsop_jax.ops.precision import matrix_precision
from gmsop_jax.ops.random import draw_rows
from gmsop_jax.ops.triangle import triangle_matrix, triangle_vector

__all__ = [
    "GateOutput",
    "adaptive_channel_dropout",
    "apply_all_candidates",
    "apply_candidates",
    "apply_gate",
    "average_pool",
    "balance_loss",
    "batch_norm",
    "channel_attention",
    "channel_dropout_rate",
    "covariance_pool",
    "cross_covariance_pool",
    "draw_gate_noise",
    "draw_rows",
    "dropout",
    "flatten_positions",
    "linear_logits",
    "matrix_power",
    "matrix_precision",
    "mix_candidates",
    "multi_head_cross_covariance_pool",
    "newton_schulz_inverse_sqrt",
    "newton_schulz_sqrt",
    "normalize_singular_value",
    "second_order_pool",
    "select_top_k",
    "selection_weights",
    "top_k_gate",
    "triangle_matrix",
    "triangle_vector",
]
