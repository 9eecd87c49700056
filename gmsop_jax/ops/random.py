"""Random draws for a batch that is split over devices."""

from collections.abc import Callable

import jax
from jaxtyping import Array


def draw_rows(
    draw: Callable[[Array, tuple[int, ...]], Array], rng: Array, shape: tuple[int, ...], axis_name: str | None = None
) -> Array:
    """Draws random numbers for this device's rows, as a single device would draw them for the whole batch.

    Each device draws for all rows and keeps its own, so the numbers do not depend on the number of devices.

    Args:
      draw: (key, shape) → array, like `jax.random.normal`.
      rng: PRNG key, the same on every device.
      shape: shape of the result; its first axis is this device's rows.
      axis_name: pmap or shard_map axis over which the batch is split; None if there is no such axis (under jit, XLA
        partitions the draw itself).

    Returns: an array of the given shape.
    """
    if axis_name is None:
        return draw(rng, shape)
    rows = shape[0]
    everything = draw(rng, (rows * jax.lax.axis_size(axis_name), *shape[1:]))
    return jax.lax.dynamic_slice_in_dim(everything, rows * jax.lax.axis_index(axis_name), rows)
