"""The precision of the matrix products in second-order pooling, with a default for each kind of device."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import DotAlgorithm, DotAlgorithmPreset, Precision, PrecisionLike
from jax.typing import DTypeLike

# Compute capabilities of A100, H100 and H200, B200, and B300: six products in bfloat16 are faster than one in float32.
_FAST_BFLOAT16 = ("8.0", "9.0", "10.0", "10.3")

ALLOWED_PRECISIONS = (
    "None, 'default', 'high', 'highest', or a jax.lax.DotAlgorithmPreset or its name, such as 'BF16_BF16_F32_X6'"
)


def matrix_precision(precision: PrecisionLike, dtype: DTypeLike) -> PrecisionLike:
    """The precision of the matrix products in covariances and their square roots.

    The default keeps the root and its gradient within 1e-5 of float64 (docs/accuracy.md) and depends on the first
    device of the default backend: `BF16_BF16_F32_X6` on NVIDIA's A100, H100, H200, B200 and B300, whose tensor cores
    compute it faster than float32, and `highest` elsewhere, which is float32 on CPUs and GPUs, and six products in
    bfloat16 on TPUs. `jax_default_matmul_precision` has no effect, because most of its values are not accurate enough.

    Args:
      precision: what JAX's products accept, such as `'highest'`, or a `jax.lax.DotAlgorithmPreset` or its name; None
        means the default. On a CPU, JAX computes the bfloat16 presets in float32 and rejects the TF32 presets; use
        `'highest'` there.
      dtype: dtype of the matrices, float32 or float64. The default for float64 is `highest`.

    Returns: `precision`, or the default; a preset that was given by its name is returned as the preset itself.

    Raises:
      ValueError: if JAX does not know the precision, or if it is a preset that does not accumulate in the dtype of the
        matrices. JAX itself raises an error for presets that the device does not support.

    Example:
      >>> matrix_precision("BF16_BF16_F32_X6", jnp.float32)
      DotAlgorithmPreset.BF16_BF16_F32_X6
    """
    if not is_precision(precision):
        raise ValueError(f"precision must be {ALLOWED_PRECISIONS}, got {precision!r}")
    if precision is None:
        fast = jnp.dtype(dtype) == jnp.float32 and _compute_capability() in _FAST_BFLOAT16
        return DotAlgorithmPreset.BF16_BF16_F32_X6 if fast else Precision.HIGHEST
    if isinstance(precision, str) and precision in DotAlgorithmPreset.__members__:
        precision = DotAlgorithmPreset[precision]
    if isinstance(precision, DotAlgorithmPreset):
        accumulated = precision.accumulation_type
        if accumulated is not None and jnp.dtype(accumulated) != jnp.dtype(dtype):
            raise ValueError(
                f"precision={precision.name!r} does not accumulate in {jnp.dtype(dtype)}, the dtype of the matrices;"
                " use 'highest' or another preset"
            )
    return precision


def is_precision(value: Any) -> bool:
    """Whether JAX's products accept a value as their precision."""
    if isinstance(value, str):
        return value in DotAlgorithmPreset.__members__ or _is_level(value)
    if isinstance(value, tuple):  # one level for each operand
        return len(value) == 2 and all(isinstance(level, (str, Precision)) and _is_level(level) for level in value)
    return value is None or isinstance(value, (Precision, DotAlgorithmPreset, DotAlgorithm))


def _is_level(value: str | Precision) -> bool:
    try:
        Precision(value)
    except ValueError:
        return False
    return True


def _compute_capability() -> str | None:
    """The compute capability of the first device, such as '9.0', if it is a GPU."""
    return getattr(jax.devices()[0], "compute_capability", None)
