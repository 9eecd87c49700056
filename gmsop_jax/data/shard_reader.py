"""Any records of a split, from all its shards.

ArrayRecordReader reads records by a list of positions or by a range. Here every record is a range
of one: measured with array_record 0.8.6 that takes 5 µs of processor time for 12 KB, however many
are wanted, and the list takes 10 to 20, as it opens a reader of its own for every few records.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gmsop_jax.data.manifest import Shard
from gmsop_jax.errors import DataError

_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 2**14  # bytes fetched at a time: about a record; the default, 1 MiB, would be fetched for each


class ShardReader:
    """The records of one split, by their position in it.

    Threads may share one; pickling leaves the open files behind.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard]) -> None:
        self._paths = [directory / shard.file for shard in shards]
        self._counts = [shard.num_records for shard in shards]
        self._starts = np.cumsum([0, *self._counts])
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, indices: np.ndarray) -> list[bytes]:
        """The records at `indices` (integers [n], each in 0…len − 1), in that order.

        Raises: DataError if a shard can't be read, or has other records than the manifest says.
        """
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        positions = indices - self._starts[shards]
        places = zip(shards.tolist(), positions.tolist(), strict=True)
        return [self._read_one(shard, position) for shard, position in places]

    def where(self, index: int) -> str:
        """Names the shard and the record of an index."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return f"record {index - self._starts[shard]} of shard {self._paths[shard]}"

    def _read_one(self, shard: int, position: int) -> bytes:
        reader = self._readers[shard] or self._open_shard(shard)
        try:
            return reader.read(position, position + 1)[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise DataError(f"shard {self._paths[shard]} is damaged ({error}); convert the data set again") from error

    def _open_shard(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            self._readers[shard] = reader = open_reader(self._paths[shard], self._counts[shard])
            return reader

    def _open(self) -> None:
        self._readers: list[ArrayRecordReader | None] = [None] * len(self._paths)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        hidden = ("_readers", "_lock")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()


def open_reader(path: Path, num_records: int) -> ArrayRecordReader:
    """Opens a shard and checks its record count; DataError if it is damaged or disagrees."""
    try:
        reader = ArrayRecordReader(str(path), _RANDOM_ACCESS, file_reader_buffer_size=_BUFFER)
        found = reader.num_records()
    except (RuntimeError, ValueError) as error:
        raise DataError(f"shard {path} can't be opened ({error}); convert the data set again") from error
    if found != num_records:
        raise DataError(f"shard {path} holds {found} records; the manifest says {num_records}: convert again")
    return reader
