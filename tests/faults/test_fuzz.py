"""Readers of files under random truncation and bit flips: a clear error, or what was written; nothing else."""

import contextlib
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode, decode_batch, encode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import CheckpointError, DataError
from gmsop_jax.files import find_damage, write_checksums
from gmsop_jax.training.checkpoint import Checkpoints, Progress
from gmsop_jax.training.step import TrainState


def damaged(data: bytes, cases: int, seed: int) -> Iterator[bytes]:
    """Variants of some bytes: cut off, with one bit flipped, or with a run of bytes replaced."""
    rng = np.random.default_rng(seed)
    for case in range(cases):
        changed, at = bytearray(data), int(rng.integers(len(data)))
        if case % 4 == 0:
            del changed[at:]
        elif case % 4 == 1:
            changed[at : at + 8] = rng.bytes(8)
        else:
            changed[at] ^= 1 << int(rng.integers(8))
        if changed != data:
            yield bytes(changed)


@pytest.mark.parametrize("codec", ["raw", "png"])
def test_records(codec):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    record = encode(image, 5, codec=codec)
    for changed in damaged(record, 3000, seed=1):
        with pytest.raises(DataError):
            decode(changed)
        try:  # only the container verifies checksums here, but shapes must be right
            pixels, labels = decode_batch([changed, record])
        except DataError:
            continue
        assert len(pixels) == len(labels) == 2
        assert sum(image.nbytes for image in pixels) < 2 * image.nbytes + 64


def test_manifest(fault_data, tmp_path):
    folder = shutil.copytree(fault_data, tmp_path / "data")
    for changed in damaged((folder / "dataset.json").read_bytes(), 3000, seed=2):
        (folder / "dataset.json").write_bytes(changed)
        try:
            manifest = Manifest.load(folder)
        except DataError:
            continue
        for name, split in manifest.splits.items():
            assert split.num_images == 48, name
            assert all((folder / shard.file).parent == folder for shard in split.shards)


def test_shards(fault_data, tmp_path):
    shard = Manifest.load(fault_data).split("val").shards[0]
    indices = np.arange(shard.num_records)
    expected = ShardReader(fault_data, [shard]).read(indices)
    for changed in damaged((fault_data / shard.file).read_bytes(), 1500, seed=3):
        (tmp_path / shard.file).write_bytes(changed)
        with contextlib.suppress(DataError):
            assert ShardReader(tmp_path, [shard]).read(indices) == expected


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    params = {"kernel": jnp.arange(600.0).reshape(20, 30), "bias": jnp.ones(3)}
    state = TrainState(jnp.int32(4), params, {"mean": jnp.zeros(3)}, {"trace": jnp.arange(5.0)})
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state, Progress(4, 1, 2.0), {"top1_error": 10.0})
    return folder, state


def test_checksums(saved, tmp_path):
    folder = shutil.copytree(saved[0] / "4", tmp_path / "4")
    assert find_damage(folder) is None
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    for number, file in enumerate([*files, folder / "checksums.json"]):
        content = file.read_bytes()
        for changed in damaged(content, 200, seed=number) if content else ():
            file.write_bytes(changed)
            if find_damage(folder) is None:  # white space and letter case of JSON
                assert file.name == "checksums.json"
        file.write_bytes(content)
    assert find_damage(folder) is None


def test_checkpoint_files(saved, tmp_path):
    """What the checksums don't cover: the file that Orbax writes last."""
    folder = shutil.copytree(saved[0], tmp_path / "checkpoints")
    state = saved[1]
    file = folder / "4" / "_CHECKPOINT_METADATA"
    for changed in damaged(file.read_bytes(), 160, seed=0):
        file.write_bytes(changed)
        try:
            with Checkpoints(folder, read_only=True) as checkpoints:
                restored, progress = checkpoints.restore(state, 4)
                checkpoints.best_step  # noqa: B018
        except CheckpointError:
            continue
        assert progress.step == 4
        jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_a_checksum_file_that_claims_to_be_huge(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("x")
    write_checksums(tmp_path)
    with (tmp_path / "checksums.json").open("ab") as file:
        file.truncate(2**32)  # sparse
    assert find_damage(tmp_path) == "checksums.json is damaged"


def test_sizes_are_checked_before_memory_is_taken(fault_data, tmp_path):
    folder = shutil.copytree(fault_data, tmp_path / "data")
    file = folder / "dataset.json"
    text = file.read_text()
    file.write_text(text.replace('"num_records": 24', f'"num_records": {10**15}'))
    with pytest.raises(DataError, match="1000000000000000 records don't fit into"):
        Manifest.load(folder)
    with file.open("ab") as sparse:
        sparse.truncate(2**40)
    with pytest.raises(DataError, match="so it is not a manifest"):
        Manifest.load(folder)

    huge = bytearray(encode(np.zeros((1, 1, 3), np.uint8), 0, codec="png"))
    at = huge.index(b"IHDR")
    huge[at + 4 : at + 12] = (60_000).to_bytes(4, "big") * 2  # 10 GB of pixels, says the PNG
    huge[at + 17 : at + 21] = zlib.crc32(huge[at : at + 17]).to_bytes(4, "big")
    with pytest.raises(DataError, match="damaged record"):
        decode_batch([bytes(huge)])
