"""Settings of the process: the number of CPU devices, the cache of compiled programs, and the use of freed memory."""

import contextlib
import ctypes
import math
import os
import platform
from importlib.metadata import entry_points
from importlib.util import find_spec

import jax

from gmsop_jax.config import ConfigDict

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # parameters of glibc's mallopt, from malloc.h
MIN_ROWS_PER_DEVICE = 16  # on a CPU; with fewer rows, splitting the batch takes more time than it saves


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
    """Lets this process keep the memory that a step frees, for the next step, if JAX runs on a CPU under glibc.

    In each step, XLA allocates the temporary memory of the program in one piece. From 32 MiB on, glibc takes it from
    the operating system and returns it afterwards, so that every page is cleared again in every step. This uses one
    pool of memory for all threads, because the other pools of glibc are limited to 64 MiB. Threads that already exist
    keep their pool, so it has little effect after JAX has initialised its devices.

    It does nothing if a JAX plugin for accelerators is installed and `JAX_PLATFORMS` is not `cpu`, or if the
    environment sets one of glibc's variables `MALLOC_…` or `GLIBC_TUNABLES`.
    """
    chosen = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if chosen or not _only_cpu() or platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_ARENA_MAX, 1)
    for threshold in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        mallopt(threshold, 2**31 - 1)


def _only_cpu() -> bool:
    """Whether JAX will use the CPU, as far as this is known before it initialises its devices."""
    platforms = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    if platforms:
        return platforms == "cpu"
    return not (find_spec("jax_plugins") or find_spec("libtpu") or entry_points(group="jax_plugins"))
