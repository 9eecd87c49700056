import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from batches import eval_batches
from PIL import Image

from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.inspect import contact_sheet
from gmsop_jax.conversion.verify import verify
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import encode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError
from gmsop_jax.files import sha256

SHARD = "train-00000-of-00003.arrayrecord"


@pytest.fixture
def copy(fashion: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fashion, tmp_path / "copy"))


def rewrite(directory: Path, records: list[bytes], **changes) -> None:
    """Puts other records into the first shard and a fitting checksum into the manifest."""
    writer = ArrayRecordWriter(str(directory / SHARD), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.close()
    value = json.loads((directory / "dataset.json").read_text())
    shard = value["splits"]["train"]["shards"][0]
    shard |= {"bytes": (directory / SHARD).stat().st_size, "sha256": sha256(directory / SHARD)}
    (directory / "dataset.json").write_text(json.dumps({**value, **changes}))


def records(directory: Path) -> list[bytes]:
    shard = Manifest.load(directory).splits["train"].shards[0]
    return ShardReader(directory, [shard]).read(np.arange(shard.num_records))


def test_a_good_set(fashion: Path):
    assert verify(fashion, progress=False) == Manifest.load(fashion)


def test_changed_record(copy: Path):
    changed = records(copy)
    changed[5] = changed[5][:-1] + bytes([changed[5][-1] ^ 1])
    rewrite(copy, changed)
    with pytest.raises(DataError, match="record 5 of split 'train': damaged record: its checksum differs"):
        verify(copy, progress=False)


def test_label_out_of_range(copy: Path):
    changed = records(copy)
    changed[7] = encode(np.zeros((28, 28), np.uint8), 10)
    rewrite(copy, changed)
    with pytest.raises(DataError, match="record 7 of split 'train' has label 10, but there are 10 classes"):
        verify(copy, progress=False)


def test_mislabelled(copy: Path):
    changed = records(copy)
    found = next(at for at, record in enumerate(changed) if record[12] != 3)
    changed[found] = encode(np.zeros((28, 28), np.uint8), 3)
    rewrite(copy, changed)
    with pytest.raises(DataError, match=r"split 'train' has \d+ images of class \d, but the manifest says 500"):
        verify(copy, progress=False)


def test_another_size(copy: Path):
    changed = records(copy)
    changed[0] = encode(np.zeros((28, 27), np.uint8), changed[0][12])
    rewrite(copy, changed)
    with pytest.raises(DataError, match="have different sizes, but the manifest says the size"):
        verify(copy, progress=False)


def test_another_mean(copy: Path):
    rewrite(copy, records(copy), mean_rgb=[1.0, 2.0, 3.0])
    with pytest.raises(DataError, match=r"the manifest says \(1.0, 2.0, 3.0\)"):
        verify(copy, progress=False)


def test_missing_records(copy: Path):
    rewrite(copy, records(copy)[:-1])
    with pytest.raises(DataError, match="has 1665 records, but the manifest says 1666"):
        verify(copy, progress=False)


def test_reading_stops_at_damage_in_a_shard(copy: Path):
    shard = copy / "val-00000-of-00001.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"val-00000-of-00001.arrayrecord is damaged"):
        list(eval_batches(copy, "val", batch_size=100))


def test_reading_stops_at_a_label_out_of_range(copy: Path):
    changed = [encode(np.zeros((28, 28), np.uint8), 12)] * 1666
    rewrite(copy, changed)
    with pytest.raises(DataError, match="a record has label 12, but the labels of 10 classes"):
        list(eval_batches(copy, "train", batch_size=1000))


def test_a_sheet_shows_whole_names_in_any_alphabet(tmp_path: Path):
    names = ("ä" * 30, "ö" * 30)
    for split, name in itertools.product(("train", "val"), names):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    convert("image-folder", tmp_path / "images", tmp_path / "set", progress=False)
    contact_sheet(tmp_path / "set", "train", tmp_path / "sheet.png", tile=20)
    with Image.open(tmp_path / "sheet.png") as sheet:
        margin = sheet.width - 20
        first, second = (sheet.crop((12, row, margin, row + 20)) for row in (0, 20))
    assert 200 < margin <= 300
    assert first.tobytes() != second.tobytes()  # and not the same box for every letter that a font lacks


def test_a_sheet_is_no_wider_than_its_images(fashion: Path, tmp_path: Path):
    contact_sheet(fashion, "val", tmp_path / "sheet.png", rows=1, columns=10**12, tile=2)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (110 + 100 * 2, 2)
