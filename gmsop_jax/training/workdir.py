"""The working directory of a run, which belongs to one run at a time and to one configuration."""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

import jax

import gmsop_jax
from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.data import manifest
from gmsop_jax.errors import CheckpointError, reason
from gmsop_jax.files import FileLock, LockHeldError, read_bytes, remove_temporary_files, write_atomic
from gmsop_jax.training.layout import DIRECTORY, latest_saved, read_copy, steps_on_disk
from gmsop_jax.training.processes import check_same, first_process_does

_CONFIG, _LOCK = "config.json", ".lock"
_HOST_FIELDS = ("data.dir", "data.num_threads", "data.num_workers", "data.auto_convert")  # may differ between processes


def check_same_config(config: ConfigDict) -> None:
    """Checks that all processes of a run have the same versions and the same configuration.

    Fields that describe the host, such as `data.dir`, may differ.

    Raises:
      ConfigError: if they differ; the message states the process and the field.
    """
    here = {f"config.{name}": value for name, value in configs.flatten(config) if name not in _HOST_FIELDS}
    check_same({"the version of gmsop_jax": gmsop_jax.__version__, "the version of JAX": jax.__version__, **here})


def check_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the absolute path of a working directory.

    Raises:
      CheckpointError: if the path is empty or can't be used, for example because it is too long.
    """
    text = os.fspath(workdir)
    if not text.strip():
        raise CheckpointError("--workdir is empty; give the folder for the results, or omit the option")
    path = pathlib.Path(text).absolute()
    try:
        os.lstat(path / DIRECTORY / "0.orbax-checkpoint-tmp")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        if not isinstance(error, NotADirectoryError):
            raise CheckpointError(f"--workdir {text} can't be used ({error}); give another") from error
    return path


class Workdir:
    """A working directory. Entering it creates the directory if it is missing, and locks it.

    The first process holds the lock and writes for all processes. However that process ends, the lock ends with it. The
    resolved configuration is compared with `config.json`, or stored there if it is missing.
    """

    def __init__(self, path: str | os.PathLike[str], config: ConfigDict):
        self.path = check_path(path)
        self._config = config
        self._lock: FileLock | None = None

    def __enter__(self):
        """Locks the folder.

        Raises:
          CheckpointError: if it can't be written to, if another run uses it, or if it belongs to a run with
            another configuration.
          ConfigError: if the processes of the run have different folders.
        """
        first_process_does(self._open)
        check_same({f"the lock of the working directory ({_LOCK})": self._read_lock()})
        return self

    def __exit__(self, *_):
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _read_lock(self) -> str:
        """Returns the text of the lock that the first process wrote. A process with another folder doesn't find it."""
        files = [file for file in self.path.glob(f"{_LOCK}*") if file.stat().st_size]
        return files[-1].read_text(errors="replace") if files else f"absent in {self.path}"

    @contextlib.contextmanager
    def explaining_errors(self) -> Iterator[None]:
        """Turns an OSError (full disk, read-only or removed folder) into an error that states the remedy.

        Raises:
          CheckpointError: in place of an OSError.
        """
        try:
            yield
        except OSError as error:
            raise CheckpointError(self._explain(reason(error))) from error

    def check(self) -> None:
        """Raises CheckpointError if the folder is no longer the one that was locked."""
        if self._lock is not None and not self._lock.is_held():
            raise CheckpointError(self._explain("the folder was removed or replaced"))

    def _explain(self, reason: str) -> str:
        return (
            f"can't write to the working directory {self.path} ({reason}); {latest_saved(self.path / DIRECTORY)}."
            " Free some space or restore the folder, and run the same command again to resume"
        )

    def _open(self) -> None:
        try:
            if (self.path / manifest.FILE_NAME).exists():
                raise CheckpointError(f"the working directory {self.path} is a data set; give another --workdir")
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.path / _LOCK)
            self._lock.acquire()
            if self._lock.note:
                print(self._lock.note, file=sys.stderr)
            remove_temporary_files(self.path)
            self._check_config(self.path / _CONFIG)
        except LockHeldError as error:
            raise CheckpointError(
                f"another run uses {self.path} ({error}); wait until it ends, stop it, or give another --workdir"
                " (the processes of one run are started with --coordinator)"
            ) from error
        except OSError as error:
            self.__exit__()
            raise CheckpointError(
                f"can't write to the working directory {self.path} ({error.strerror}); give another --workdir"
            ) from error
        except CheckpointError:
            self.__exit__()
            raise

    def _check_config(self, file: pathlib.Path) -> None:
        """Compares the configuration with the stored ones; restores `config.json` if it is missing."""
        copy = read_copy(self.path, _CONFIG)
        if not file.exists():
            if copy is None and steps_on_disk(self.path / DIRECTORY):
                raise CheckpointError(
                    f"{file} is missing, and the checkpoints beside it, from an older version, contain no copy of it."
                    " Copy it back, or give another --workdir"
                )
            write_atomic(file, copy or configs.to_json(self._config) + "\n")
        restore = (
            "if you delete it, the next start restores it from the last checkpoint"
            if copy
            else "copy it back, or give another --workdir"
        )
        self._compare_config(read_bytes(file), str(file), restore)
        if copy is not None:
            self._compare_config(copy.encode(), "the last checkpoint", "give another --workdir")

    def _compare_config(self, content: bytes, place: str, remedy: str) -> None:
        """Raises CheckpointError if a stored configuration is damaged, or is not that of this run."""
        try:
            stored = configs.from_json(content.decode())
        except ValueError as error:
            raise CheckpointError(f"{place} has a damaged configuration ({error}); {remedy}") from error
        if lines := configs.differences(stored, self._config):
            raise CheckpointError(
                f"{self.path} was created with another configuration, which is stored in {place}:\n  "
                + "\n  ".join(lines)
                + "\nset these fields back, or give another --workdir"
            )
