"""Exact dispatch: every candidate runs on the images that selected it, and on no others."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def apply_candidates(
    x: Float[Array, "b p c"],
    kernels: Sequence[Float[Array, "n i o"]],
    indices: Int[Array, "b k"],
) -> Float[Array, "b k p d"]:
    """Runs each image through its k selected candidates: a stack of 1×1 convolutions, each with ReLU.

    y[b, j] = ReLU(… ReLU(x[b] · W₁[indices[b, j]]) · W₂[indices[b, j]] …)   (GM-SOP, section 2.1)

    Each (image, selected candidate) pair is one tile of p rows against that candidate's weights, so the
    work is b·k tiles whatever n is, shapes are static, and nothing is dropped or padded.

    Args:
      x: features of p positions.
      kernels: the bank's weights, layer by layer, from c to d channels.
      indices: selected candidates.

    Returns: features of each pair.
    """
    y = x[:, None]
    for kernel in kernels:
        y = jax.nn.relu(jnp.einsum("bkpi,bkio->bkpo", y, kernel[indices]))
    return y
