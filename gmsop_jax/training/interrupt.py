"""Stops a run after a signal, once its state has been saved."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, TextIO

import jax
from jax.experimental import multihost_utils

from gmsop_jax.errors import UserError, raise_if_stopped

_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
RESTART_STATUS = os.EX_TEMPFAIL  # 75: exit status after SIGTERM and SIGHUP, after which schedulers restart a job


class Interrupted(UserError):
    """The run was stopped by a signal, and has saved its state.

    Attributes:
      status: exit status, 130 after Ctrl-C and 75 (restart) after SIGTERM and SIGHUP; always 75 in a run of several
        processes.
    """

    saved = True  # `ending_together` does not treat it as a failure, because all processes stop after the same step

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at step {step}, which is saved; run the same command again to resume")
        self.status = 130 if signum == signal.SIGINT else RESTART_STATUS


class SignalCatcher:
    """Context manager that catches Ctrl-C, SIGTERM (a preemption notice) and SIGHUP, so that a run can save its state.

    A second signal, except SIGHUP, raises KeyboardInterrupt. In a run of several processes, a signal to any of them
    stops all processes after the same step: JAX's coordination service handles SIGTERM, and the other signals are
    passed on to it as SIGTERM. A signal that was already ignored, such as SIGHUP under nohup, is still ignored. Outside
    the main thread, where Python allows no signal handlers, no signal is caught.
    """

    def __init__(self):
        self._caught: int | None = None
        self._several = jax.process_count() > 1
        self._old = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            raise_if_stopped()
            for signum in _SIGNALS[: 2 if self._several else 3]:
                if signal.getsignal(signum) != signal.SIG_IGN:
                    self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def caught(self, step: int) -> int | None:
        """Returns the signal that stops the run after this step, or None; must be called at every step."""
        if self._several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._caught

    def _handle(self, signum, frame):
        if self._caught is not None:
            if signum == signal.SIGHUP:
                return  # when a terminal is closed, a sweep receives it too and passes it on
            raise KeyboardInterrupt
        self._caught = signum
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def tolerating_closed_streams() -> Iterator[None]:
    """Lets a run continue after its standard output or error was closed, for example by `| head`."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as null:
        sys.stdout, sys.stderr = (_TolerantStream(stream or null) for stream in before)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before


class _TolerantStream:
    """Writes text to a stream; once writing fails, discards all further text."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._discarding_on_failure():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._discarding_on_failure():
            self._stream.flush()

    @contextlib.contextmanager
    def _discarding_on_failure(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
