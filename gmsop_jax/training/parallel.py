"""Data parallelism on one mesh over all devices of all processes: the batch is split, and the state is replicated.

A step is written for one device's part of the batch, with collectives over the axis `AXIS`. There are two
ways to run it on the mesh, with the same results: `jit` of `shard_map`, and `pmap`.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gmsop_jax.errors import ConfigError

AXIS = "batch"  # the axis of the mesh, and of pmap and shard_map
OPTIONS = {  # of XLA, by backend; see `compiler_options`
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"},
    "gpu": {"xla_gpu_deterministic_ops": True},
}

HostBatch = Mapping[str, np.ndarray]


def create_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh with one axis, `AXIS`, over all devices of all processes or over the given ones."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_eval_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError if `config.eval.batch_size` doesn't split evenly over the devices."""
    if batch_size % mesh.size:
        raise _uneven_split("eval.batch_size", batch_size, mesh.size, f"{mesh.size} devices")


def check_train_batches(train: Any, batch_norm: str, num_images: int, mesh: Mesh) -> None:
    """Checks that the batches of an epoch of `num_images` images can be split over devices and sub-batches.

    Raises:
      ConfigError: if a batch doesn't split evenly, if batch norm would compute its statistics from a single image, or
        if mixup would have to pair an odd number of images on a device.
    """
    t, devices = train, mesh.size
    over = f"{devices} devices" + (f" × {t.sub_batches} sub-batches" if t.sub_batches > 1 else "")
    parts = devices * t.sub_batches
    if t.batch_size % parts:
        raise _uneven_split("train.batch_size", t.batch_size, parts, over)
    last = 0 if t.drop_last else num_images % t.batch_size
    for size in {t.batch_size, last} - {0}:
        name, advice = f"config.train.batch_size = {t.batch_size}", "choose another batch size"
        if size == last:
            name += f" with config.train.drop_last = False leaves a last batch of {last} of {num_images} images, which"
            advice += ", or leave that batch out with --config.train.drop_last=True"
        if size % parts:
            raise ConfigError(f"{name} doesn't split evenly over {over}; {advice}")
        if size // t.sub_batches // (devices if batch_norm == "device" else 1) < 2:
            raise ConfigError(
                f"{name} makes batch norm compute its statistics from single images (train.sub_batches ="
                f" {t.sub_batches}, parallel.batch_norm = {batch_norm!r}, {devices} devices); {advice}"
            )
        if t.mixup_alpha and devices > 1 and size // devices % 2:
            raise ConfigError(
                f"{name} gives each of {devices} devices an odd number of rows ({size // devices}), but"
                f" config.train.mixup_alpha = {t.mixup_alpha} mixes them in pairs; {advice}, or set"
                " --config.train.mixup_alpha=0"
            )


def _uneven_split(field: str, batch_size: int, parts: int, over: str) -> ConfigError:
    nearest = max(batch_size // parts, 1) * parts
    return ConfigError(f"config.{field} = {batch_size} doesn't split evenly over {over}; use {nearest}, for example")


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Copies a tree of arrays onto each device."""
    return jax.device_put(tree, replicated(mesh))


def place_batch(batch: HostBatch, mesh: Mesh) -> dict[str, jax.Array]:
    """Copies this process's rows of a batch, as many as every other process has, onto its devices.

    Returns: the global batch, split evenly over the devices of the mesh.
    """
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Returns the XLA options for training steps; empty, with a warning, if the installed jaxlib does not know them.

    On CPUs, reductions (mainly those of batch norm) use XLA's library of fused loops, which runs on all cores. The
    library's other fusion types don't help: matrix products become no faster, and elementwise operations copy arrays
    that a loop updates in place. On GPUs, only deterministic kernels are allowed, also for evaluation steps, so that a
    resumed run repeats an uninterrupted one bit for bit. Options that the user sets in XLA_FLAGS are not changed.
    `jax.pmap` takes no options, so the mode `pmap` needs XLA_FLAGS instead.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    chosen = {name: value for name, value in OPTIONS.get(jax.default_backend(), {}).items() if name not in flags}
    try:
        jax.jit(lambda x: x, compiler_options=chosen).lower(0.0).compile()
    except jax.errors.JaxRuntimeError as error:
        logging.getLogger(__name__).warning(
            "jaxlib %s rejects the options %s, so steps may be slower, or not reproducible bit for bit on a GPU (%s)",
            jax.lib.__version__,
            ", ".join(chosen),
            str(error).partition("\n")[0],
        )
        return {}
    return chosen


def compile_train_step(step: Callable, mesh: Mesh, mode: str) -> tuple[Any, Callable]:
    """Prepares a training step for a mesh; XLA compiles it when it is first called.

    Args:
      step: (state, part of a batch) → (state, metrics), with collectives over `AXIS`.
      mesh: the devices.
      mode: `jit` or `pmap`.

    Returns: (program, place): `place` turns this process's rows of a batch into the batch that the program takes. The
      program maps the state and such a batch to the new state and metrics, and donates the old state's memory.
    """
    if mode == "jit":
        program = jax.jit(_map_over(step, mesh), donate_argnums=0, compiler_options=compiler_options())
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
    """Prepares an evaluation step for a mesh: (variables, part of a batch) → metrics, with collectives over `AXIS`."""
    options = None if jax.default_backend() == "cpu" else compiler_options()
    return jax.jit(_map_over(step, mesh), compiler_options=options)


def _map_over(step: Callable, mesh: Mesh) -> Callable:
    """Maps a step over the devices: each gets the whole first argument, and its part of the batch."""
    whole = PartitionSpec()
    return jax.shard_map(step, mesh=mesh, in_specs=(whole, PartitionSpec(AXIS)), out_specs=whole, check_vma=False)
