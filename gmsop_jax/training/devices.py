"""Settings of the process: the number of CPU devices, the cache of compiled programs, and the memory allocator."""

import contextlib
import ctypes
import math
import os

import jax

from gmsop_jax.config import ConfigDict

MIN_ROWS_PER_DEVICE = 16  # on a CPU; with fewer rows, splitting the batch takes more time than it saves
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt


def num_cpu_devices(config: ConfigDict, cores: int) -> int:
    """Returns the number of JAX devices to split a CPU into.

    This is `config.parallel.cpu_devices`. If that is 0, it is the largest number, at most one per core, for which all
    batches divide evenly over the devices, with at least `MIN_ROWS_PER_DEVICE` rows for each device.
    """
    if config.parallel.cpu_devices:
        return config.parallel.cpu_devices
    t = config.train
    rows = t.batch_size // t.sub_batches // (2 if t.mixup_alpha else 1), config.eval.batch_size  # mixup needs pairs
    largest = min(cores, min(rows) // MIN_ROWS_PER_DEVICE)
    return max((n for n in range(1, largest + 1) if math.gcd(*rows) % n == 0), default=1)


def use_cpu_devices(config: ConfigDict) -> None:
    """Splits the CPU into `num_cpu_devices` JAX devices. Has no effect once JAX has initialised its devices.

    XLA runs much of a small network on a single core of each device, so one device per core makes use of all cores.
    A device that waits for the others occupies one of XLA's threads, so the thread pool is enlarged by the number of
    devices: otherwise an operation that needs further threads, such as an eigendecomposition, might never finish.

    The environment variables `XLA_FLAGS`, `JAX_NUM_CPU_DEVICES` and `PJRT_NPROC` take precedence.
    """
    if "JAX_NUM_CPU_DEVICES" in os.environ or "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = os.cpu_count() or 1
    count = num_cpu_devices(config, cores)
    with contextlib.suppress(RuntimeError):  # JAX is already initialised, as in a notebook, and keeps its devices
        jax.config.update("jax_num_cpu_devices", count)
        if count > 1:
            os.environ.setdefault("PJRT_NPROC", str(cores + count))


def use_compilation_cache() -> None:
    """Keeps compiled programs for later runs in JAX_COMPILATION_CACHE_DIR, or in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not jax.config.jax_compilation_cache_dir and os.path.isabs(cache):  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", os.path.join(cache, "gmsop_jax"))


def keep_freed_memory() -> None:
    """Lets glibc keep freed blocks of up to 64 MiB for the next allocation.

    On a CPU, XLA allocates the temporary memory of a program in one block at each call. By default, glibc returns
    blocks of more than 32 MiB to the operating system, which clears every page of the next one. The limit is 64 MiB
    because larger blocks do not fit into the heaps of glibc's threads.

    Has no effect with glibc before 2.35 or another C library, or if the environment configures glibc's allocator.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt, or under Windows no CDLL(None)
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(_M_MMAP_THRESHOLD, 64 << 20):  # glibc before 2.35 refuses more than 32 MiB
            mallopt(_M_TRIM_THRESHOLD, 128 << 20)
