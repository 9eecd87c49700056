"""One mesh over all devices: the batch is split over them, the state is on each."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gmsop_jax.errors import ConfigError


def create_mesh() -> Mesh:
    """A mesh with the one axis `batch` over all devices of all processes."""
    return jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))


def check_batch_size(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a global batch that doesn't split evenly.

    Raises:
      ConfigError: naming `field`.
    """
    if batch_size % mesh.size:
        raise ConfigError(
            f"config.{field} = {batch_size} doesn't split over {mesh.size} devices;"
            f" {max(batch_size // mesh.size, 1) * mesh.size} does"
        )


def place_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices; the result is the global batch.

    A batch whose size doesn't split over the devices (the last of an epoch may not) is put on each.
    """
    rows = next(iter(batch.values())).shape[0] * jax.process_count()
    spec = PartitionSpec("batch") if rows % mesh.size == 0 else PartitionSpec()
    sharding = NamedSharding(mesh, spec)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def jit_train_step(step: Callable, mesh: Mesh) -> Callable:
    """Compiles a training step; the old state's memory is given to the new one."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, donate_argnums=0, out_shardings=replicated)


def jit_eval_step(step: Callable, mesh: Mesh) -> Callable:
    """Compiles an evaluation step."""
    return jax.jit(step, out_shardings=NamedSharding(mesh, PartitionSpec()))
