import itertools
from pathlib import Path

import numpy as np
import pytest
from batches import eval_batches, train_batches

from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.verify import verify
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.pipeline import steps_per_epoch
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError


def take(iterator, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(iterator, count))


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def all_records(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split read record by record with the plain codec."""
    reader = ShardReader(directory, Manifest.load(directory).splits[split].shards)
    examples = [decode(record) for record in reader.read(np.arange(len(reader)))]
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])


def test_shapes_and_types(fashion: Path):
    batch = next(train_batches(fashion, batch_size=32, seed=0))
    assert batch["image"].shape == (32, 28, 28, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (32,)
    assert batch["label"].dtype == np.int32


def test_an_epoch_is_a_permutation_and_the_next_another(fashion: Path):
    images, _ = all_records(fashion, "train")
    known = {image.tobytes(): at for at, image in enumerate(images)}
    steps = steps_per_epoch(5000, 500, drop_last=True)
    batches = take(train_batches(fashion, batch_size=500, seed=0, flip=False), 2 * steps)
    orders = [
        [known[image.tobytes()] for batch in epoch for image in batch["image"]]
        for epoch in (batches[:steps], batches[steps:])
    ]
    # `known` keeps one of equal images, of which the sample has none
    assert len(known) == 5000
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(5000))
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_labels_stay_with_their_images(fashion: Path):
    images, labels = all_records(fashion, "train")
    known = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for batch in take(train_batches(fashion, batch_size=100, seed=3, flip=False), 3):
        assert [known[image.tobytes()] for image in batch["image"]] == batch["label"].tolist()


def test_flips_mirror_half_of_the_images(fashion: Path):
    plain = next(train_batches(fashion, batch_size=400, seed=1, flip=False))["image"]
    flipped = next(train_batches(fashion, batch_size=400, seed=1))["image"]
    mirrored = (flipped == plain[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (flipped == plain).all((1, 2, 3))).all()
    assert 0.4 < mirrored.mean() < 0.6  # four standard deviations


def test_start_step_continues_exactly(fashion: Path):
    whole = take(train_batches(fashion, batch_size=300, seed=7), 40)
    assert_same(whole[23:], take(train_batches(fashion, batch_size=300, seed=7, start_step=23), 17))


def test_state_round_trips(fashion: Path):
    iterator = train_batches(fashion, batch_size=300, seed=7, start_step=5)
    take(iterator, 3)
    state = iterator.get_state()
    assert state == {"next_index": 8}
    expected = take(iterator, 4)
    other = train_batches(fashion, batch_size=300, seed=7)
    other.set_state(state)
    assert_same(expected, take(other, 4))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_the_global_batch(fashion: Path, count: int):
    whole = take(train_batches(fashion, batch_size=60, seed=2, drop_last=False), 90)
    parts = [
        take(
            train_batches(
                fashion,
                batch_size=60,
                seed=2,
                drop_last=False,
                process_index=index,
                process_count=count,
            ),
            90,
        )
        for index in range(count)
    ]
    joined = [{key: np.concatenate([part[step][key] for part in parts]) for key in whole[0]} for step in range(90)]
    assert_same(whole, joined)


def test_seeds_differ(fashion: Path):
    first, second = (next(train_batches(fashion, batch_size=50, seed=seed))["image"] for seed in (0, 1))
    assert (first != second).any()


def test_smaller_last_batch(fashion: Path):
    sizes = [len(b["label"]) for b in take(train_batches(fashion, batch_size=900, seed=0, drop_last=False), 7)]
    assert sizes == [900, 900, 900, 900, 900, 500, 900]


@pytest.mark.slow
def test_workers_give_the_same(fashion: Path):
    expected = take(train_batches(fashion, batch_size=50, seed=4, start_step=10), 6)
    iterator = train_batches(fashion, batch_size=50, seed=4, start_step=10, num_workers=2)
    assert_same(expected[:3], take(iterator, 3))
    state = iterator.get_state()
    assert_same(expected[3:], take(iterator, 3))
    iterator.set_state(state)
    assert_same(expected[3:4], take(iterator, 1))
    iterator.close()


def test_eval_is_one_padded_pass(fashion: Path):
    images, labels = all_records(fashion, "val")
    batches = list(eval_batches(fashion, "val", batch_size=300))
    assert [len(batch["mask"]) for batch in batches] == [300] * 4
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.sum() == 1000
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in batches])[mask], images)
    np.testing.assert_array_equal(np.concatenate([b["label"] for b in batches])[mask], labels)
    assert not batches[-1]["image"][100:].any()


def test_eval_over_processes_sees_every_image_once(fashion: Path):
    parts = [list(eval_batches(fashion, "val", batch_size=400, process_index=at, process_count=4)) for at in range(4)]
    assert sum(batch["mask"].sum() for part in parts for batch in part) == 1000
    assert {batch["image"].shape for part in parts for batch in part} == {(100, 28, 28, 3)}
    labels = np.concatenate([b["label"][b["mask"]] for batches in zip(*parts, strict=True) for b in batches])
    np.testing.assert_array_equal(labels, all_records(fashion, "val")[1])


def test_resizes(fashion: Path):
    batch = next(eval_batches(fashion, "val", batch_size=8, image_size=14))
    assert batch["image"].shape == (8, 14, 14, 3)
    plain = next(eval_batches(fashion, "val", batch_size=8))
    assert abs(float(batch["image"].mean()) - float(plain["image"].mean())) < 2


def test_png_records_read_the_same(fashion: Path, tmp_path: Path):
    convert("fashion-mnist", None, tmp_path / "set", codec="png", progress=False)
    assert_same(
        take(train_batches(fashion, batch_size=64, seed=5), 2),
        take(train_batches(tmp_path / "set", batch_size=64, seed=5), 2),
    )


def test_jpeg_records_read_nearly_the_same(fashion: Path, tmp_path: Path):
    convert("fashion-mnist", None, tmp_path / "set", codec="jpeg", progress=False)
    verify(tmp_path / "set", progress=False)
    [exact], [near] = (take(train_batches(path, batch_size=64, seed=5), 1) for path in (fashion, tmp_path / "set"))
    np.testing.assert_array_equal(exact["label"], near["label"])
    error = np.abs(exact["image"].astype(int) - near["image"])
    assert 0 < error.mean() < 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "seed": 0}, "batch_size is 0"),
        ({"batch_size": 5001, "seed": 0}, "5000 images do not fill a batch of 5001"),
        ({"batch_size": 8, "seed": -1}, "seed -1"),
        ({"batch_size": 8, "seed": 0, "process_index": 2, "process_count": 2}, "process_index 2"),
        ({"batch_size": 9, "seed": 0, "process_count": 2}, "batch_size 9"),
    ],
)
def test_refuses(fashion: Path, arguments: dict, message: str):
    with pytest.raises(DataError, match=message):
        train_batches(fashion, **arguments)


def test_unknown_split(fashion: Path):
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        eval_batches(fashion, "test", batch_size=8)
