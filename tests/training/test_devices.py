"""Settings of the process; those of CPU devices are tested in tests/parallel."""

import platform
import subprocess
import sys

import pytest

from gmsop_jax.training import devices

_ALLOCATE = """
import concurrent.futures, ctypes, pathlib
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
with concurrent.futures.ThreadPoolExecutor(1) as thread:
    print(round(kept(60)), round(thread.submit(kept, 60).result()), round(kept(150)))
"""


def kept_memory(before: str = "", **environment: str) -> list[int]:
    """The MiB that a process keeps of freed blocks of 60, 60 (in a thread) and 150 MiB."""
    command = [sys.executable, "-c", _ALLOCATE.format(before=before)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={"PATH": "", **environment})
    return list(map(int, done.stdout.split()))


def has_new_glibc() -> bool:
    name, version = platform.libc_ver()
    return sys.platform == "linux" and name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)


@pytest.mark.skipif(not has_new_glibc(), reason="needs glibc 2.35 and /proc")
def test_freed_blocks_of_up_to_64_mib_are_kept():
    assert max(kept_memory()) < 4
    small, in_thread, large = kept_memory("devices.keep_freed_memory()")
    assert 56 <= small <= 64
    assert 56 <= in_thread <= 64
    assert large < 4
    assert max(kept_memory("devices.keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")) < 4


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    libraries = []
    monkeypatch.setattr(devices.os, "environ", {})
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: libraries.append(name) or object())
    devices.keep_freed_memory()
    assert libraries == [None]


def test_a_c_library_that_refuses_the_limit_keeps_its_defaults(monkeypatch):
    calls = []

    class OldGlibc:
        def mallopt(self, parameter: int, value: int) -> int:
            calls.append(parameter)
            return 0

    monkeypatch.setattr(devices.os, "environ", {})
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: OldGlibc())
    devices.keep_freed_memory()
    assert calls == [-3]
