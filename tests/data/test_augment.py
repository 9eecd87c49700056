import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from batches import eval_batches, train_batches
from PIL import Image

from gmsop_jax.config import default_config
from gmsop_jax.conversion.convert import convert
from gmsop_jax.data.augment import (
    Centre,
    PaddedCrop,
    ResizedCrop,
    evaluation_image,
    random_parts,
    training_preparation,
)
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.randomness import uniforms
from gmsop_jax.data.resize import resize
from gmsop_jax.errors import DataError
from gmsop_jax.inference.predict import read_image
from gmsop_jax.training import parallel
from gmsop_jax.training.evaluation import create_evaluation
from gmsop_jax.training.setup import prepare

MEAN = np.array([7, 80, 200], np.uint8)
PADDED = {"crop": "padded", "crop_padding": 3}
CROPS = [PADDED, {"crop": "resized", "crop_area": (0.2, 0.9)}]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def bicubic(image: np.ndarray, height: int, width: int) -> Image.Image:
    return Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)


def take(iterator, count: int) -> list[np.ndarray]:
    return [batch["image"] for batch in itertools.islice(iterator, count)]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of six sizes as files in `files`, each of a class of its own, and the data set `set` of them."""
    folder = tmp_path_factory.mktemp("mixed")
    for split, (at, size) in itertools.product(
        ("train", "val"), enumerate([(40, 40), (64, 31), (30, 90), (33, 34), (90, 45), (50, 77)])
    ):
        file = folder / "files" / split / f"{at}" / "image.png"
        file.parent.mkdir(parents=True)
        smooth = bicubic(noise(5, 5, 3, seed=at), *size)
        (smooth.convert("L") if at == 2 else smooth).save(file)
    convert("image-folder", folder / "files", folder / "set", workers=1, progress=False)
    return folder


# --- windows of padded images


def test_padded_equals_the_plain_version():
    images = noise(20, 6, 9, 3)
    draws = np.random.default_rng(1).random((20, 2))
    cropped = PaddedCrop(2)(images, draws, (6, 9), MEAN)
    for image, draw, found in zip(images, draws, cropped, strict=True):
        padded = np.stack([np.pad(image[..., c], 2, constant_values=MEAN[c]) for c in range(3)], -1)
        top, left = int(draw[0] * 5), int(draw[1] * 5)
        np.testing.assert_array_equal(found, padded[top : top + 6, left : left + 9])


def test_padded_by_hand():
    image = np.arange(1, 13, dtype=np.uint8).reshape(1, 2, 2, 3)
    [first] = PaddedCrop(1)(image, np.array([[0.0, 0.0]]), (2, 2), MEAN)
    assert first.tolist() == [[[7, 80, 200]] * 2, [[7, 80, 200], [1, 2, 3]]]
    [last] = PaddedCrop(1)(image, np.array([[0.99, 0.5]]), (2, 2), MEAN)
    assert last.tolist() == [[[7, 8, 9], [10, 11, 12]], [[7, 80, 200]] * 2]


def test_every_offset_is_as_likely():
    count, padding = 8100, 4
    images = np.zeros((count, 5, 5, 3), np.uint8)
    images[..., 0], images[..., 1] = np.mgrid[10:60:10, 10:60:10]
    draws = uniforms(2 * count, 3, 2, 0).reshape(count, 2)
    cropped = PaddedCrop(padding)(images, draws, (5, 5), np.zeros(3, np.uint8))
    rows = np.floor(draws * 9).astype(int)
    seen = np.bincount(rows[:, 0] * 9 + rows[:, 1], minlength=81)
    assert len(seen) == 81
    assert abs(seen / 100 - 1).max() < 0.45  # four and a half standard deviations
    for image, (top, left) in zip(cropped[:500], rows[:500].tolist(), strict=True):
        corner = np.zeros(3) if min(top, left) < 4 else [10 * (top - 3), 10 * (left - 3), 0]
        assert image[0, 0].tolist() == list(corner)


def test_padded_takes_gray_and_other_sizes():
    images = [noise(8, 8, 1), noise(8, 8, 3), noise(4, 6, 1)]
    cropped = PaddedCrop(2)(images, np.full((3, 2), 0.5), (8, 8), MEAN)  # the middle: nothing is cut off
    np.testing.assert_array_equal(cropped[0], images[0].repeat(3, 2))
    np.testing.assert_array_equal(cropped[1], images[1])
    np.testing.assert_array_equal(cropped[2], resize(images[2], (8, 8), "pillow").repeat(3, 2))


# --- random parts, resized


def slow_part(height: int, width: int, draws: list[float], area: tuple[float, float]) -> tuple[int, int, int, int]:
    """One image, one try after the other, in the words of the paper's usual implementation."""
    for share, aspect in zip(draws[:10], draws[10:20], strict=True):
        pixels = height * width * (area[0] + (area[1] - area[0]) * share)
        ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * aspect)
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            return math.floor(draws[20] * (height - h + 1)), math.floor(draws[21] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("area", [(0.08, 1.0), (0.5, 0.5), (0.9, 1.0), (1.0, 1.0)])
def test_parts_equal_the_slow_version(area: tuple[float, float]):
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 120, (400, 2))
    draws = rng.random((400, 22))
    expected = [
        slow_part(height, width, row, area)
        for (height, width), row in zip(shapes.tolist(), draws.tolist(), strict=True)
    ]
    np.testing.assert_array_equal(random_parts(shapes, draws, area), expected)


def test_parts_by_hand():
    draws = np.full((3, 22), 0.5)  # aspect 1
    draws[1, 20:] = 0.0, 0.999
    draws[2, 0], draws[2, 10] = 1, 1  # all of it at 4:3 doesn't fit; the second try does
    parts = random_parts(np.full((3, 2), 100), draws, (0.0, 0.5))
    assert parts[:2].tolist() == [[25, 25, 50, 50], [0, 50, 50, 50]]
    assert random_parts(np.full((3, 2), 100), draws, (0.0, 1.0))[2].tolist() == [15, 15, 71, 71]
    # too wide and too high for a whole image: the most of it with aspect 4:3, 3:4
    assert random_parts(np.array([[30, 90], [80, 30]]), draws[:2], (1.0, 1.0)).tolist() == [
        [0, 25, 30, 40],
        [20, 0, 40, 30],
    ]


def test_parts_have_the_shares_and_aspects_asked_for():
    draws = uniforms(22 * 4000, 0).reshape(4000, 22)
    top, left, height, width = random_parts(np.full((4000, 2), 1000), draws, (0.1, 0.4)).T
    shares = height * width / 1e6
    assert 0.099 < shares.min() < 0.101
    assert 0.399 < shares.max() < 0.401
    assert abs(shares.mean() - 0.25) < 0.006  # four standard deviations
    logarithms = np.log(width / height) / math.log(4 / 3)
    assert abs(logarithms).max() < 1.01
    assert abs(np.histogram(logarithms, 4)[0] / 1000 - 1).max() < 0.12
    for start, room in ((top, 1000 - height), (left, 1000 - width)):
        assert (start <= room).all()
        assert abs(np.histogram(start / room, 4)[0] / 1000 - 1).max() < 0.12


def test_resized_equals_pillow_by_hand():
    images = [noise(40, 30, 3), noise(25, 60, 1, seed=1)]
    draws = np.random.default_rng(2).random((2, 22))
    found = ResizedCrop((0.3, 0.8))(images, draws, (16, 24), MEAN)
    for image, row, result in zip(images, draws, found, strict=True):
        top, left, height, width = slow_part(image.shape[0], image.shape[1], row.tolist(), (0.3, 0.8))
        part = Image.fromarray(image.squeeze()).crop((left, top, left + width, top + height))
        expected = np.asarray(part.resize((24, 16), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(result.squeeze(), expected)


def test_the_whole_of_a_square_is_a_plain_resize(fashion: Path):
    crop = {"crop": "resized", "crop_area": (1.0, 1.0)}
    cropped = next(train_batches(fashion, batch_size=40, seed=0, image_size=20, **crop))
    plain = next(train_batches(fashion, batch_size=40, seed=0, image_size=20))
    np.testing.assert_array_equal(cropped["image"], plain["image"])


# --- in the pipeline


@pytest.mark.parametrize("crop", CROPS)
def test_crops_change_images_and_nothing_else(fashion: Path, crop: dict):
    plain, cropped = (next(train_batches(fashion, batch_size=200, seed=5, **c)) for c in ({}, crop))
    assert cropped["image"].shape == plain["image"].shape
    np.testing.assert_array_equal(cropped["label"], plain["label"])
    assert (cropped["image"] != plain["image"]).any((1, 2, 3)).mean() > 0.9


def test_a_padded_batch_is_made_of_the_plain_one(fashion: Path):
    # 600 images are read in three blocks
    plain = next(train_batches(fashion, batch_size=600, seed=5, start_step=7, flip=False))["image"]
    cropped = next(train_batches(fashion, batch_size=600, seed=5, start_step=7, **PADDED))["image"]
    unflipped = next(train_batches(fashion, batch_size=600, seed=5, start_step=7, flip=False, **PADDED))
    mirrored = (cropped == unflipped["image"][:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (cropped == unflipped["image"]).all((1, 2, 3))).all()
    assert 0.4 < mirrored.mean() < 0.6  # five standard deviations
    padded = np.full((600, 34, 34, 3), np.round(Manifest.load(fashion).mean_rgb), np.uint8)
    padded[:, 3:31, 3:31] = plain
    offsets = np.floor(uniforms(1200, 5, 2, 7).reshape(600, 2) * 7).astype(int)
    for row, (top, left) in enumerate(offsets.tolist()):
        np.testing.assert_array_equal(unflipped["image"][row], padded[row, top : top + 28, left : left + 28])


def test_padding_may_have_another_colour(fashion: Path):
    crop = {"crop": "padded", "crop_padding": 28}  # some windows are padding alone
    images = next(
        train_batches(fashion, batch_size=400, seed=5, padding_rgb=(1.2, 250.4, 3.6), **crop),
    )["image"]
    assert (images.reshape(400, -1, 3) == (1, 250, 4)).all(2).mean() > 0.3


@pytest.mark.parametrize("crop", CROPS)
def test_crops_depend_on_seed_step_and_row_alone(fashion: Path, crop: dict):
    def batches(count: int, **arguments) -> list[np.ndarray]:
        arguments = {"batch_size": 60, "seed": 2, "drop_last": False, **crop, **arguments}
        return take(train_batches(fashion, **arguments), count)

    whole = batches(90)  # the 84th of an epoch has 20 rows
    assert len(whole[83]) == 20
    for resumed, image in zip(batches(10, start_step=80), whole[80:], strict=True):
        np.testing.assert_array_equal(resumed, image)
    for count in (2, 3):
        parts = [batches(90, process_index=at, process_count=count, num_threads=1) for at in range(count)]
        for image, *shares in zip(whole, *parts, strict=True):
            np.testing.assert_array_equal(image, np.concatenate(shares))
    plain = batches(1, crop="none")[0]
    assert (batches(1, seed=3)[0] != whole[0]).any()
    assert (plain != whole[0]).any()


@pytest.mark.parametrize("crop", CROPS)
def test_a_damaged_record_does_not_change_the_other_images(fashion: Path, crop: dict, tmp_path: Path):
    good = next(train_batches(fashion, batch_size=100, seed=1, **crop))
    data = shutil.copytree(fashion, tmp_path / "set")
    with sorted(data.glob("train*"))[1].open("r+b") as shard:
        shard.seek(500_000)
        shard.write(bytes(300_000))  # a fifth of its records
    skipped = next(train_batches(data, batch_size=100, seed=1, on_corrupt="skip", **crop))
    same = (good["image"] == skipped["image"]).all((1, 2, 3))
    assert 80 <= same.sum() < 100


def test_parts_of_images_of_any_size(mixed: Path):
    images = take(train_batches(mixed / "set", batch_size=6, seed=0, crop="resized", image_size=24), 3)
    assert {image.shape for image in images} == {(6, 24, 24, 3)}
    with pytest.raises(DataError, match="differ in size: set config"):
        train_batches(mixed / "set", batch_size=6, seed=0, crop="resized")


def test_configured_crops():
    data = default_config().data
    assert training_preparation(data) == Centre(0)
    data.update(crop="padded", crop_padding=5)
    assert training_preparation(data) == PaddedCrop(5)
    data.update(crop="resized", crop_area=(0.1, 1))
    assert training_preparation(data) == ResizedCrop((0.1, 1.0))


def test_a_run_trains_on_the_crops_configured(fashion: Path, tmp_path: Path):
    c = default_config()
    c.data.dir, c.seed, c.train.batch_size = str(fashion), 4, 24
    for kind in ("none", "padded", "resized"):
        crop = {"crop": kind, "crop_padding": 2, "crop_area": (0.3, 0.5)}
        c.data.update(crop)
        found = next(prepare(c, tmp_path).batches(3))
        expected = next(train_batches(fashion, batch_size=24, seed=4, start_step=3, **crop))
        np.testing.assert_array_equal(found["image"], expected["image"])


# --- the centre, for evaluation


@pytest.mark.parametrize(
    ("shape", "resized"),
    [((300, 200), (384, 256)), ((200, 333), (256, 426)), ((256, 256), (256, 256)), ((50, 20), (640, 256))],
)
def test_centre_equals_pillow_by_hand(shape: tuple[int, int], resized: tuple[int, int]):
    image = noise(*shape, 3)
    left, top = (resized[1] - 224) // 2, (resized[0] - 224) // 2
    expected = bicubic(image, *resized).crop((left, top, left + 224, top + 224))
    np.testing.assert_array_equal(evaluation_image(image, (224, 224), 256), np.asarray(expected))
    np.testing.assert_array_equal(evaluation_image(image, (224, 224), 0), np.asarray(bicubic(image, 224, 224)))


def test_a_long_strip_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch):
    strip = np.repeat(np.arange(60_000, dtype=np.uint32)[None, :, None] // 240, 1, 0).astype(np.uint8)
    largest = []

    def watched(image: np.ndarray, size: tuple[int, int], method: str) -> np.ndarray:
        largest.append(size[0] * size[1])
        return resize(image, size, "pillow")

    monkeypatch.setattr("gmsop_jax.data.augment.resize", watched)
    assert abs(evaluation_image(strip, (8, 8), 10).astype(int) - 125).max() <= 1
    assert max(largest) <= 16 * 100


def test_evaluation_cuts_out_the_centre(mixed: Path, tmp_path: Path):
    batch = next(eval_batches(mixed / "set", "val", batch_size=8, image_size=24, resize=27))
    assert batch["mask"].sum() == 6
    for image, label in zip(batch["image"][batch["mask"]], batch["label"], strict=False):
        file = mixed / "files" / "val" / str(label) / "image.png"
        with Image.open(file) as stored:
            scale = 27 / min(stored.size)
            resized = stored.resize(
                (int(scale * stored.width + 1e-9), int(scale * stored.height + 1e-9)), Image.Resampling.BICUBIC
            )
            left, top = (resized.width - 24) // 2, (resized.height - 24) // 2
            expected = np.asarray(resized.crop((left, top, left + 24, top + 24)).convert("RGB"))
        np.testing.assert_array_equal(image, expected)
        np.testing.assert_array_equal(read_image(file, (24, 24), 27), image)  # what a prediction sees


def test_evaluation_refuses_a_centre_larger_than_the_image(fashion: Path):
    with pytest.raises(DataError, match=r"config\.eval\.resize is 20, which is smaller than the centre crop of 24×24"):
        eval_batches(fashion, "val", batch_size=8, image_size=24, resize=20)


def test_a_run_is_evaluated_on_the_centre_configured(fashion: Path, monkeypatch: pytest.MonkeyPatch):
    c = default_config()
    c.data.dir, c.data.image_size, c.eval.resize, c.eval.batch_size = str(fashion), 24, 32, 1000
    c.model.num_classes = 10
    seen = []

    def eval_step(variables, batch):
        seen.append(np.asarray(batch["image"]))
        return {"loss_sum": 0.0, "top1_errors": 0, "top5_errors": 0, "count": 1}

    monkeypatch.setattr(parallel, "compile_eval_step", lambda step, mesh: eval_step)
    create_evaluation(c, Manifest.load(fashion), (0.0, 0.0, 0.0), parallel.create_mesh())({})
    expected = next(eval_batches(fashion, "val", batch_size=1000, image_size=24, resize=32))["image"]
    np.testing.assert_array_equal(seen[0], expected)
    assert (expected != next(eval_batches(fashion, "val", batch_size=1000, image_size=24))["image"]).any()
