"""One mesh over all devices of all processes: the batch is split over them, and each holds the whole state.

A step is written for one device's part of the batch, with collectives over the axis `AXIS`. There are two
ways to run it on the mesh, with the same results: `jit` of `shard_map`, and `pmap`.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gmsop_jax.errors import ConfigError

AXIS = "batch"  # the axis of the mesh, and of pmap and shard_map

HostBatch = Mapping[str, np.ndarray]


_LEAST_ROWS = 16  # that a CPU device gets; with fewer, splitting the batch costs more than it gains


def use_cpu_devices(count: int, batch_sizes: Sequence[int]) -> None:
    """Lets JAX take this machine's CPU as several devices; to be called before anything touches a device.

    XLA runs much of a small network on one core of a device; a device a core uses them all. A device that
    waits for the others holds one of XLA's threads meanwhile, so there are as many more of these: with too
    few, an operation that waits for threads of its own, like an eigendecomposition, would never end.

    `XLA_FLAGS`, `JAX_NUM_CPU_DEVICES` and `PJRT_NPROC` of the environment go before it.

    Args:
      count: devices; 0 for as many as cores, or for fewer, so that every batch size divides over them and
        leaves a device 16 rows or more.
      batch_sizes: rows that are split over the devices at a time.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = os.cpu_count() or 1
    if count == 0:
        most, rows = min(cores, min(batch_sizes) // _LEAST_ROWS), math.gcd(*batch_sizes)
        count = max((n for n in range(1, most + 1) if rows % n == 0), default=1)
    with contextlib.suppress(RuntimeError):  # JAX has started already, for example in a notebook: its devices stay
        jax.config.update("jax_num_cpu_devices", count)
        if count > 1:
            os.environ.setdefault("PJRT_NPROC", str(cores + count))


def create_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh with one axis, `AXIS`, over all devices of all processes or over the given ones."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(field: str, batch_size: int, mesh: Mesh, sub_batches: int = 1) -> None:
    """Checks that a global batch splits evenly over devices and sub-batches.

    Raises:
      ConfigError: if it doesn't; the message names `field`.
    """
    parts = mesh.size * sub_batches
    if batch_size % parts:
        over = f"{mesh.size} devices" + (f" × {sub_batches} sub-batches" if sub_batches > 1 else "")
        nearest = max(batch_size // parts, 1) * parts
        raise ConfigError(f"config.{field} = {batch_size} doesn't split evenly over {over}; use {nearest}, for example")


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that each device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays onto each device."""
    return jax.device_put(tree, replicated(mesh))


def place_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Copies this process's rows of a batch onto its devices.

    Args:
      batch: this process's contiguous rows, the same number in each process.
      mesh: the devices, which must divide the number of rows.

    Returns: the global batch, split over the devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


@functools.cache
def compiler_options() -> dict[str, str]:
    """The XLA options that training steps are compiled with, if this jaxlib knows them.

    On CPUs, reductions (above all those of batch norm) go to XLA's library of fused loops, which uses all
    cores. The library's other fusion types don't help: products gain nothing, and elementwise ones copy what
    a loop updates in place. On GPUs, only deterministic kernels are allowed, so that a resumed run repeats
    the bits of an uninterrupted one. An option that the user sets in XLA_FLAGS is left alone.
    """
    options = {
        "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
        "gpu": {"xla_gpu_deterministic_ops": True},
    }
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = {name: value for name, value in options.get(jax.default_backend(), {}).items() if name not in flags}
    try:
        jax.jit(lambda x: x, compiler_options=chosen).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return chosen


def compile_train_step(step: Callable, mesh: Mesh, mode: str) -> tuple[Any, Callable]:
    """Prepares a training step for a mesh; XLA compiles it when it is first called.

    Args:
      step: (state, part of a batch) → (state, metrics), with collectives over `AXIS`.
      mesh: the devices.
      mode: `jit` or `pmap`.

    Returns: (program, place): `place` puts this process's rows of a batch on its devices, and the program
      maps the state and a placed batch to the new state and metrics. It donates the old state's memory.
    """
    if mode == "jit":
        part, whole = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(step, mesh=mesh, in_specs=(whole, part), out_specs=whole, check_vma=False)
        program = jax.jit(mapped, donate_argnums=0, compiler_options=compiler_options())
        return program, functools.partial(place_batch, mesh=mesh)
    devices = list(mesh.devices.flat)
    program = jax.pmap(step, AXIS, in_axes=(None, 0), out_axes=None, donate_argnums=0, devices=devices)  # pyright: ignore[reportArgumentType]

    def run(state: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
        state, metrics = program(state, batch)
        return jax.tree.map(functools.partial(_span_mesh, mesh=mesh), state), metrics

    local = sum(device.process_index == jax.process_index() for device in devices)
    return (run if jax.process_count() > 1 else program), functools.partial(_split_rows, parts=local)


def _span_mesh(array: jax.Array, mesh: Mesh) -> jax.Array:
    """Turns an array that pmap replicated over this process's devices into one over the whole mesh."""
    copies = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, replicated(mesh), copies)


def _split_rows(batch: HostBatch, parts: int) -> dict[str, np.ndarray]:
    return {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}


def compile_eval_step(step: Callable, mesh: Mesh) -> Callable:
    """Prepares an evaluation step for a mesh: (variables, placed batch) → metrics.

    Args:
      step: the same for one device's part of a batch, with collectives over `AXIS`.
      mesh: the devices.
    """
    part, whole = PartitionSpec(AXIS), PartitionSpec()
    return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(whole, part), out_specs=whole, check_vma=False))
