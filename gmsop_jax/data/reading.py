"""Many records per call, from all the shards of a split."""

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from gmsop_jax.data.manifest import Shard
from gmsop_jax.errors import DataError

# Random access: no read-ahead and no helper threads; Grain's threads overlap the calls.
_RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


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
        """The records at `indices` (integers [n]), in that order, with one call per shard.

        Raises: DataError if a shard can't be read, or has other records than the manifest says.
        """
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        order = np.argsort(shards, kind="stable")
        records: list[bytes] = [b""] * len(indices)
        for rows in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
            shard = int(shards[rows[0]])
            positions = (indices[rows] - self._starts[shard]).tolist()
            for row, record in zip(rows.tolist(), self._read_shard(shard, positions), strict=True):
                records[row] = record
        return records

    def _read_shard(self, shard: int, positions: list[int]) -> list[bytes]:
        try:
            return self._reader(shard).read(positions)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"shard {self._paths[shard]} is damaged ({error}); convert the data set again") from error

    def _reader(self, shard: int) -> ArrayRecordReader:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = open_reader(self._paths[shard], self._counts[shard])
            return self._readers[shard]

    def _open(self) -> None:
        self._readers: dict[int, ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()


def open_reader(path: Path, num_records: int, options: str = _RANDOM_ACCESS) -> ArrayRecordReader:
    """Opens a shard and checks its record count; DataError if it is damaged or disagrees."""
    try:
        reader = ArrayRecordReader(str(path), options)
        found = reader.num_records()
    except (RuntimeError, ValueError) as error:
        raise DataError(f"shard {path} can't be opened ({error}); convert the data set again") from error
    if found != num_records:
        raise DataError(f"shard {path} holds {found} records; the manifest says {num_records}: convert again")
    return reader
