import json
import shutil
from pathlib import Path

import pytest
from batches import eval_batches, train_batches

from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import DataError


@pytest.fixture
def copy(fashion: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fashion, tmp_path / "copy"))


def edit(directory: Path, **changes) -> None:
    file = directory / "dataset.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps({**value, **changes}))


def test_contents(fashion: Path):
    manifest = Manifest.load(fashion)
    manifest.verify_checksums(fashion)
    assert manifest.name == "fashion-mnist"
    assert manifest.num_classes == 10
    assert manifest.classes[9] == "ankle boot"
    assert manifest.splits["train"].num_images == 5000
    assert manifest.splits["train"].image_size == (28, 28)
    assert manifest.splits["train"].class_counts == (500,) * 10
    assert manifest.splits["val"].class_counts == (100,) * 10
    assert [shard.file for shard in manifest.splits["train"].shards] == [
        f"train-0000{at}-of-00003.arrayrecord" for at in range(3)
    ]


def test_top_level_of_the_file(fashion: Path):
    value = json.loads((fashion / "dataset.json").read_text())
    assert value["schema_version"] == 1
    assert {"name", "classes", "mean_rgb", "covariance_rgb", "splits", "provenance"} < value.keys()
    assert value["provenance"]["files"][0]["name"] == "sample.npz"
    assert len(value["provenance"]["files"][0]["sha256"]) == 64


def test_save_and_load(fashion: Path, copy: Path):
    manifest = Manifest.load(fashion)
    manifest.save(copy)
    assert Manifest.load(copy) == manifest


def test_missing_empty_foreign_or_a_file(tmp_path: Path):
    with pytest.raises(DataError, match="the folder does not exist"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(DataError, match="the folder is empty"):
        Manifest.load(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="contains other files"):
        Manifest.load(tmp_path)
    with pytest.raises(DataError, match="it is a file"):
        Manifest.load(tmp_path / "notes.txt")


def test_half_written(tmp_path: Path):
    (tmp_path / ".convert").mkdir()
    with pytest.raises(DataError, match="its conversion is unfinished: run the same"):
        Manifest.load(tmp_path)


def test_not_json(copy: Path):
    (copy / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="can't be read as JSON"):
        Manifest.load(copy)


@pytest.mark.parametrize("value", ["[]", "{}", "null", '{"classes": []}'])
def test_foreign_json(copy: Path, value: str):
    (copy / "dataset.json").write_text(value)
    with pytest.raises(DataError, match="isn't a manifest of gmsop_jax"):
        Manifest.load(copy)


def test_other_schema(copy: Path):
    edit(copy, schema_version=99)
    with pytest.raises(DataError, match="schema_version 99; this release reads 1"):
        Manifest.load(copy)


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_rgb": [1, 2]},
        {"splits": {"train": {}}},
        {"splits": 3},
        {"provenance": None},
        {"provenance": {"files": 3}},
        {"provenance": {"files": [{"name": "x", "bytes": None, "sha256": None}]}},
        {"provenance": {"unreadable": True}},
        {"classes": 7},
    ],
)
def test_damaged_fields(copy: Path, changes: dict):
    edit(copy, **changes)
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(copy)


def test_labels_out_of_range(copy: Path):
    edit(copy, classes=["one", "two"])
    with pytest.raises(DataError, match=r"counts the images of 10 classes, but the data set has 2"):
        Manifest.load(copy)


def test_missing_shard(copy: Path):
    (copy / "train-00001-of-00003.arrayrecord").unlink()
    with pytest.raises(DataError, match=r"train-00001-of-00003.arrayrecord is missing"):
        Manifest.load(copy)


def test_truncated_shard(copy: Path):
    shard = copy / "train-00001-of-00003.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(DataError, match="bytes instead of"):
        Manifest.load(copy)


def test_changed_shard(copy: Path):
    shard = copy / "train-00001-of-00003.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    manifest = Manifest.load(copy)  # its size is right; only the sum tells
    with pytest.raises(DataError, match="its bytes changed"):
        manifest.verify_checksums(copy)


@pytest.mark.parametrize("name", ["../train.arrayrecord", "/etc/passwd", "a/b", "..", "a\\b", "", "a\0b", "a" * 300])
def test_paths_that_leave_the_folder(copy: Path, name: str):
    value = json.loads((copy / "dataset.json").read_text())
    value["splits"]["train"]["shards"][0]["file"] = name
    edit(copy, splits=value["splits"])
    with pytest.raises(DataError, match="outside its folder"):
        Manifest.load(copy)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_images", 10**400),
        ("num_images", 5000.0),
        ("num_images", -1),
        ("num_images", True),
        ("image_size", [10**9, 10**9]),
        ("image_size", [0, 28]),
        ("image_size", [28]),
        ("class_counts", [5500, -500, 0, 0, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_hostile_numbers_of_a_split(copy: Path, field: str, value):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["train"][field] = value
    edit(copy, splits=splits)
    with pytest.raises(DataError, match=r"dataset.json .*(damaged|JSON)"):
        Manifest.load(copy)


@pytest.mark.parametrize("change", [{"num_records": 10**12}, {"num_records": "1666"}, {"bytes": -1}, {"bytes": 1e300}])
def test_hostile_numbers_of_a_shard(copy: Path, change: dict):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["train"]["shards"][0] |= change
    edit(copy, splits=splits)
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(copy)


@pytest.mark.parametrize("mean", ["[NaN, 0, 0]", "[Infinity, 0, 0]", "[1e999, 0, 0]", '["a", 0, 0]'])
def test_a_mean_that_is_not_finite(copy: Path, mean: str):
    text = json.dumps({**json.loads((copy / "dataset.json").read_text()), "mean_rgb": "MEAN"})
    (copy / "dataset.json").write_text(text.replace('"MEAN"', mean))
    with pytest.raises(DataError, match="is damaged"):
        Manifest.load(copy)


@pytest.mark.parametrize("other", ["train", "val"])
def test_a_shard_that_is_named_twice(copy: Path, other: str):
    splits = json.loads((copy / "dataset.json").read_text())["splits"]
    splits["train"]["shards"][0] = splits[other]["shards"][-1]
    edit(copy, splits=splits)
    with pytest.raises(DataError, match="more than once"):
        Manifest.load(copy)


def test_deep_nesting(copy: Path):
    (copy / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="can't be read as JSON"):
        Manifest.load(copy)


def test_processes_share_the_checksums(copy: Path):
    manifest = Manifest.load(copy)
    shard = copy / "train-00001-of-00003.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)

    def finds_it(index: int, count: int, splits=None) -> bool:
        try:
            manifest.verify_checksums(copy, splits=splits, process_index=index, process_count=count)
        except DataError:
            return True
        return False

    assert finds_it(0, 1)
    assert not finds_it(0, 1, splits=["val"])
    for count in (2, 3, 4, 9):
        assert sum(finds_it(index, count) for index in range(count)) == 1


def test_batches_do_not_check_the_files_again(fashion: Path, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("gmsop_jax.data.manifest.shard_size", fail)
    assert len(next(train_batches(fashion, batch_size=8, seed=0))["label"]) == 8
    assert len(next(eval_batches(fashion, "val", batch_size=8))["label"]) == 8


def test_counts_that_disagree(copy: Path):
    value = json.loads((copy / "dataset.json").read_text())
    value["splits"]["train"]["num_images"] = 4999
    edit(copy, splits=value["splits"])
    with pytest.raises(DataError, match="num_images 4999, but its shards have 5000 records"):
        Manifest.load(copy)
