"""Errors that a user can fix. `main` and the tools print their message only, without a traceback."""

import difflib
import errno
import os
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user provided is wrong. The message says what, with its value, and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration field is unknown, has a wrong type or value, or does not fit another field."""


class DataError(UserError, ValueError):
    """A data set, shard, record or source file is missing, foreign or damaged."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or working directory is missing or damaged, or does not fit the run."""


class FileAccessError(UserError):
    """The system refuses to open or read a file; what the file holds may be perfectly fine.

    It is neither a DataError, which `data.on_corrupt=skip` may skip, nor an OSError, which is blamed on the working
    directory.
    """

    @classmethod
    def from_os_error(cls, path: str | os.PathLike[str], error: OSError) -> "FileAccessError":
        """Names the file, the system's reason, and what to do about it."""
        remedy = {
            errno.EMFILE: "; raise the limit of open files (ulimit -n)",
            errno.ENFILE: "; the machine's limit of open files is reached",
            errno.EACCES: "; check the permissions of the file and of the folders above it",
        }
        reason = error.strerror or str(error)
        return cls(f"{os.fspath(path)} can't be read: {reason}{remedy.get(error.errno or 0, '')}")


def did_you_mean(name: str, known: Iterable[str], *, quote: bool = False, otherwise: str = "") -> str:
    """Suggests the known name that is most similar; without one, returns `otherwise` or lists all known names.

    Example:
      >>> did_you_mean("bacth_size", ["batch_size", "seed"])
      'did you mean batch_size?'
      >>> did_you_mean("x", ["batch_size", "seed"])
      'known names are batch_size, seed'
    """
    names = {name: f"{name!r}" if quote else name for name in known}
    if close := difflib.get_close_matches(name, names, 1):
        return f"did you mean {names[close[0]]}?"
    return otherwise or f"known names are {', '.join(names.values())}"
