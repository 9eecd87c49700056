"""Stopping a run from outside, with nothing lost."""

import signal
import threading

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
    """While entered, Ctrl-C and SIGTERM are noted in `caught` instead of raised; a second one is raised.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """

    def __init__(self):
        self.caught: int | None = None
        self._old = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._old[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(self, *_):
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _handle(self, signum, frame):
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = signum
