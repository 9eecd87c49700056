import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from foreign import images, jpeg, write_imagenet, write_imdb
from PIL import Image

from gmsop_jax.conversion import job
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.shards import Statistics, plan
from gmsop_jax.conversion.sources import Options
from gmsop_jax.conversion.verify import verify
from gmsop_jax.data.manifest import Manifest, sha256
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import ConfigError, DataError

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
    gray, rgb = Statistics([0]), Statistics([0])
    gray.add(image, 0)
    rgb.add(np.repeat(image, 3, 2), 0)
    assert gray == rgb


def test_workers_make_the_same_bytes(imagenet: Path, reference: Path, tmp_path: Path):
    convert("imagenet64", imagenet, tmp_path / "set", shards=6, workers=2, progress=False)
    assert contents(tmp_path / "set") == contents(reference)


def test_seed_changes_the_order_of_training_only(imagenet: Path, reference: Path, tmp_path: Path):
    convert("imagenet64", imagenet, tmp_path / "set", shards=6, seed=1, progress=False)
    found, before = contents(tmp_path / "set"), contents(reference)
    changed = {name for name in found if found[name] != before[name]}
    assert changed == {name for name in found if name.startswith("train")} | {"dataset.json"}


def test_manifest_tells_where_it_came_from(imagenet: Path, reference: Path):
    provenance = Manifest.load(reference).provenance
    assert provenance["source"] == "imagenet64"
    assert provenance["tool_version"]
    names = {file["name"]: file["sha256"] for file in provenance["files"]}
    assert names["train_data_batch_10"] == sha256(imagenet / "train_data_batch_10")
    assert len(names) == 4


def test_again_returns_at_once(imagenet: Path, reference: Path):
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    manifest = convert("imagenet64", imagenet, reference, shards=6, progress=False)
    assert manifest == Manifest.load(reference)
    assert before == {path: path.stat().st_mtime_ns for path in reference.iterdir()}


def test_other_settings_on_a_finished_set_are_refused(imagenet: Path, reference: Path):
    before = contents(reference)
    with pytest.raises(DataError, match="already holds data set 'imagenet64'"):
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
    from gmsop_jax.conversion.sources.imagenet64 import ImageNet64

    original, loaded = ImageNet64.load, []

    def load(self: ImageNet64, split: str, index: int) -> tuple[np.ndarray, int]:
        loaded.append(index)
        if len(loaded) == 500:
            raise KeyboardInterrupt
        return original(self, split, index)

    monkeypatch.setattr(ImageNet64, "load", load)
    output = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt):
        convert("imagenet64", imagenet, output, shards=6, progress=False)
    assert not list(output.glob("*.tmp-*"))
    with pytest.raises(DataError, match="half-written"):
        Manifest.load(output)
    with pytest.raises(DataError, match=r"unfinished conversion with other settings .*seed: 0 then, 3 now"):
        convert("imagenet64", imagenet, output, shards=6, seed=3, progress=False)
    loaded.clear()
    monkeypatch.setattr(ImageNet64, "load", lambda *args: loaded.append(0) or original(*args))
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
def test_a_killed_worker_is_told(tmp_path: Path):
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
    _, told = process.communicate()
    assert process.returncode == 2
    assert "error: a worker process ended unexpectedly" in told
    assert "Traceback" not in told


def test_shard_ranges_join(imagenet: Path, reference: Path, tmp_path: Path):
    output, other = tmp_path / "set", tmp_path / "other"
    for at, where in enumerate((output, other, output)):
        assert convert("imagenet64", imagenet, where, shards=6, shard_range=(at, 3), progress=False) is None
    with pytest.raises(DataError, match=r"3 of 8 shards aren't converted yet, train-00001-of-00006"):
        job.finish(output, 0)
    job.gather(output, other)
    job.finish(output, 0)
    assert contents(output) == contents(reference)


def test_gather_refuses_another_conversion(imagenet: Path, tmp_path: Path):
    for seed in (0, 1):
        convert("imagenet64", imagenet, tmp_path / str(seed), seed=seed, shard_range=(0, 2), progress=False)
    with pytest.raises(DataError, match="different conversions"):
        job.gather(tmp_path / "0", tmp_path / "1")
    with pytest.raises(DataError, match="no unfinished conversion"):
        job.gather(tmp_path / "0", tmp_path)


def test_foreign_output_is_refused_and_untouched(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match=r"holds other files \(thesis.tex\)"):
        convert("fashion-mnist", None, tmp_path, progress=False)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(DataError, match="is a file"):
        convert("fashion-mnist", None, tmp_path / "thesis.tex", progress=False)


def test_stray_shards_are_foreign(tmp_path: Path):
    (tmp_path / "train-00000-of-00001.arrayrecord").write_text("whose?")
    with pytest.raises(DataError, match="holds other files"):
        convert("fashion-mnist", None, tmp_path, progress=False)


def test_a_bad_source_leaves_no_trace(tmp_path: Path):
    with pytest.raises(DataError):
        convert("imagenet64", tmp_path, tmp_path / "deep/set", progress=False)
    assert not (tmp_path / "deep/set").exists()


def test_unwritable_output(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="can't be made"):
        convert("fashion-mnist", None, tmp_path / "file" / "set", progress=False)


def test_full_disk_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match="needs 5 MiB and its disk has 1 free"):
        convert("fashion-mnist", None, tmp_path / "set", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"shards": -1}, "shards is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"codec": "webp"}, "unknown codec 'webp'; one of raw, png, jpeg"),
        ({"shard_range": (2, 2)}, "shard range 2/2"),
        ({"max_unreadable": 2}, "max_unreadable is 2"),
    ],
)
def test_wrong_numbers(tmp_path: Path, arguments: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        convert("fashion-mnist", None, tmp_path / "set", **arguments)
    assert not (tmp_path / "set").exists()


def test_more_shards_than_images(tmp_path: Path):
    with pytest.raises(DataError, match="6 shards for the 5 images"):
        convert("fashion-mnist", None, tmp_path / "set", limit=5, shards=6, progress=False)


def test_labels_beyond_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gmsop_jax.conversion.sources.fashion_mnist import FashionMnist

    monkeypatch.setattr(FashionMnist, "load", lambda self, split, index: (self.images[split][index], 10))
    with pytest.raises(DataError, match="has label 10; 10 classes go from 0 to 9"):
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
    with pytest.raises(DataError, match=r"3 of 23 images are unreadable .* more than the allowed share 0.01"):
        convert("image-folder", tmp_path / "in", tmp_path / "set", **arguments)
    manifest = convert("image-folder", tmp_path / "in", tmp_path / "set", max_unreadable=0.5, **arguments)
    assert manifest is not None
    assert manifest.splits["train"].image_size == (8, 8)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_image_no_record_holds(tmp_path: Path, workers: int):
    write_photos(tmp_path / "in", broken=0)
    Image.new("L", (2**16, 1)).save(tmp_path / "in/train/a/long.png")
    with pytest.raises(DataError, match="image is 1×65536; sides go from 1 to 65535"):
        convert("image-folder", tmp_path / "in", tmp_path / "set", workers=workers, shards=2, progress=False)
    assert not list((tmp_path / "set").glob("*.tmp-*"))


def test_another_stored_mean_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_imdb(tmp_path / "good.mat", [1, 1, 2], [1, 2, 1])
    convert("imdb-mat", tmp_path / "good.mat", tmp_path / "good", progress=False)
    assert "stores the mean" not in caplog.text
    write_imdb(tmp_path / "bad.mat", [2, 1, 1], [1, 2, 1])  # its maker took the mean of the wrong set
    convert("imdb-mat", tmp_path / "bad.mat", tmp_path / "bad", progress=False)
    assert "stores the mean" in caplog.text


def test_plan_covers_everything_once():
    tasks = plan({"train": 103, "val": 7}, {"train": 4, "val": 1})
    rows = [row for task in tasks if task.split == "train" for row in range(task.start, task.stop)]
    assert rows == list(range(103))
    assert tasks[-1].file == "val-00000-of-00001.arrayrecord"


def test_notes_survive_their_file(reference: Path):
    value = json.loads(json.dumps(Statistics([1, 2], {(3, 4)}, 5, [6] * 3, [[7] * 3] * 3).to_json()))
    assert Statistics.from_json(value) == Statistics([1, 2], {(3, 4)}, 5, [6] * 3, [[7] * 3] * 3)
