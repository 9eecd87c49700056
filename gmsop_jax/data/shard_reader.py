"""Random access to the records of a split, which are spread over many shard files.

Records are read one at a time. With array_record 0.8.6 that takes 5 µs of processor time for a record of 12 KB,
whereas reading a list of positions takes 10 to 20 µs for each, because it opens another reader for every few records.
"""

import re
import resource
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gmsop_jax.data.manifest import Shard, shard_size
from gmsop_jax.errors import DataError, FileAccessError

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER_BYTES = 2**14  # about one record; the default of 1 MiB would be read for every record
_MAX_OPEN = 2**12
_SYSTEM_CALL_FAILED = re.compile(r"\w+\(\) failed: ([^;]*)")  # how ArrayRecord reports a failed system call


def max_open_shards() -> int:
    """Returns how many shards a `ShardReader` keeps open: a third of the limit of open files, and at most 4,096.

    The remaining two thirds are for a second reader, such as that of an evaluation, and for all other files.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAX_OPEN if limit == resource.RLIM_INFINITY else max(1, min(_MAX_OPEN, limit // 3))


class ShardReader:
    """The records of one split, addressed by their position in it.

    At most `max_open_shards()` shards are open at a time; when there are more, the one opened first is closed. Threads
    may share a reader. A pickled copy opens its own files.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self._directory, self._shards = directory, tuple(shards)
        self._starts = np.cumsum([0, *(shard.num_records for shard in shards)])
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["ShardReader"], tuple[Path, tuple[Shard, ...]]]:
        return ShardReader, (self._directory, self._shards)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> list[bytes]:
        """Reads the records at `indices` (integers [n], each in 0…len − 1), in that order.

        Raises:
          DataError: if a shard is missing or damaged, or its number of records differs from the manifest.
          FileAccessError: if a shard can't be opened or read, which doesn't mean that it is damaged.
        """
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        positions = indices - self._starts[shards]
        return [self._read_one(*place) for place in zip(shards.tolist(), positions.tolist(), strict=True)]

    def where(self, index: int) -> str:
        """Returns a description of the record at an index: its position and its shard."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"record {index - self._starts[shard]} of shard {self._directory / self._shards[shard].file}"

    def _read_one(self, shard: int, position: int) -> bytes:
        reader = self._readers.get(shard) or self._open(shard)
        try:
            return reader.read(position, position + 1)[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise _explain(self._directory / self._shards[shard].file, error) from error

    def _open(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if reader := self._readers.get(shard):  # another thread has opened it
                return reader
            while len(self._readers) >= max_open_shards():
                del self._readers[next(iter(self._readers))]  # closed once no thread reads from it any more
            self._readers[shard] = reader = _open_reader(self._directory, self._shards[shard])
            return reader


def _open_reader(directory: Path, shard: Shard) -> ArrayRecordReader:
    shard_size(directory, shard)  # ArrayRecord treats a file that it can't open as one without records
    path = directory / shard.file
    try:
        reader = ArrayRecordReader(str(path), _RANDOM_ACCESS, file_reader_buffer_size=_BUFFER_BYTES)
        if not reader.ok():
            reader.close()  # raises the reason
    except (RuntimeError, ValueError) as error:
        raise _explain(path, error) from error
    if (found := reader.num_records()) != shard.num_records:
        raise DataError(
            f"shard {path} has {found} records, but the manifest says {shard.num_records}; convert the data set again"
        )
    return reader


def _explain(path: Path, error: Exception) -> DataError | FileAccessError:
    if failed := _SYSTEM_CALL_FAILED.match(str(error)):
        return FileAccessError(f"shard {path} can't be read: {failed[1]}")
    return DataError(f"shard {path} is damaged ({error}); convert the data set again")
