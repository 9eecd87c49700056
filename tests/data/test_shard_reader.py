"""Shards: how many are open, and the errors if one can't be opened or read."""

import errno
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from batches import eval_batches, train_batches

from gmsop_jax.data import shard_reader
from gmsop_jax.data.manifest import Manifest, Shard, Split
from gmsop_jax.data.records import encode
from gmsop_jax.data.shard_reader import ShardReader, max_open_shards
from gmsop_jax.errors import DataError, FileAccessError

SHARD = "train-00001-of-00003.arrayrecord"


@pytest.fixture
def copy(fashion: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fashion, tmp_path / "copy"))


@pytest.fixture
def refuse(monkeypatch):
    """Makes the system refuse to open the shard, with the given error number."""

    def set_error(number: int) -> None:
        original = os.open

        def refusing(path, *arguments, **options):
            if str(path).endswith(SHARD):
                raise OSError(number, os.strerror(number), str(path))
            return original(path, *arguments, **options)

        monkeypatch.setattr(os, "open", refusing)

    return set_error


MANY_SHARDS = """
import os, resource, sys
import numpy as np
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from gmsop_jax.config import default_config
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import train_batches
from gmsop_jax.data.records import encode
from gmsop_jax.data.shard_reader import ShardReader
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
folder = Path(sys.argv[1])
manifest = Manifest.load(folder)
reader = ShardReader(folder, manifest.split("train").shards)
num_open = []
def read(seed):
    for indices in np.split(np.random.default_rng(seed).permutation(5000), 50):
        assert [record[12] for record in reader.read(indices)] == (indices % 10).tolist()
        num_open.append(len(os.listdir("/proc/self/fd")))
with ThreadPoolExecutor(4) as threads:
    list(threads.map(read, range(4)))
c = default_config()
c.data.dir, c.data.on_corrupt, c.train.batch_size = str(folder), "skip", 500
batches = train_batches(c.data, c.train, manifest, seed=0)
labels = np.concatenate([next(batches)["label"] for _ in range(10)])
assert np.bincount(labels).tolist() == [500] * 10, np.bincount(labels)
print(max(num_open))
"""


def write_shards(folder: Path, count: int) -> None:
    """Writes a data set whose shards hold one image each, of classes 0, 1, …, 9, 0, 1, …"""
    for label in range(10):
        writer = ArrayRecordWriter(str(folder / f"{label}"), "group_size:1")
        writer.write(encode(np.zeros((2, 2), np.uint8), label))
        writer.close()
    for number in range(10, count):
        os.link(folder / f"{number % 10}", folder / f"{number}")
    shards = tuple(Shard(str(number), 1, (folder / str(number)).stat().st_size, "") for number in range(count))
    split = Split(count, (2, 2), (count // 10,) * 10, shards)
    covariance = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    Manifest("many", tuple("0123456789"), (0.0, 0.0, 0.0), covariance, {"train": split}, {}).save(folder)


def test_5000_shards_under_a_limit_of_256_open_files(tmp_path: Path):
    write_shards(tmp_path, 5000)
    result = subprocess.run([sys.executable, "-c", MANY_SHARDS, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 150


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_shard_that_cannot_be_opened_is_not_skipped(fashion: Path, refuse, number: int):
    batches = train_batches(fashion, batch_size=500, seed=0, on_corrupt="skip")
    refuse(number)
    with pytest.raises(FileAccessError, match=f"{SHARD} can't be read: {os.strerror(number)}"):
        next(batches)


def test_the_message_says_what_to_do(fashion: Path, refuse):
    shards = Manifest.load(fashion).split("train").shards
    refuse(errno.EMFILE)
    with pytest.raises(FileAccessError, match="ulimit -n"):
        ShardReader(fashion, shards[1:]).read(np.arange(1))
    refuse(errno.EACCES)
    with pytest.raises(FileAccessError, match="permissions"):
        Manifest.load(fashion)


def test_an_error_of_the_disk_is_not_damage(copy: Path):
    reader = ShardReader(copy, Manifest.load(copy).split("train").shards[1:2])
    reader.read(np.arange(1))
    shard = os.path.realpath(copy / SHARD)
    [file] = [name for name in os.listdir("/proc/self/fd") if os.path.realpath(f"/proc/self/fd/{name}") == shard]
    unreadable = os.open("/proc/self/mem", os.O_RDONLY)  # reading its first page is an input/output error
    try:
        os.dup2(unreadable, int(file))
        with pytest.raises(FileAccessError, match=f"{SHARD} can't be read: Input/output error"):
            reader.read(np.arange(1, 2))
    finally:
        os.close(unreadable)


def test_a_vanished_data_set_is_not_skipped(copy: Path):
    batches = train_batches(copy, batch_size=500, seed=0, on_corrupt="skip")
    shutil.rmtree(copy)
    with pytest.raises(FileAccessError, match="is no longer a data set"):
        next(batches)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_shard_that_is_not_a_file(copy: Path, make):
    (copy / SHARD).unlink()
    make(copy / SHARD)
    with pytest.raises(DataError, match=f"{SHARD} is not a file"):
        Manifest.load(copy)


def test_a_missing_or_emptied_shard_can_be_skipped(copy: Path):
    batches = [train_batches(copy, batch_size=500, seed=0, on_corrupt="skip") for _ in range(2)]
    (copy / SHARD).write_bytes(b"")
    assert len(next(batches[0])["label"]) == 500
    (copy / SHARD).unlink()
    assert len(next(batches[1])["label"]) == 500
    assert sum(batch["mask"].sum() for batch in eval_batches(copy, "train", batch_size=500, on_corrupt="skip")) == 3333


def test_a_copy_opens_its_own_files(fashion: Path):
    reader = ShardReader(fashion, Manifest.load(fashion).split("train").shards)
    indices = np.array([4999, 0, 1700])
    assert pickle.loads(pickle.dumps(reader)).read(indices) == reader.read(indices)


def test_room_is_left_for_other_files():
    assert 1 <= max_open_shards() <= 4096


class SimulatedShard:
    """In place of ArrayRecord's reader of a shard, whose name begins with its number of records; all are the same."""

    def __init__(self, path: str, *_, **__):
        self._num_records = int(Path(path).name.split("-")[0])

    def ok(self) -> bool:
        return True

    def num_records(self) -> int:
        return self._num_records

    def read(self, start: int, stop: int) -> list[bytes]:
        assert 0 <= start < stop <= self._num_records
        return [encode(np.zeros((2, 2), np.uint8), 1)]


def simulate(folder: Path, num_images: int, num_shards: int = 500) -> None:
    """Writes the manifest of a large data set, and sparse files in place of its shards."""
    folder.mkdir()
    records = num_images // num_shards
    shards = tuple(Shard(f"{records}-{number}", records, 20 * records, "") for number in range(num_shards))
    for shard in shards:
        (folder / shard.file).touch()
        os.truncate(folder / shard.file, shard.bytes)
    split = Split(num_images, (2, 2), (0, num_images), shards)
    covariance = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    Manifest("simulated", ("a", "b"), (0.0, 0.0, 0.0), covariance, {"train": split}, {}).save(folder)


def test_a_billion_records_start_as_a_million(tmp_path: Path, monkeypatch):
    """With as many shards, the start takes as many calls and as much memory; the order needs O(√n) numbers."""
    monkeypatch.setattr(shard_reader, "ArrayRecordReader", SimulatedShard)
    calls, starts, peaks = [], [], []

    def count(frame, event, argument) -> None:
        calls[-1] += event in ("call", "c_call")

    for num_images in (10**6, 10**6, 10**9):  # the first fills caches
        folder = tmp_path / str(len(calls))
        simulate(folder, num_images)
        calls.append(0)
        tracemalloc.start()
        sys.setprofile(count)
        Manifest.load(folder)
        batches = train_batches(folder, batch_size=256)
        sys.setprofile(None)
        starts.append(tracemalloc.get_traced_memory())  # kept, and at most
        tracemalloc.reset_peak()
        for _ in range(3):
            batch = next(batches)
            assert batch["image"].shape == (256, 2, 2, 3)
            assert batch["label"].all()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert calls[2] == pytest.approx(calls[1], rel=0.01)
    assert starts[2] == pytest.approx(starts[1], rel=0.05)
    assert peaks[2] < 2**27  # a permutation would take 8 GB
