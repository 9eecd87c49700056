import dataclasses
import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign import images, jpeg, write_imagenet, write_imdb
from PIL import Image

from gmsop_jax.conversion import convert as conversion
from gmsop_jax.conversion import job
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.shards import Statistics, shard_tasks
from gmsop_jax.conversion.sources import Options
from gmsop_jax.conversion.verify import verify
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import Codec, decode, encode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import ConfigError, DataError, FileAccessError
from gmsop_jax.files import FileLock, sha256
from gmsop_jax.main import main

ROOT = Path(__file__).parents[2]


def contents(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in directory.iterdir()}


def read(directory: Path, split: str) -> list[dict]:
    reader = ShardReader(directory, Manifest.load(directory).splits[split].shards)
    return [dict(decode(record)) for record in reader.read(np.arange(len(reader)))]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder, "pickle", count=400)
    return folder


@pytest.fixture(scope="module")
def reference(imagenet: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted conversion that others must equal."""
    output = tmp_path_factory.mktemp("reference") / "set"
    convert("imagenet64", imagenet, output, shards=6, progress=False)
    return output


def test_every_image_arrives_once(imagenet: Path, reference: Path):
    expected = np.concatenate([images(400, 8, 8, seed=at) for at in range(3)])
    found = read(reference, "train")
    pixels = np.stack([example["image"] for example in found])
    assert sorted(image.tobytes() for image in pixels) == sorted(image.tobytes() for image in expected)
    labels = {image.tobytes(): (at // 400 + at % 400) % 5 for at, image in enumerate(expected)}
    assert all(labels[example["image"].tobytes()] == example["label"] for example in found)
    assert (pixels != expected).any((1, 2, 3)).mean() > 0.99  # shuffled
    np.testing.assert_array_equal(np.stack([e["image"] for e in read(reference, "val")]), images(400, 8, 8, seed=3))


def test_statistics_are_exact(reference: Path):
    manifest = Manifest.load(reference)
    pixels = np.concatenate([images(400, 8, 8, seed=at) for at in range(3)]).reshape(-1, 3).astype(object)
    count = len(pixels)
    mean = [Fraction(int(pixels[:, c].sum()), count) for c in range(3)]
    assert manifest.mean_rgb == tuple(float(value) for value in mean)
    for i in range(3):
        for j in range(3):
            exact = Fraction(int((pixels[:, i] * pixels[:, j]).sum()), count) - mean[i] * mean[j]
            assert manifest.covariance_rgb[i][j] == float(exact)


def test_gray_counts_as_three_channels():
    image = images(1, 5, 7, 1)[0]
    gray, rgb = Statistics(1), Statistics(1)
    gray.add(image, 0)
    rgb.add(np.repeat(image, 3, 2), 0)
    assert gray.to_json() == rgb.to_json()


def test_workers_make_the_same_bytes(imagenet: Path, reference: Path, tmp_path: Path):
    convert("imagenet64", imagenet, tmp_path / "set", shards=6, workers=2, progress=False)
    assert contents(tmp_path / "set") == contents(reference)


def test_seed_changes_the_order_of_training_only(imagenet: Path, reference: Path, tmp_path: Path):
    convert("imagenet64", imagenet, tmp_path / "set", shards=6, seed=1, progress=False)
    found, before = contents(tmp_path / "set"), contents(reference)
    changed = {name for name in found if found[name] != before[name]}
    assert changed == {name for name in found if name.startswith("train")} | {"dataset.json"}


def test_the_manifest_records_the_source(imagenet: Path, reference: Path):
    provenance = Manifest.load(reference).provenance
    assert provenance["source"] == "imagenet64"
    assert provenance["tool_version"]
    names = {file["name"]: file["sha256"] for file in provenance["files"]}
    assert names["train_data_batch_10"] == sha256(imagenet / "train_data_batch_10")
    assert len(names) == 11


def test_a_finished_conversion_returns_at_once(imagenet: Path, reference: Path):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    manifest = convert("imagenet64", imagenet, reference, shards=6, progress=False)
    assert manifest == Manifest.load(reference)
    assert before == {path: path.stat().st_mtime_ns for path in reference.iterdir()}


def test_other_settings_on_a_finished_set_are_refused(imagenet: Path, reference: Path):
    before = contents(reference)
    with pytest.raises(DataError, match="already contains the data set 'imagenet64'"):
        convert("imagenet64", imagenet, reference, shards=6, seed=5, progress=False)
    assert contents(reference) == before


def test_limit(imagenet: Path, tmp_path: Path):
    manifest = convert("imagenet64", imagenet, tmp_path / "set", limit=37, progress=False)
    assert manifest is not None
    assert {split.num_images for split in manifest.splits.values()} == {37}
    assert min(manifest.splits["train"].class_counts) > 0  # a random subset, not the first ones


def test_interruption_resumes_to_the_same_bytes(
    imagenet: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gmsop_jax.conversion.sources.table import ImageTable

    original, loaded = ImageTable.load, []

    def load(self: ImageTable, split: str, index: int) -> tuple[np.ndarray, int]:
        loaded.append(index)
        if len(loaded) == 500:
            raise KeyboardInterrupt
        return original(self, split, index)

    monkeypatch.setattr(ImageTable, "load", load)
    output = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        convert("imagenet64", imagenet, output, shards=6, progress=False)
    assert not list(output.glob("*.tmp-*"))
    with pytest.raises(DataError, match="its conversion is unfinished"):
        Manifest.load(output)
    with pytest.raises(DataError, match=r"unfinished conversion with other settings .*seed was 0 and is now 3"):
        convert("imagenet64", imagenet, output, shards=6, seed=3, progress=False)
    loaded.clear()
    monkeypatch.setattr(ImageTable, "load", lambda *args: loaded.append(0) or original(*args))
    convert("imagenet64", imagenet, output, shards=6, progress=False)
    assert contents(output) == contents(reference)
    assert len(loaded) == 1600 - 400  # two shards of 200 were whole


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_resumes_to_the_same_bytes(workers: int, tmp_path: Path):
    write_imagenet(tmp_path / "in", "npz-compressed", count=4000, side=16)
    convert("imagenet64", tmp_path / "in", tmp_path / "reference", shards=12, progress=False)
    output = tmp_path / "set"
    arguments = ["imagenet64", "--input", tmp_path / "in", "--output", output, "--shards", "12"]
    command = [sys.executable, ROOT / "tools/convert.py", *arguments, "--workers", str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for shards in (1, 4, 9):
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and len(list(output.glob("*.arrayrecord"))) < shards:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)  # the parent alone: its workers must end by themselves
        process.wait()
    assert not (output / "dataset.json").exists()
    subprocess.run(command, env=environment, check=True)
    assert contents(output) == contents(tmp_path / "reference")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_reported(tmp_path: Path):
    write_imagenet(tmp_path / "in", "pickle", count=8000, side=16)
    arguments = [
        "imagenet64",
        "--input",
        tmp_path / "in",
        "--output",
        tmp_path / "set",
        "--shards",
        "12",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools/convert.py", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list((tmp_path / "set").glob("*.arrayrecord")):
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, message = process.communicate()
    assert process.returncode == 2
    assert "error: a worker process ended unexpectedly" in message
    assert "Traceback" not in message


def test_shard_ranges_join(imagenet: Path, reference: Path, tmp_path: Path):
    output, other = tmp_path / "set", tmp_path / "other"
    for at, where in enumerate((output, other, output)):
        assert convert("imagenet64", imagenet, where, shards=6, shard_range=(at, 3), progress=False) is None
    expected = r"3 of 8 shards have not been converted yet, such as train-00001-of-00006.*: gmsop merge OUTPUT OTHER"
    with pytest.raises(DataError, match=expected):
        job.join(output, [], 0)
    job.join(output, [other], 0)
    assert contents(output) == contents(reference)


def test_gather_refuses_another_conversion(imagenet: Path, tmp_path: Path):
    for seed in (0, 1):
        convert("imagenet64", imagenet, tmp_path / str(seed), seed=seed, shard_range=(0, 2), progress=False)
    with pytest.raises(DataError, match="different settings"):
        job.join(tmp_path / "0", [tmp_path / "1"], 0)
    with pytest.raises(DataError, match="contains no unfinished conversion"):
        job.join(tmp_path / "0", [tmp_path], 0)


def test_foreign_output_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"contains other files, such as thesis\.tex"):
        convert("fashion-mnist", None, tmp_path, progress=False)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(DataError, match="is a file"):
        convert("fashion-mnist", None, tmp_path / "thesis.tex", progress=False)


def test_a_foreign_data_dir_is_not_reported_as_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "thesis.tex").write_text("mine")
    arguments = ["--config", str(ROOT / "configs/quickstart.py"), f"--config.data.dir={tmp_path}"]
    assert main([*arguments, "--workdir", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"no data set at {tmp_path} (config.data.dir): it contains other files, such as thesis.tex" in message
    assert f"gmsop convert image-folder --input {tmp_path} --output DIR\n" in message
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_stray_shards_are_foreign(tmp_path: Path):
    (tmp_path / "train-00000-of-00001.arrayrecord").write_text("whose?")
    with pytest.raises(DataError, match="contains other files, such as train-00000"):
        convert("fashion-mnist", None, tmp_path, progress=False)


def test_a_bad_source_leaves_no_trace(tmp_path: Path):
    with pytest.raises(DataError):
        convert("imagenet64", tmp_path, tmp_path / "deep/set", progress=False)
    assert not (tmp_path / "deep/set").exists()


def test_unwritable_output(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the conversion to .*/set failed .*Not a directory"):
        convert("fashion-mnist", None, tmp_path / "file" / "set", progress=False)


def test_a_full_disk_is_reported_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="needs 5 MiB, but its disk has only 1 MiB free"):
        convert("fashion-mnist", None, tmp_path / "set", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"shards": -1}, "shards is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"codec": "webp"}, "unknown codec 'webp'; it must be one of raw, png, jpeg"),
        ({"shard_range": (2, 2)}, "shard range 2/2"),
        ({"max_unreadable": 2}, "max_unreadable is 2"),
    ],
)
def test_wrong_numbers(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        convert("fashion-mnist", None, tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "--size is 0"),
        ({"size": 65_536}, "--size is 65536; it must be from 1 to 65,535"),
        ({"resize": "magic"}, "--resize is 'magic'; it must be one of matlab, pillow"),
        ({"val_fraction": float("nan")}, "--val-fraction is nan"),
        ({"val_fraction": 1.5}, "--val-fraction is 1.5"),
    ],
)
def test_wrong_options(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        Options(**options)


@pytest.mark.parametrize("paths", [("", "set"), ("in", "")])
def test_empty_names_are_not_the_current_folder(paths: tuple[str, str]):
    with pytest.raises(ConfigError, match="path of the input or of the output is empty"):
        convert("image-folder", *paths)


def test_more_shards_than_images(tmp_path: Path):
    with pytest.raises(DataError, match="split 'train' has 5 images, which can't fill 6 shards"):
        convert("fashion-mnist", None, tmp_path / "set", limit=5, shards=6, progress=False)


def test_labels_beyond_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gmsop_jax.conversion.sources.table import ImageTable

    monkeypatch.setattr(ImageTable, "load", lambda self, split, index: (self.decode(index), 10))
    with pytest.raises(DataError, match="has label 10, but the labels of 10 classes are 0 to 9"):
        convert("fashion-mnist", None, tmp_path / "set", progress=False)


def write_photos(root: Path, broken: int) -> None:
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        for at in range(10):
            Image.fromarray(images(1, 9 + at, 9)[0]).save(root / split / "a" / f"{at}.png")
    for at in range(broken):
        (root / "train/a" / f"broken{at}.jpg").write_bytes(jpeg(images(1, 40, 40)[0])[:200])


def test_unreadable_images_are_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_photos(tmp_path / "in", broken=2)
    with caplog.at_level(logging.WARNING):
        manifest = convert("image-folder", tmp_path / "in", tmp_path / "set", max_unreadable=0.1, progress=False)
    assert manifest is not None
    assert manifest.splits["train"].num_images == 10
    assert manifest.splits["train"].image_size is None
    names = sorted(line.split(":")[0] for line in manifest.provenance["unreadable"])
    assert names == ["train/a/broken0.jpg", "train/a/broken1.jpg"]
    assert "train/a/broken1.jpg" in caplog.text
    verify(tmp_path / "set", progress=False)


def test_too_many_unreadable_are_refused(tmp_path: Path):
    write_photos(tmp_path / "in", broken=3)
    arguments = {"options": Options(size=8), "progress": False}
    with pytest.raises(DataError, match=r"3 of 23 images are unreadable.* more than the allowed fraction 0.01"):
        convert("image-folder", tmp_path / "in", tmp_path / "set", **arguments)
    manifest = convert("image-folder", tmp_path / "in", tmp_path / "set", max_unreadable=0.5, **arguments)
    assert manifest is not None
    assert manifest.splits["train"].image_size == (8, 8)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_that_is_too_large_for_a_record(tmp_path: Path, workers: int):
    write_photos(tmp_path / "in", broken=0)
    Image.new("L", (2**16, 1)).save(tmp_path / "in/train/a/long.png")
    with pytest.raises(DataError, match="image is 1×65536; sides must be from 1 to 65535"):
        convert("image-folder", tmp_path / "in", tmp_path / "set", workers=workers, shards=2, progress=False)
    assert not list((tmp_path / "set").glob("*.tmp-*"))


def test_another_stored_mean_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_imdb(tmp_path / "good.mat", [1, 1, 2], [1, 2, 1])
    convert("imdb-mat", tmp_path / "good.mat", tmp_path / "good", progress=False)
    assert "states the mean" not in caplog.text
    write_imdb(tmp_path / "bad.mat", [2, 1, 1], [1, 2, 1])  # the mean of another split
    convert("imdb-mat", tmp_path / "bad.mat", tmp_path / "bad", progress=False)
    assert "states the mean" in caplog.text


def test_plan_covers_everything_once():
    tasks = shard_tasks({"train": 103, "val": 7}, {"train": 4, "val": 1})
    rows = [row for task in tasks if task.split == "train" for row in range(task.start, task.stop)]
    assert rows == list(range(103))
    assert tasks[-1].file == "val-00000-of-00001.arrayrecord"


def test_statistics_survive_their_file():
    statistics = Statistics(2)
    statistics.add(images(1, 3, 4)[0], 1)
    value = json.loads(json.dumps(statistics.to_json()))
    assert Statistics.from_json(value).to_json() == value


def test_two_conversions_of_the_same_input_are_equal(tmp_path: Path):
    """Messages about unreadable files are stored in dataset.json: no address or absolute path may be among them."""
    write_photos(tmp_path / "in", broken=2)
    (tmp_path / "in/train/a/text.png").write_text("not an image")
    shutil.copytree(tmp_path / "in", tmp_path / "moved/in")
    for at, source in enumerate((tmp_path / "in", tmp_path / "in", tmp_path / "moved/in")):
        convert("image-folder", source, tmp_path / str(at), codec="jpeg", max_unreadable=1, progress=False)
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")
    assert "0x" not in (tmp_path / "0/dataset.json").read_text()


@pytest.mark.parametrize("where", ["shard", "notes"])
def test_resuming_compares_checksums(imagenet: Path, reference: Path, tmp_path: Path, where: str):
    output = tmp_path / "set"
    convert("imagenet64", imagenet, output, shards=6, shard_range=(0, 2), progress=False)
    shard = output / "train-00002-of-00006.arrayrecord"
    file = shard if where == "shard" else output / f".convert/{shard.name}.json"
    data = bytearray(file.read_bytes())
    at = len(data) // 2 if where == "shard" else data.index(b'"num_records"') + 16
    data[at] ^= 1
    file.write_bytes(data)
    convert("imagenet64", imagenet, output, shards=6, progress=False)
    assert contents(output) == contents(reference)


def test_joining_compares_checksums(imagenet: Path, tmp_path: Path):
    for at in (0, 1):
        convert("imagenet64", imagenet, tmp_path / str(at), shards=2, shard_range=(at, 2), progress=False)
    shard = tmp_path / "1/train-00001-of-00002.arrayrecord"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match="1 of 3 shards have not been converted yet, such as train-00001"):
        job.join(tmp_path / "0", [tmp_path / "1"], 0)


@pytest.mark.parametrize("damage", ["{", "[]", '{"sha256": "0", "value": {}}', "null", ""])
def test_a_damaged_job_file_is_one_error(imagenet: Path, tmp_path: Path, damage: str):
    convert("imagenet64", imagenet, tmp_path / "set", shard_range=(0, 2), progress=False)
    (tmp_path / "set/.convert/job.json").write_text(damage)
    with pytest.raises(DataError, match=r"job\.json is damaged"):
        convert("imagenet64", imagenet, tmp_path / "set", shard_range=(0, 2), progress=False)


@dataclasses.dataclass
class TinyImages:
    """A large source of 8×8 images."""

    num_images: dict[str, int]
    image_bytes: int | None
    loaded: int = 0
    classes: tuple[str, ...] = ("a",)
    files: tuple[Path, ...] = ()
    facts: dict = dataclasses.field(default_factory=dict)

    def load(self, split: str, index: int) -> tuple[np.ndarray, int]:
        self.loaded += 1
        return images(1, 8, 8, seed=index)[0], 0


class Stop(Exception):
    """Ends a conversion before it writes any shard."""


def shards_and_space(
    source: TinyImages, output: Path, codec: Codec, monkeypatch: pytest.MonkeyPatch
) -> tuple[Mapping[str, int], int]:
    space = []

    def check_space(folder: Path, needed: int) -> None:
        space.append(needed)
        raise Stop

    monkeypatch.setattr(conversion, "open_source", lambda name, request: source)
    monkeypatch.setattr(conversion, "check_space", check_space)
    with pytest.raises(Stop):
        convert("image-folder", None, output, codec=codec, progress=False)
    return job.load(output).num_shards, space[0]


@pytest.mark.parametrize(("codec", "image_bytes"), [("raw", None), ("png", 3 * 256**2), ("jpeg", 3 * 256**2)])
def test_shard_count_and_space_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: Codec, image_bytes: int | None
):
    """100,000 images of 8×8 fit into one shard, and need no more space than their records take."""
    source = TinyImages({"train": 100_000, "val": 5}, image_bytes)
    shards, space = shards_and_space(source, tmp_path / "set", codec, monkeypatch)
    assert shards == {"train": 1, "val": 1}
    assert source.loaded <= 200
    record = np.mean([len(encode(images(1, 8, 8, seed=at)[0], 0, codec=codec)) for at in range(100)])
    assert space == pytest.approx(100_005 * (record + 72), rel=0.05)


def test_raw_images_of_known_size_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = TinyImages({"train": 1_281_167, "val": 50_000}, 3 * 64**2)
    shards, _ = shards_and_space(source, tmp_path / "set", "raw", monkeypatch)
    assert shards == {"train": 118, "val": 5}  # 1,281,167 · 12,288 bytes / 128 MiB = 117.3
    assert source.loaded == 0


def test_large_images_make_no_more_shards_than_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = TinyImages({"train": 3, "val": 2}, 200 * 2**20)
    assert shards_and_space(source, tmp_path / "set", "raw", monkeypatch)[0] == {"train": 3, "val": 2}


@pytest.mark.parametrize(("limit", "workers"), [(10, 1), (100_000, 1), (100_000, 2)])
def test_a_full_disk_is_one_error(tmp_path: Path, limit: int, workers: int):
    """A limit on the size of files stands for a disk that is full from the start, or from a shard on."""
    command = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from gmsop_jax.main import main
sys.exit(main("convert fashion-mnist --output {tmp_path}/set --workers {workers} --shards 2".split()))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "File too large" in result.stderr or "written" in result.stderr
    convert("fashion-mnist", None, tmp_path / "set", shards=2, progress=False)


def test_too_many_open_files_are_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_photos(tmp_path / "in", broken=0)

    def fail(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr("gmsop_jax.conversion.sources.image_folder.read_bytes", fail)
    with pytest.raises(FileAccessError, match="Too many open files") as caught:
        convert("image-folder", tmp_path / "in", tmp_path / "set", max_unreadable=1, progress=False)
    assert "damage" not in str(caught.value)


def test_a_folder_that_cannot_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_photos(tmp_path / "in", broken=0)
    original = os.scandir

    def scandir(path: Path) -> Any:
        if str(path).endswith("/in/train/a"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"failed \(.*Permission denied: .*/in/train/a"):
        convert("image-folder", tmp_path / "in", tmp_path / "set", progress=False)


def test_two_conversions_into_one_folder_take_turns(imagenet: Path, reference: Path, tmp_path: Path):
    """As with two first starts of the quickstart: the second waits, and both end with the whole data set."""
    command = [sys.executable, ROOT / "tools/convert.py", "imagenet64", "--input", imagenet, "--shards", "6"]
    processes = [
        subprocess.Popen(
            [*command, "--output", tmp_path / "set"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        _, message = process.communicate(timeout=60)
        assert process.returncode == 0, message
    assert contents(tmp_path / "set") == contents(reference)


def convert_while_held(imagenet: Path, output: Path, held: str, caplog: pytest.LogCaptureFixture) -> None:
    """Converts while this process holds a lock for half a second, and checks that the conversion says so."""
    lock = FileLock(output / ".convert" / held)
    lock.acquire()
    timer = threading.Timer(0.5, lock.release)
    with caplog.at_level(logging.WARNING):
        timer.start()
        convert("imagenet64", imagenet, output, shards=6, progress=False)
    timer.join()
    assert f"process {os.getpid()} on {socket.gethostname()} is converting to {output}; waiting" in caplog.text


@pytest.mark.parametrize("held", ["part-0-of-1", "part-1-of-2"])
def test_a_conversion_waits_and_names_the_process_that_holds_the_folder(
    imagenet: Path, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, held: str
):
    output = tmp_path / "set"
    convert("imagenet64", imagenet, output, shards=6, shard_range=(1, 2), progress=False)
    convert_while_held(imagenet, output, held, caplog)
    assert contents(output) == contents(reference)


@pytest.mark.slow
def test_waiting_processes_survive_those_that_are_killed(imagenet: Path, reference: Path, tmp_path: Path):
    """Four conversions into one folder start together; one is killed. The others end with the same bytes."""
    command = [sys.executable, ROOT / "tools/convert.py", "imagenet64", "--input", imagenet, "--shards", "6"]
    for delay in (1.2, 1.6, 2.0):
        output = tmp_path / str(delay)
        processes = [
            subprocess.Popen(
                [*command, "--output", output],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(4)
        ]
        time.sleep(delay)
        processes[0].kill()
        messages = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes[1:]] == [0, 0, 0], messages
        assert contents(output) == contents(reference)


def test_file_systems_without_locks(
    imagenet: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    output = tmp_path / "set"
    convert("imagenet64", imagenet, output, shards=6, shard_range=(1, 2), progress=False)
    convert_while_held(imagenet, output, "part-1-of-2", caplog)
    assert "this file system does not support locks" in caplog.text
    assert contents(output) == contents(reference)


def test_parts_are_converted_side_by_side(imagenet: Path, tmp_path: Path):
    (tmp_path / "set/.convert").mkdir(parents=True)
    with FileLock(tmp_path / "set/.convert/part-1-of-2"):  # another process of the same division
        convert("imagenet64", imagenet, tmp_path / "set", shard_range=(0, 2), progress=False)
    assert list((tmp_path / "set").glob("train*"))


def test_off_a_terminal_the_progress_is_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setattr("gmsop_jax.conversion.progress.SECONDS_PER_LINE", 0)
    convert("fashion-mnist", None, tmp_path / "set", limit=20, workers=1)
    verify(tmp_path / "set")
    lines = capfd.readouterr().err.split("\n")
    assert "converting: 1 of 40 images" in lines
    assert "converting: 40 of 40 images" in lines
    assert "verifying: 40 of 40 images" in lines
    assert not any("\r" in line for line in lines)
