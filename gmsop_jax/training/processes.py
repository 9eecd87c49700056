"""The processes of one run: they start together, check that they agree, and end together.

They exchange values through the key-value store of JAX's coordination service. It works before any device is used, and
even if the processes disagree.
"""

import atexit
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed  # JAX has no public access to its key-value store

from gmsop_jax.errors import ConfigError, UserError

JOIN_SECONDS = 40  # time limit for all processes to start and find each other
ANSWER_SECONDS = 60  # time limit for each exchange of values
HEARTBEAT_SECONDS = 20  # after this time without a heartbeat, JAX considers a process dead and ends the others
SHUTDOWN_SECONDS = 30  # time limit for all processes to reach the end
_POLL_SECONDS = 0.5
_ACTION_SECONDS = 7 * 24 * 3600  # the first process may convert a data set; if it fails, the others end immediately
_FAILURES = "gmsop_jax/failures/"

_exchanges = itertools.count()
_failed = threading.Event()


def start_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of one run; must be called before anything else uses a device.

    Args:
      coordinator: `host:port` of the first process; `auto` asks the cluster (SLURM, Open MPI,
        Kubernetes, TPU pods); None for a run of a single process.
      num_processes, process_id: required with an address; with `auto`, the cluster provides them.

    Raises:
      ConfigError: if the arguments contradict each other, the port is in use, or JAX can't join the processes. If
        they don't find each other within `JOIN_SECONDS`, the process ends with the same message and status 2.
    """
    if coordinator is None:
        if num_processes is not None or process_id is not None:
            raise ConfigError(
                "--num-processes and --process-id need --coordinator host:port, the address of the first process"
            )
        return
    address = None if coordinator == "auto" else coordinator
    if address is not None:
        port = address.rpartition(":")[2]
        if not port.isdigit():
            raise ConfigError(
                f"--coordinator {coordinator} has no port; give host:port, such as 10.0.0.1:1234, or auto"
            )
        _check_numbers(num_processes, process_id)
        if process_id == 0:
            _check_port(coordinator, int(port))
    timer = threading.Timer(JOIN_SECONDS, _give_up_joining)  # at its own limit, JAX aborts with a stack trace
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=JOIN_SECONDS + 10,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(_not_joined(error)) from error
    finally:
        timer.cancel()
    stopped = threading.Event()
    atexit.register(_leave, stopped)  # runs before JAX's own handler, which was registered earlier
    threading.Thread(target=_watch, args=(_client(), stopped), name="failures of other processes", daemon=True).start()


def first_process_does(action: Callable[[], object]) -> None:
    """Runs an action in the first process while the others wait; if it fails there, all processes end.

    Raises:
      Exception: what the action raises, in the first process.
    """
    if jax.process_count() == 1:
        action()
        return
    key = f"gmsop_jax/done/{next(_exchanges)}"
    if jax.process_index() == 0:
        with ending_together():
            action()
        _client().key_value_set(key, "done")
    else:
        _client().blocking_key_value_get(key, _ACTION_SECONDS * 1000)


def check_same(values: Mapping[str, object]) -> None:
    """Checks that all processes of a run have the same values, which are given by name.

    Raises:
      ConfigError: in all processes, if a value differs from that of the first process; the message states both.
      UserError: if a process does not answer within `ANSWER_SECONDS`.
    """
    if jax.process_count() == 1:
        return
    number = next(_exchanges)
    here = {name: repr(value) for name, value in values.items()}
    _client().key_value_set(f"gmsop_jax/values/{number}/{jax.process_index()}", json.dumps(here))
    everywhere = [_read_values(number, index) for index in range(jax.process_count())]
    for index, there in enumerate(everywhere):
        for name in everywhere[0] | there:
            first, other = (found.get(name, "absent") for found in (everywhere[0], there))
            if first != other:
                raise ConfigError(
                    f"the processes of this run differ: {name} is {first} in process 0 and {other} in process {index};"
                    " start all of them with the same version, configuration, data and --workdir"
                )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes of a run if one of them fails inside this context, or has ended. Uses no device."""
    try:
        yield
    except BaseException as error:
        if distributed.global_state.num_processes == 1 or getattr(error, "saved", False):
            raise
        if isinstance(error, UserError):
            _report_failure(str(error))
            raise
        time.sleep(4 * _POLL_SECONDS)  # meanwhile, `_watch` reports the error of another process that failed first
        first_line = str(error).strip().partition("\n")[0]
        _report_failure(f"{type(error).__name__}: {first_line}")
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise UserError(
                f"another process of this run has ended or can't be reached ({first_line}); start all of them again to"
                " resume from the last checkpoint"
            ) from error
        raise


def _check_numbers(num_processes: int | None, process_id: int | None) -> None:
    if num_processes is None or process_id is None:
        raise ConfigError("--coordinator host:port needs --num-processes and --process-id, which is counted from 0")
    if num_processes < 1:
        raise ConfigError(f"--num-processes must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process-id must be from 0 to {num_processes - 1} with --num-processes {num_processes}, got {process_id}"
        )


def _check_port(coordinator: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"--coordinator {coordinator}: port {port} can't be used ({error}); choose another port"
            ) from error


def _not_joined(reason: object) -> str:
    return (
        f"the processes of this run can't be joined ({reason}); give --coordinator host:port, reachable from all of"
        " them, --num-processes and --process-id (counted from 0), or --coordinator auto on a cluster that JAX supports"
    )


def _give_up_joining() -> None:
    _exit(_not_joined(f"some of them did not start within {JOIN_SECONDS} s"))


def _exit(message: str) -> None:
    """Ends this process from a thread, while the main one may be waiting inside JAX."""
    print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(2)


def _client() -> Any:
    return distributed.global_state.client


def _read_values(number: int, index: int) -> dict[str, str]:
    try:
        text = _client().blocking_key_value_get(f"gmsop_jax/values/{number}/{index}", ANSWER_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"process {index} of this run did not answer within {ANSWER_SECONDS} s; start all processes again to resume"
        ) from error
    return json.loads(text)


def _report_failure(message: str) -> None:
    if _failed.is_set():
        return
    _failed.set()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first process, which keeps the store, is gone
        _client().key_value_set(f"{_FAILURES}{jax.process_index()}", message)


def _watch(client: Any, stopped: threading.Event) -> None:
    """Ends this process if another one has reported a failure."""
    while not stopped.wait(_POLL_SECONDS) and not _failed.is_set():
        try:
            failures = client.key_value_dir_get(_FAILURES)
        except jax.errors.JaxRuntimeError:  # the first process is gone: JAX itself ends this one
            return
        if failures and not _failed.is_set():
            key, message = failures[0]
            _exit(f"process {key.removeprefix(_FAILURES)} of this run failed: {message}")


def _leave(stopped: threading.Event) -> None:
    """Runs at exit. After a failure, skips JAX's shutdown, which would wait for processes that have already ended."""
    stopped.set()
    if _failed.is_set():
        if distributed.global_state.process_id == 0:
            time.sleep(4 * _POLL_SECONDS)  # until the others have read the failure from this process's store
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)
