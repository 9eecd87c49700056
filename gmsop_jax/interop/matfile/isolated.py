"""Calls functions in a process of their own: on damaged files, HDF5 and SciPy can crash, hang or exhaust memory.

One server process, started at the first call, forks for each call: a call takes milliseconds and can't affect the
next one. The server ends with the process that started it.
"""

import atexit
import contextlib
import functools
import os
import pathlib
import pickle
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from gmsop_jax.errors import UserError
from gmsop_jax.files import Budget

SECONDS, BYTES_PER_SECOND = 30, 2**22  # reading a file may take SECONDS + its size / BYTES_PER_SECOND
_MAX_REQUEST_BYTES = 2**16
_ONE_CALL = threading.Lock()


def call_limited(function: Callable[..., Any], path: pathlib.Path, *arguments: Any) -> Any:
    """Returns `function(path, budget, *arguments)`, with limits that fit the file size. Raises as `call` does."""
    size = path.stat().st_size
    budget = Budget(size)
    seconds = SECONDS + size / BYTES_PER_SECOND
    memory_bytes = 4 * budget.bytes  # with copies in other types and orders
    return call(function, path.absolute(), budget, *arguments, seconds=seconds, memory_bytes=memory_bytes)


def call(function: Callable[..., Any], *arguments: Any, seconds: float, memory_bytes: int) -> Any:
    """Returns `function(*arguments)`, computed in another process.

    Args:
      function: a function of a module, which is pickled by its name.
      *arguments: small values that can be pickled.
      seconds: the time limit.
      memory_bytes: number of bytes that the function may allocate; limited on Linux only.

    Raises:
      UserError: if the function raises one.
      ValueError: if the function raises another exception, exceeds a limit, or crashes the process.
    """
    request = pickle.dumps((function, arguments, seconds, memory_bytes))
    with _ONE_CALL:
        try:
            value, error, status = _exchange(request)
        except BaseException:
            _stop_server()  # its answer may still arrive, and must not be mistaken for that of the next call
            raise
    if os.waitstatus_to_exitcode(status) == -signal.SIGALRM:
        raise ValueError(f"the reader did not finish within {seconds:.0f} seconds")
    if status:
        raise ValueError(f"the reader crashed with exit code {os.waitstatus_to_exitcode(status)}")
    if error is not None:
        raise error
    return value


def _exchange(request: bytes) -> tuple[Any, Exception | None, int]:
    """Sends a request to the server; returns the value, the error and the exit status of the process that answers."""
    reading, writing = os.pipe()
    with open(reading, "rb") as answer:
        try:
            connection = _send(request, writing)
        finally:
            os.close(writing)
        try:
            value, error = pickle.load(answer)
        except (EOFError, pickle.UnpicklingError):  # the process ended early; its status says why
            value = error = None
    status = b""
    with contextlib.suppress(ConnectionError):
        status = connection.recv(4)
    if not status:
        raise ValueError("the process that reads MATLAB files could not be started or was killed")
    return value, error, int.from_bytes(status, "little")


def _send(request: bytes, writing: int) -> socket.socket:
    """Sends a request and the descriptor for its answer; returns the connection."""
    try:
        connection = _server(os.getpid())[1]
        socket.send_fds(connection, [request], [writing])
    except BrokenPipeError:  # the server was killed since the last call
        _stop_server()
        connection = _server(os.getpid())[1]
        socket.send_fds(connection, [request], [writing])
    return connection


@functools.lru_cache(maxsize=1)
def _server(pid: int) -> tuple[subprocess.Popen, socket.socket]:
    """Starts the server of the process `pid`; a forked process does not share that of its parent."""
    ours, theirs = socket.socketpair()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from {__name__} import serve; serve()"]
    with theirs:  # a process group of its own, because Ctrl-C is handled by this process
        return subprocess.Popen(command, stdin=theirs.fileno(), env=environment, process_group=0), ours


@atexit.register
def _stop_server() -> None:
    if _server.cache_info().currsize:
        process, connection = _server(os.getpid())
        connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and the process that it forked for a call
        process.wait()
        _server.cache_clear()


def serve() -> None:
    """Runs in the server: answers requests until the other end of the connection is closed."""
    with socket.socket(fileno=sys.stdin.fileno()) as connection:
        while True:
            request, descriptors, _, _ = socket.recv_fds(connection, _MAX_REQUEST_BYTES, 1)
            if not request:
                return
            function, arguments, seconds, memory_bytes = pickle.loads(request)
            child = os.fork()
            if not child:
                _answer(function, arguments, seconds, memory_bytes, descriptors[0])
            os.close(descriptors[0])
            _, status = os.waitpid(child, 0)
            connection.sendall(status.to_bytes(4, "little"))


def _answer(
    function: Callable[..., Any], arguments: tuple[Any, ...], seconds: float, memory_bytes: int, descriptor: int
) -> None:
    """Computes one value or error, writes it to a descriptor, and ends this process."""
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # the libraries and malloc report damage there
        signal.setitimer(signal.ITIMER_REAL, seconds)  # without a handler, the signal ends the process
        _limit_memory(memory_bytes)
        try:
            result = function(*arguments), None
        except UserError as error:
            result = None, error
        except ValueError as error:
            result = None, ValueError(str(error))
        except Exception as error:  # damaged files make the readers raise exceptions of many types
            result = None, ValueError(f"{type(error).__name__}: {error}")
        with open(descriptor, "wb") as answer:
            pickle.dump(result, answer, protocol=5)
        status = 0
    finally:
        os._exit(status)


def _limit_memory(num_bytes: int) -> None:
    if sys.platform == "linux":
        used = int(pathlib.Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = used + num_bytes if hard == resource.RLIM_INFINITY else min(hard, used + num_bytes)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
