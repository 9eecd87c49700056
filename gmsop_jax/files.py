"""Files: atomic writes, JSON, checksums, memory limits, and locks."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import socket
import stat
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gmsop_jax.errors import FileAccessError, UserError

CHECKSUMS = "checksums.json"
_MAX_CHECKSUMS_BYTES = 2**24  # some 100,000 entries
_FREE_BYTES = 2**27
_MAX_EXPANSION = 64  # decompression enlarges parameters and images less than 2 times, arrays of zeros up to 1,000 times
_MAX_NODES = 1_000_000  # a checkpoint of the authors' largest network has some 20,000
_MAX_TEXT = 2**20
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a regular file for reading. Raises OSError for anything else: opening a named pipe could block forever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(path, "rb")


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the contents of a regular file. Raises OSError like `open_file`."""
    with open_file(path) as file:
        return file.read()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on leaving, flushes that file to disk and renames it to `path`.

    Readers see either the old file or the whole new one. If the block raises, the temporary file is removed. Its name
    is `<name>.tmp-<pid>`.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the original error is the one to report
            temporary.unlink()
        raise


def remove_temporary_files(folder: Path) -> None:
    """Removes the temporary files of `replacing` that killed processes left in a folder."""
    for file in folder.glob("*.tmp-*"):
        pid = file.name.rpartition("-")[2]
        if pid.isdecimal() and not _is_running(int(pid)):
            file.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file atomically; text is encoded as UTF-8, with escapes (valid in JSON) for names that are not UTF-8."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def write_output(path: Path, content: str) -> None:
    """Writes a file that the user named: atomically, unless it is a link, a pipe or a device.

    `/dev/stdout` is not reopened, because that would truncate a file to which the shell appends the output.
    """
    if path == Path("/dev/stdout"):
        sys.stdout.write(content)
    elif path.is_symlink() or path.is_fifo() or path.is_char_device():
        path.write_text(content, "utf-8", "backslashreplace")
    else:
        write_atomic(path, content)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON atomically."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_object(path: Path, fields: Mapping[str, type], remedy: str) -> dict[str, Any]:
    """Reads a JSON file that contains an object.

    Args:
      fields: the names and types of the required fields. An int is accepted for a float.
      remedy: what to do if the file is damaged, for the error message.

    Raises:
      UserError: if the file is not JSON, or a field is missing or has another type.
      FileAccessError: if the file can't be read.
    """
    try:
        value = json.loads(read_bytes(path))
        if not isinstance(value, dict):
            raise ValueError(f"it contains {json.dumps(value)[:40]} instead of an object")
        for name, kind in fields.items():
            if name not in value:
                raise ValueError(f"it has no {name}")
            if type(value[name]) not in ((int, float) if kind is float else (kind,)):
                raise ValueError(f"its {name} is {json.dumps(value[name])[:40]}")
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    return value


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Raises FileAccessError if the file can't be read."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error


# ---- folders


def write_checksums(folder: Path) -> None:
    """Writes `checksums.json`: the size and SHA-256 of every file in the folder's sub-folders.

    Files directly in the folder are not covered: Orbax still writes to them afterwards.
    """
    write_json(folder / CHECKSUMS, {name: _measure(folder / name) for name in _covered_files(folder)})


def find_damage(folder: Path, below: str = "") -> str | None:
    """Compares a folder, or one of its sub-folders, with its `checksums.json`.

    Args:
      folder: the folder.
      below: the beginning of the names of the files to compare, such as `metrics/`; by default, all are compared.

    Returns: a description of the damage, or None. What can't be verified counts as damaged: a folder without a list
      of checksums, or with an empty one, and a file that is not in the list, unless its name begins with a dot.

    Raises:
      FileAccessError: if an existing file can't be read, which doesn't mean that it is damaged.
    """
    file = folder / CHECKSUMS
    try:
        if file.stat().st_size > _MAX_CHECKSUMS_BYTES:
            return f"{CHECKSUMS} is damaged"
        sums = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(read_bytes(file)).items()}
        sums = {name: value for name, value in sums.items() if name.startswith(below)}
        for name, (size, digest) in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _measure(path) != [size, digest]:
                return f"{name} was changed"
        for name in _covered_files(folder):
            if name.startswith(below) and name not in sums and not Path(name).name.startswith("."):
                return f"{CHECKSUMS} does not list {name}"
    except FileNotFoundError:
        return f"{CHECKSUMS} is missing, so its files can't be verified"
    except OSError as error:
        raise FileAccessError.from_os_error(error.filename or folder, error) from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        return f"{CHECKSUMS} is damaged: {error}"
    return None if sums else f"{CHECKSUMS} lists no files"


def _covered_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("*/**/*") if path.is_file())


def _measure(path: Path) -> list[int | str]:
    return [path.stat().st_size, sha256(path)]


# ---- memory


class Budget:
    """The memory and the number of objects that reading a file may still allocate. Exceeding them raises ValueError.

    Without such limits, a few bytes of a malicious file could allocate gigabytes.
    """

    def __init__(self, file_bytes: int):
        self.bytes = max(_FREE_BYTES, _MAX_EXPANSION * file_bytes)
        self._total = self.bytes
        self._nodes = _MAX_NODES

    def take_bytes(self, count: int) -> None:
        """Accounts for an array in memory."""
        self.bytes -= count
        if self.bytes < 0:
            raise ValueError(f"its arrays claim more than {self._total:,} bytes, too many for a file of its size")

    def take_nodes(self, count: int = 1) -> None:
        """Accounts for arrays, cells and fields of structs."""
        self._nodes -= count
        if self._nodes < 0:
            raise ValueError(f"it has more than {_MAX_NODES:,} cells and fields")

    def check_text(self, count: int) -> None:
        """Checks that a string is short enough to be a name or a note."""
        if count > _MAX_TEXT:
            raise ValueError(f"it has a string of {count:,} characters, more than {_MAX_TEXT:,}")


# ---- locks


class LockHeldError(OSError):
    """Another process holds the lock; the message says which one, as far as it is known."""


class FileLock:
    """A lock between processes, on one machine or several, that ends with the process that holds it.

    It uses the operating system's `flock`. On file systems without it, a second file `<name>.held` that names the
    host and the process is created exclusively, and its modification time is renewed as a heartbeat. Another process
    may take over a lock whose process has ended on the same host, or whose heartbeat has stopped for a minute.

    Attributes:
      note: a sentence for the user if the heartbeat is used; empty otherwise.
    """

    HEARTBEAT_SECONDS = 5
    EXPIRY_SECONDS = 60

    def __init__(self, path: Path):
        self.path = path
        self.note = ""
        self._locked = path  # or the file with the heartbeat
        self._file: int | None = None
        self._released = threading.Event()

    def __enter__(self):
        self.acquire()
        return self

    def __exit__(self, *_):
        self.release()

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          LockHeldError: if another process holds it.
          OSError: if the file can't be written to.
        """
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise LockHeldError(_read_holder(self._file)) from error
                if error.errno not in _NO_FLOCK:
                    raise
                self._acquire_by_heartbeat()
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Releases the lock; does nothing if it isn't held."""
        if self._file is None:
            return
        if self.note:
            self._released.set()
            if self.is_held():
                self._locked.unlink()
            self.note, self._locked = "", self.path
        os.close(self._file)
        self._file = None

    def is_held(self) -> bool:
        """Returns whether the locked file still exists and has not been replaced by another."""
        try:
            return self._file is not None and os.path.samestat(os.stat(self._locked), os.fstat(self._file))
        except OSError:
            return False

    def _acquire_by_heartbeat(self) -> None:
        assert self._file is not None
        os.close(self._file)
        self._file = None
        path = self.path.with_name(f"{self.path.name}.held")
        if path.exists():
            _remove_if_abandoned(path, self.EXPIRY_SECONDS)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise LockHeldError(path.read_text(errors="replace")) from None
        self._locked = path
        self.note = f"this file system does not support locks (flock), so {path} with a heartbeat is used instead"
        self._released.clear()
        threading.Thread(target=self._beat, args=(self._file,), name="lock heartbeat", daemon=True).start()

    def _beat(self, file: int) -> None:
        while not self._released.wait(self.HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file system may be unreachable for a moment
                os.utime(file)


def _read_holder(file: int) -> str:
    return os.pread(file, 200, 0).decode(errors="replace") or "another process"


def _remove_if_abandoned(path: Path, expiry_seconds: float) -> None:
    """Removes a heartbeat file whose process has ended on this host or whose heartbeat has stopped.

    The age of its last heartbeat is measured by the clock of the file system, which is read from a file that is created
    for this purpose. If several processes find the same file abandoned, the one that renames it first removes it.
    """
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        holder, before = path.read_text(errors="replace"), path.stat()
        probe.touch()
        age = probe.stat().st_mtime - before.st_mtime
        probe.unlink()
        words = holder.split()
        here = len(words) == 4 and words[1].isdigit() and words[3] == socket.gethostname()
        if (here and not _is_running(int(words[1]))) or age > expiry_seconds:
            path.rename(probe)
            if not os.path.samestat(probe.stat(), before):  # another process took the lock over in the meantime
                probe.rename(path)
            else:
                probe.unlink()
    except FileNotFoundError:
        return


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):  # OverflowError: no system has such a number
        return False
    except PermissionError:
        pass
    return True
