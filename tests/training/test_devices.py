"""Settings of the process; those of CPU devices are tested in tests/parallel."""

import platform
import subprocess
import sys

import pytest

from gmsop_jax.training import devices

_ALLOCATE = """
import ctypes, pathlib
from gmsop_jax.training import devices
{before}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def resident():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024
def kept(megabytes):
    before = resident()
    block = libc.malloc(megabytes << 20)
    ctypes.memset(block, 1, megabytes << 20)
    libc.free(block)
    return resident() - before
print(round(kept(40)), round(kept(150)))
"""


def kept_memory(before: str = "", **environment: str) -> tuple[int, int]:
    """The MiB that a process keeps of freed blocks of 40 and 150 MiB."""
    command = [sys.executable, "-c", _ALLOCATE.format(before=before)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": "", **environment})
    small, large = map(int, done.stdout.split())
    return small, large


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="needs glibc and /proc")
def test_freed_blocks_of_up_to_64_mib_are_kept():
    assert max(kept_memory()) < 4
    small, large = kept_memory("devices.keep_freed_memory()")
    assert 36 <= small <= 44
    assert large < 4
    assert max(kept_memory("devices.keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")) < 4


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    libraries = []
    monkeypatch.setattr(devices.os, "environ", {})
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: libraries.append(name) or object())
    devices.keep_freed_memory()
    assert libraries == [None]
