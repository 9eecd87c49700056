"""Errors that a user can fix, which `main` and the tools report in one line, without a traceback."""

import argparse
import contextlib
import difflib
import errno
import io
import itertools
import os
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import TextIO


class UserError(Exception):
    """An error that the user can fix. The message states what is wrong, with its value, and how to fix it.

    Attributes:
      status: the exit status of a command that ends with this error.
    """

    status = 2


class ConfigError(UserError, ValueError):
    """A configuration field is unknown, has a wrong type or value, or does not fit another field."""


class DataError(UserError, ValueError):
    """A data set, shard, record or source file is missing, damaged, or not in the expected format."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or working directory is missing or damaged, or does not fit the run."""


class FileAccessError(UserError):
    """A file can't be opened or read, for example because of its permissions; its contents may be intact.

    It is not a DataError, because `data.on_corrupt=skip` must not skip it, and not an OSError, because training reports
    an OSError as a failure of the working directory.
    """

    @classmethod
    def from_os_error(cls, path: str | os.PathLike[str], error: OSError) -> "FileAccessError":
        """Creates the error for an OSError: its message states the file, the reason and the remedy."""
        remedy = {
            errno.EMFILE: "; raise the limit of open files (ulimit -n)",
            errno.ENFILE: "; too many files are open on this machine: close other programs, or raise fs.file-max",
            errno.EACCES: "; check the permissions of the file and of the folders above it",
        }
        return cls(f"{os.fspath(path)} can't be read: {reason(error)}{remedy.get(error.errno or 0, '')}")


def reason(error: Exception) -> str:
    """Returns the operating system's message for an OSError, and the message of any other error."""
    return getattr(error, "strerror", None) or str(error)


def did_you_mean(name: str, known: Iterable[str], *, limit: int = 1, quote: bool = False, otherwise: str = "") -> str:
    """Suggests up to `limit` similar names, or returns `otherwise` (by default, a list of the known names).

    Example:
      >>> did_you_mean("bacth_size", ["batch_size", "seed"])
      'did you mean batch_size?'
      >>> did_you_mean("x", ["batch_size", "seed"])
      'known names are batch_size, seed'
    """
    names = {name: f"{name!r}" if quote else name for name in known}
    if close := difflib.get_close_matches(name, names, limit):
        return f"did you mean {' or '.join(names[match] for match in close)}?"
    return otherwise or f"known names are {', '.join(names.values())}"


class ArgumentParser(argparse.ArgumentParser):
    """Parses a command line. Raises UserError for a mistake, and suggests the flag that was probably meant.

    Args:
      takes_overrides: whether to accept `--config.field=value`, returned as `overrides`, a list of `field=value`.
      **options: passed to `argparse.ArgumentParser`.
    """

    def __init__(self, *, takes_overrides: bool = False, **options):
        super().__init__(allow_abbrev=False, **options)
        self._takes_overrides = takes_overrides

    def parse_args(self, args: Iterable[str] | None = None, namespace=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the options. Raises UserError for an unknown flag or an invalid value."""
        args = sys.argv[1:] if args is None else list(args)
        overrides = [item for item in args if self._takes_overrides and item.startswith("--config.")]
        rest = [item for item in args if item not in overrides]
        for item in overrides:
            if "=" not in item:
                self.error(f"{item} needs a value: {item}=…")
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for item in itertools.takewhile(lambda item: item != "--", rest):
            name = item.partition("=")[0]
            if name.startswith("--") and name not in flags:
                self.error(f"unrecognized argument {item}; {did_you_mean(name, flags)}")
        options = super().parse_args(rest, namespace)
        if self._takes_overrides:
            options.overrides = [item.removeprefix("--config.") for item in overrides]
        return options

    def error(self, message: str):
        """Raises the UserError."""
        raise UserError(f"{message} (see {self.prog} --help)")


def run_command(command: Callable[[], int | None]) -> int:
    """Runs a command. An error that the user can fix is printed in one line on standard error.

    Returns: the exit status: what `command` returns, or 0 for None; 2 after a UserError or an OSError; 130 after
      Ctrl-C; 75 (EX_TEMPFAIL: try again) after SIGTERM or SIGHUP.
    """
    output = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    try:
        with _raising_on_signals(_stopped_by), _escaping(output):
            status = command() or 0
            output.flush()
            return status
    except SystemExit as stop:  # argparse, after --help
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader has closed the pipe, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, status = _explain(error, _stopped_by)
        if not message:
            raise
        if _stopped_by:
            _cancel_timers()
        print(f"error: {message}", file=sys.stderr)
        return status
    finally:
        _stopped_by.clear()


@contextlib.contextmanager
def _escaping(output: TextIO) -> Iterator[None]:
    """Escapes what the output can't encode, such as "±" in ASCII, or the name of a file that is not UTF-8."""
    if not isinstance(output, io.TextIOWrapper):  # as in a notebook
        yield
        return
    errors = output.errors
    output.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        output.reconfigure(errors=errors)


_stopped_by: list[int] = []  # the signals that stopped the running command


def raise_if_stopped() -> None:
    """Raises KeyboardInterrupt again if a library suppressed the one that a signal raised."""
    if _stopped_by:
        raise KeyboardInterrupt


_STATUS = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: os.EX_TEMPFAIL, signal.SIGHUP: os.EX_TEMPFAIL}


def _explain(error: BaseException, stopped_by: list[int]) -> tuple[str, int]:
    """Returns the line to print and the exit status; the line is empty for an unexpected error."""
    if stopped_by:  # checked first, because another library may have turned the KeyboardInterrupt into another error
        signum = signal.Signals(stopped_by[0])
        return f"stopped by {'Ctrl-C' if signum == signal.SIGINT else signum.name}", _STATUS[signum]
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C", _STATUS[signal.SIGINT]
    if isinstance(error, UserError):
        return str(error), error.status
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, UserError.status
    return "", 1


@contextlib.contextmanager
def _raising_on_signals(caught: list[int]) -> Iterator[None]:
    """Lets Ctrl-C, SIGTERM and SIGHUP raise KeyboardInterrupt, and adds the signal to `caught`.

    A signal that was ignored before, as SIGHUP is under nohup, is still ignored. Outside the main thread, Python allows
    no signal handlers. While a module is being imported, a signal is postponed, because an exception can crash the
    initialisation of a C extension. A signal is sent again if Python ignored the exception, as it does in destructors
    and in callbacks of the garbage collector, such as the one that JAX registers.
    """

    def repeat(signum: int) -> None:
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signum))
        timer.daemon = True
        timer.start()

    def stop(signum, frame):
        if _is_importing(frame):
            repeat(signum)
        else:
            caught.append(signum)
            raise KeyboardInterrupt

    def repeat_ignored(unraisable):
        lost = caught and isinstance(unraisable.exc_value, KeyboardInterrupt)
        if lost and signal.getsignal(caught[-1]) is stop:  # the command is still running
            repeat(caught.pop())
        else:
            unraisable_hook(unraisable)

    usual = (signal.SIG_DFL, signal.default_int_handler)
    before = {signum: handler for signum in _STATUS if (handler := signal.getsignal(signum)) in usual}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    for signum in before:
        signal.signal(signum, stop)
    unraisable_hook, sys.unraisablehook = sys.unraisablehook, repeat_ignored
    try:
        yield
    finally:
        if sys.unraisablehook is repeat_ignored:  # otherwise, keep the hook that was installed since
            sys.unraisablehook = unraisable_hook
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _cancel_timers() -> None:
    """Cancels timers of interrupted code, such as JAX's 60-second timer, because Python waits for them at exit."""
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.cancel()


def _is_importing(frame: types.FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None
