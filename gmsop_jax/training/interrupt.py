"""Stopping a run from outside, with nothing lost."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from gmsop_jax.errors import UserError

START_ME_AGAIN = 75  # EX_TEMPFAIL: exit status after SIGTERM, for schedulers that restart


class Interrupted(UserError):
    """The run was asked to stop; it saved its state first.

    Attributes:
      status: exit status that tells why: 130 for Ctrl-C, 75 ("start me again") for SIGTERM.
    """

    def __init__(self, signum: int, step: int):
        name = signal.Signals(signum).name
        super().__init__(f"stopped by {name} at step {step}, saved; the same command goes on from there")
        self.status = 130 if signum == signal.SIGINT else START_ME_AGAIN


class SignalCatcher:
    """While entered, Ctrl-C and SIGTERM (a pre-emption notice) are noted instead of raised; a second one is raised.

    Where a run has several processes, a signal to any of them stops all after the same step: JAX's
    coordination service takes SIGTERM, and Ctrl-C is passed on to it. Outside the main thread, where
    Python allows no handlers, a run of one process notes nothing.
    """

    def __init__(self):
        self._caught: int | None = None
        self._several = jax.process_count() > 1
        self._old = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def caught(self, step: int) -> int | None:
        """The signal after which to stop at this step, or None; to be asked once a step."""
        if self._several:
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
        return self._caught

    def _handle(self, signum, frame):
        if self._caught is not None:
            raise KeyboardInterrupt
        self._caught = signum
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
