"""Errors that a user can mend: `main` and the tools print their message alone, with no traceback."""

import errno
import os


class UserError(Exception):
    """Something the user gave is wrong; the message says what, with its value, and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration field is unknown, of the wrong type, or doesn't fit the others."""


class DataError(UserError, ValueError):
    """A data set, shard, record or source file is missing, foreign or damaged."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or working directory is missing, damaged or doesn't fit."""


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
