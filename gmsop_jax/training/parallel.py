"""One mesh over all devices of all processes: the batch is split over them, the state is on each.

Two ways to run a training step there, with the same results: `jit`, where XLA splits one program for
the whole batch, and `pmap`, where each device runs the program of its part and the parts meet in
collectives that are written out.
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gmsop_jax.errors import ConfigError, UserError

AXIS = "batch"  # of the mesh, and of pmap and shard_map

HostBatch = Mapping[str, np.ndarray]


def start_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run; to be called before anything else touches a device.

    Args:
      coordinator: `host:port` of the first process; `auto` asks the cluster (SLURM, Open MPI,
        Kubernetes, TPU pods); None for a run of a single process.
      num_processes, process_id: needed with an address, known by the cluster otherwise.

    Raises:
      ConfigError: if these don't go together, or the processes don't find each other.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ConfigError("--num-processes and --process-id need --coordinator host:port, the first process's")
        return
    address = None if coordinator == "auto" else coordinator
    if address is not None and not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"--coordinator {coordinator} has no port; give host:port, like 10.0.0.1:1234, or auto")
    try:
        jax.distributed.initialize(address, num_processes, process_id)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"the processes of this run can't be joined ({error}); give --coordinator host:port, reachable from"
            " all of them, --num-processes and a --process-id from 0, or --coordinator auto in a cluster that"
            " JAX knows"
        ) from error


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
    if count > 1:
        os.environ.setdefault("PJRT_NPROC", str(cores + count))
    with contextlib.suppress(RuntimeError):  # JAX is at work already, in a notebook say: it keeps what it has
        jax.config.update("jax_num_cpu_devices", count)


def first_process_does(action: Callable[[], None]) -> None:
    """Runs an action in the first process while the others wait; a UserError there is one in all.

    Raises:
      UserError: the action's own in the first process.
    """
    error = None
    if jax.process_index() == 0:
        try:
            action()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.int32(error is not None)):
        error = error or UserError("stopped with the first process, which tells why")
    if error is not None:
        raise error


def create_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis `batch`, over all devices of all processes unless some are named."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def check_batch_size(field: str, batch_size: int, mesh: Mesh, sub_batches: int = 1) -> None:
    """Refuses a global batch that doesn't split evenly over devices and sub-batches.

    Raises:
      ConfigError: naming `field`.
    """
    parts = mesh.size * sub_batches
    if batch_size % parts:
        over = f"{mesh.size} devices" + (f" × {sub_batches} sub-batches" if sub_batches > 1 else "")
        raise ConfigError(
            f"config.{field} = {batch_size} doesn't split over {over}; {max(batch_size // parts, 1) * parts} does"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(
    state: Any, mesh: Mesh, *, optimizer: bool = False, classifier: bool = False, least: int = 2**16
) -> Any:
    """Where each array of a training state lies: on every device, or split over them.

    An array that is split is so along its largest axis that the devices divide; one without such an
    axis is on every device.

    Args:
      state: a `TrainState` of arrays or their shapes.
      mesh: the devices.
      optimizer: split the optimiser's state.
      classifier: split the classifier, and its optimiser's state.
      least: numbers that an array must have to be split.

    Returns: the same tree, of shardings.
    """

    def place(path, leaf) -> NamedSharding:
        names = [str(getattr(key, "name", getattr(key, "key", ""))) for key in path]
        split = (optimizer and names[0] == "opt_state") or (classifier and "classifier" in names)
        axes = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
        if not (split and axes) or leaf.size < least:
            return replicated(mesh)
        largest = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, AXIS))

    return jax.tree_util.tree_map_with_path(place, state)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Puts a tree on each device."""
    return jax.device_put(tree, replicated(mesh))


def place_batch(batch: HostBatch, mesh: Mesh, size: int | None = None) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on its devices; the result is the global batch.

    A batch that doesn't split over the devices (the last of an epoch may not) is put on each, whole.

    Args:
      batch: this process's contiguous rows.
      mesh: the devices.
      size: rows of the global batch; by default as many from each process as from this one.
    """
    if size is None:
        size = len(next(iter(batch.values()))) * jax.process_count()
    if size % mesh.size == 0:
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    else:
        sharding, batch = replicated(mesh), _all_rows(batch, size)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def _all_rows(batch: HostBatch, size: int) -> HostBatch:
    """The rows of all processes, whose numbers may differ by one."""
    count = jax.process_count()
    if count == 1:
        return batch
    most = -(-size // count)
    padded = {name: np.pad(x, [(0, most - len(x))] + [(0, 0)] * (x.ndim - 1)) for name, x in batch.items()}
    gathered = multihost_utils.process_allgather(padded)
    cuts = [size * process // count for process in range(count + 1)]
    return {name: np.concatenate([x[p, : cuts[p + 1] - cuts[p]] for p in range(count)]) for name, x in gathered.items()}


@functools.cache
def compiler_options() -> dict[str, str]:
    """XLA options for a training step; none but on a CPU.

    There reductions (batch norm's, above all) go to XLA's library of fused loops, which uses all cores. Of
    its other kinds, products gain nothing here, and elementwise ones copy what a loop updates in place. A
    jaxlib without the option goes on as it is, and so does a user who sets it in XLA_FLAGS.
    """
    name = "xla_cpu_experimental_ynn_fusion_type"
    if jax.default_backend() != "cpu" or name in os.environ.get("XLA_FLAGS", ""):
        return {}
    options = {name: "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step compiled for a mesh: (state, this process's rows, rows of the global batch) → (state, metrics).

    The old state's memory is given to the new one. A batch that doesn't split evenly over devices and
    sub-batches (the last of an epoch may not) is computed whole by each device.

    Attributes:
      mesh: the devices.
      sub_batches: of the step.
      one_program: for the whole batch, which XLA splits.
      split_program: for one device's part of it; None to leave the splitting to XLA.
      place_parts: puts a batch where `split_program` wants it.
    """

    mesh: Mesh
    sub_batches: int
    one_program: Any
    split_program: Any
    place_parts: Callable[[HostBatch], Any]

    def __call__(self, state: Any, batch: HostBatch, size: int) -> tuple[Any, dict[str, jax.Array]]:
        """Trains on a batch."""
        program, placed = self._choose(batch, size)
        state, metrics = program(state, placed)
        if jax.process_count() > 1:
            state = jax.tree.map(self._on_all_devices, state)
        return state, metrics

    def _on_all_devices(self, array: jax.Array) -> jax.Array:
        """An array as one over the whole mesh: pmap gives each process one over its own devices."""
        if array.sharding.device_set == set(self.mesh.devices.flat):
            return array
        copies = [shard.data for shard in array.addressable_shards]
        return jax.make_array_from_single_device_arrays(array.shape, replicated(self.mesh), copies)

    def lower(self, state: Any, batch: HostBatch, size: int) -> Any:
        """The program for such a batch, as `jax.jit(…).lower` gives it."""
        program, placed = self._choose(batch, size)
        return program.lower(state, placed)

    def _choose(self, batch: HostBatch, size: int) -> tuple[Any, Any]:
        if self.split_program is not None and size % (self.mesh.size * self.sub_batches) == 0:
            return self.split_program, self.place_parts(batch)
        return self.one_program, place_batch(batch, self.mesh, size)


def compile_train_step(
    make_step: Callable[[str | None], Callable],
    mesh: Mesh,
    shardings: Any,
    *,
    mode: str = "jit",
    per_device_bn: bool = False,
    sub_batches: int = 1,
) -> TrainStep:
    """Compiles a training step for a mesh, with its first call.

    Args:
      make_step: axis name → step (state, batch) → (state, metrics): for one part of a batch that is
        split over that axis, or, with None, for all of it.
      mesh: the devices.
      shardings: of the state (`state_shardings`).
      mode: `jit` or `pmap`.
      per_device_bn: whether the model that `make_step` makes for an axis normalises by each device's own
        moments; in mode `jit` it then runs under shard_map.
      sub_batches: of the step.
    """
    out_shardings = (shardings, replicated(mesh))
    one_program = jax.jit(
        make_step(None), donate_argnums=0, out_shardings=out_shardings, compiler_options=compiler_options()
    )
    split_program, place_parts = None, functools.partial(place_batch, mesh=mesh)
    if mode == "pmap":
        devices = list(mesh.devices.flat)
        split_program = jax.pmap(
            make_step(AXIS), AXIS, in_axes=(None, 0), out_axes=(None, None), donate_argnums=0, devices=devices
        )
        local = sum(device.process_index == jax.process_index() for device in devices)
        place_parts = functools.partial(_split_rows, parts=local)
    elif per_device_bn:
        parts, whole = PartitionSpec(AXIS), PartitionSpec()
        mapped = jax.shard_map(make_step(AXIS), mesh=mesh, in_specs=(whole, parts), out_specs=whole, check_vma=False)
        split_program = jax.jit(mapped, donate_argnums=0, out_shardings=out_shardings)
    return TrainStep(mesh, sub_batches, one_program, split_program, place_parts)


def _split_rows(batch: HostBatch, parts: int) -> dict[str, np.ndarray]:
    return {name: x.reshape(parts, -1, *x.shape[1:]) for name, x in batch.items()}


def jit_eval_step(step: Callable, mesh: Mesh) -> Callable:
    """Compiles an evaluation step."""
    return jax.jit(step, out_shardings=replicated(mesh))
