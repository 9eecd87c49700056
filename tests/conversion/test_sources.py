import concurrent.futures
import contextlib
import gzip
import io
import os
import shutil
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from foreign import imagenet_batches, images, jpeg, write_imagenet, write_imdb, write_places, write_tar
from PIL import Image

from gmsop_jax.conversion.sources import (
    NAMES,
    Options,
    Request,
    Source,
    UnreadableImage,
    imagenet64,
    open_source,
)
from gmsop_jax.conversion.sources.files import npz_arrays
from gmsop_jax.conversion.sources.images import Names, decode_image
from gmsop_jax.data.resize import imresize
from gmsop_jax.errors import ConfigError, DataError
from gmsop_jax.files import sha256
from gmsop_jax.interop.matfile import isolated


def opened(name: str, path: Path | None, tmp_path: Path, **options) -> Source:
    return open_source(name, Request(path, tmp_path / "scratch", options=Options(**options)))


def everything(source: Source, split: str) -> tuple[np.ndarray, list[int]]:
    loaded = [source.load(split, at) for at in range(source.num_images[split])]
    return np.stack([image for image, _ in loaded]), [label for _, label in loaded]


def test_unknown_source_and_option(tmp_path: Path):
    with pytest.raises(ConfigError, match="unknown source 'cifar'; it must be one of domains, elpv"):
        opened("cifar", None, tmp_path)
    message = r"'imagenet64' does not accept --size .*; it accepts --allow-partial, --follow-links"
    with pytest.raises(ConfigError, match=message):
        opened("imagenet64", None, tmp_path, size=3)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"fashion-mnist"}))
def test_input_is_needed_and_must_exist(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # as if it were not installed
    with pytest.raises(DataError, match="needs --input"):
        opened(name, None, tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        opened(name, tmp_path / "none", tmp_path)


# --- Fashion-MNIST


def write_idx(folder: Path, name: str, values: np.ndarray, *, packed: bool) -> None:
    data = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(data) if packed else data)


def write_fashion(folder: Path, *, packed: bool = False) -> None:
    for prefix, count in (("train", 7), ("t10k", 3)):
        write_idx(folder, f"{prefix}-images-idx3-ubyte", images(count, 28, 28)[..., 0], packed=packed)
        write_idx(folder, f"{prefix}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8), packed=packed)


def test_the_embedded_sample(tmp_path: Path):
    source = opened("fashion-mnist", None, tmp_path)
    assert source.num_images == {"train": 5000, "val": 1000}
    assert everything(source, "val")[0].shape == (1000, 28, 28)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path: Path, packed: bool):
    write_fashion(tmp_path, packed=packed)
    source = opened("fashion-mnist", tmp_path, tmp_path)
    pixels, labels = everything(source, "train")
    np.testing.assert_array_equal(pixels, images(7, 28, 28)[..., 0])
    assert labels == list(range(7))
    assert source.num_images["val"] == 3


def test_damaged_idx_files(tmp_path: Path):
    with pytest.raises(DataError, match="lacks train-images-idx3-ubyte"):
        opened("fashion-mnist", tmp_path, tmp_path)
    write_fashion(tmp_path)
    file = tmp_path / "train-images-idx3-ubyte"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(DataError, match="requires 5,488 values, but it has 5,487"):
        opened("fashion-mnist", tmp_path, tmp_path)
    file.write_bytes(good + bytes(9))
    with pytest.raises(DataError, match="requires 5,488 values, but it has more"):
        opened("fashion-mnist", tmp_path, tmp_path)
    file.write_bytes(b"\1" + good[1:])
    with pytest.raises(DataError, match="is not an IDX file"):
        opened("fashion-mnist", tmp_path, tmp_path)
    write_idx(tmp_path, file.name, images(6, 28, 28)[..., 0], packed=False)
    with pytest.raises(DataError, match=r"has the shape \(6, 28, 28\), but .* has 7 labels"):
        opened("fashion-mnist", tmp_path, tmp_path)
    file.unlink()
    (tmp_path / f"{file.name}.gz").write_bytes(gzip.compress(good)[:-9])
    with pytest.raises(DataError, match="can't be read"):
        opened("fashion-mnist", tmp_path, tmp_path)


def test_a_gzipped_idx_file_cannot_claim_gigabytes(tmp_path: Path):
    """A file of a few bytes whose header, and whose content too, claims 2^32 - 1 zeros."""
    write_fashion(tmp_path, packed=True)
    header = bytes([0, 0, 8, 3]) + np.array([2**32 - 1, 1, 1], ">u4").tobytes()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + bytes(10**6)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz can't be read \(its arrays claim more"):
        opened("fashion-mnist", tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_fuzzed_idx_files_raise_one_error(tmp_path: Path, packed: bool):
    write_fashion(tmp_path, packed=packed)
    file = tmp_path / ("train-labels-idx1-ubyte" + ".gz" * packed)
    good, draw, refused = file.read_bytes(), np.random.default_rng(0), 0
    for case in range(5000):
        damaged = bytearray(good)
        for _ in range(draw.integers(1, 4)):
            damaged[draw.integers(len(good))] = draw.integers(256)
        if case % 5 == 0:
            del damaged[draw.integers(len(good)) :]
        file.write_bytes(damaged)
        try:
            opened("fashion-mnist", tmp_path, tmp_path)
        except DataError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("imagenet64", "train_data_batch_2"),
        ("imagenet64", "map_clsloc.txt"),
        ("places365", "categories_places365.txt"),
        ("places365", "val_256.tar"),
        ("fashion-mnist", "train-images-idx3-ubyte"),
    ],
)
def test_fifos_are_not_read(tmp_path: Path, source: str, name: str):
    """Reading a FIFO would wait forever."""
    {"imagenet64": lambda: write_imagenet(tmp_path, "pickle"), "places365": lambda: small_places(tmp_path)}.get(
        source, lambda: write_fashion(tmp_path)
    )()
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"lacks|neither|is not a file"):
        opened(source, tmp_path, tmp_path)


@pytest.mark.parametrize("follow", [False, True])
def test_class_names_outside_of_the_input_are_read_only_if_asked_for(tmp_path: Path, follow: bool):
    write_imagenet(tmp_path / "in", "pickle")
    (tmp_path / "in" / "map_clsloc.txt").rename(tmp_path / "names.txt")
    (tmp_path / "in" / "map_clsloc.txt").symlink_to(tmp_path / "names.txt")
    with contextlib.nullcontext() if follow else pytest.raises(DataError, match="points outside the input"):
        opened("imagenet64", tmp_path / "in", tmp_path, allow_partial=True, follow_links=follow)


def test_a_compressed_batch_cannot_fill_the_disk(tmp_path: Path):
    write_imagenet(tmp_path / "in", "npz")
    file = tmp_path / "in" / "train_data_batch_2.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("data.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": (2**18, 768)})
        for _ in range(192):
            member.write(bytes(2**20))
    with pytest.raises(DataError, match="claim more than 134,217,728 bytes"):
        opened("imagenet64", tmp_path / "in", tmp_path, allow_partial=True)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 2**25


def test_a_batch_cannot_hold_a_billion_empty_images(tmp_path: Path):
    write_imagenet(tmp_path, "npz")
    file = tmp_path / "train_data_batch_2.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, shape in (("data", (10**9, 0)), ("labels", (10**8,))):
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", header.getvalue() + bytes(np.prod(shape)))
    with pytest.raises(DataError, match=r"'data' has the shape \(1000000000, 0\)"):
        opened("imagenet64", tmp_path, tmp_path)


# --- downsampled ImageNet


@pytest.mark.parametrize("layout", ["pickle", "npz", "npz-compressed", "zip", "zip-npz"])
def test_imagenet_layouts(tmp_path: Path, layout: str):
    write_imagenet(tmp_path / "in", layout)
    source = opened("imagenet64", tmp_path / "in", tmp_path)
    assert source.num_images == {"train": 60, "val": 20}
    assert source.classes == ("name_1", "crane (n00000002)", "name_3", "crane (n00000004)", "name_5")
    pixels, labels = everything(source, "train")
    # batches in the order of their numbers: 1, 2, 10
    np.testing.assert_array_equal(pixels, np.concatenate([images(20, 8, 8, seed=at) for at in range(3)]))
    assert labels == [(at + row) % 5 for at in range(3) for row in range(20)]
    np.testing.assert_array_equal(everything(source, "val")[0], images(20, 8, 8, seed=3))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_imagenet_pickle_protocols(tmp_path: Path, protocol: int):
    write_imagenet(tmp_path / "in", "pickle", count=5, protocol=protocol)
    pixels, labels = everything(opened("imagenet64", tmp_path / "in", tmp_path), "val")
    np.testing.assert_array_equal(pixels, images(5, 8, 8, seed=3))
    assert labels == [label - 1 for label in imagenet_batches(5)["val_data"]["labels"]]


def test_imagenet_without_names(tmp_path: Path):
    write_imagenet(tmp_path / "in", "npz")
    (tmp_path / "in" / "map_clsloc.txt").unlink()
    assert opened("imagenet64", tmp_path / "in", tmp_path).classes[999] == "class 1000"


def test_imagenet_refuses(tmp_path: Path):
    with pytest.raises(DataError, match="contains no train_data_batch_1"):
        opened("imagenet64", tmp_path, tmp_path)
    batches = write_imagenet(tmp_path, "npz")
    for change, message in (
        ({"labels": [0, *range(1, 20)]}, r"labels are 0 to 19; expected 1 to 5 \(1-based\)"),
        ({"labels": [1.5] * 20}, "not an array of 20 integers"),
        ({"labels": [1] * 19}, "there are 20 images, but 'labels' is not an array of 20 integers"),
        ({"data": np.zeros((20, 192), np.int32)}, "is not a uint8 array"),
        ({"data": np.zeros((20, 100), np.uint8)}, "rows of"),
    ):
        np.savez(tmp_path / "train_data_batch_2.npz", **{**batches["val_data"], **change})
        with pytest.raises(DataError, match=message):
            opened("imagenet64", tmp_path, tmp_path)
    np.savez(tmp_path / "train_data_batch_2.npz", data=np.zeros((2, 192), np.uint8))
    with pytest.raises(DataError, match="has no array 'labels'; it contains data"):
        opened("imagenet64", tmp_path, tmp_path)
    np.savez(tmp_path / "train_data_batch_2.npz", data=np.array([{}]), labels=[1], allow_pickle=True)
    with pytest.raises(DataError, match="contains Python objects"):
        opened("imagenet64", tmp_path, tmp_path)
    (tmp_path / "map_clsloc.txt").write_text("n1 1 one\nn3 3 three\n")
    with pytest.raises(DataError, match="numbers 1, 2, 3"):
        opened("imagenet64", tmp_path, tmp_path)


@pytest.mark.parametrize("layout", ["pickle", "npz", "npz-compressed", "zip"])
def test_imagenet_truncated(tmp_path: Path, layout: str):
    write_imagenet(tmp_path, layout, count=40, side=32)  # arrays long enough to stay in their files
    name = {"zip": "Imagenet64_train_part2.zip", "pickle": "train_data_batch_2"}.get(layout, "train_data_batch_2.npz")
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(DataError, match=r"truncated|is not a complete zip|can't be read"):
        opened("imagenet64", tmp_path, tmp_path)


def test_imagenet_bit_flip_inside_an_archive(tmp_path: Path):
    write_imagenet(tmp_path, "zip")
    file = tmp_path / "Imagenet64_val.zip"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"Imagenet64_val.zip"):
        opened("imagenet64", tmp_path, tmp_path)


@pytest.mark.parametrize("layout", ["pickle", "npz", "zip"])
def test_a_missing_batch_is_refused_unless_asked_for(tmp_path: Path, layout: str):
    write_imagenet(tmp_path, layout)
    names = {"pickle": "train_data_batch_10", "npz": "train_data_batch_10.npz", "zip": "Imagenet64_train_part2.zip"}
    (tmp_path / names[layout]).unlink()
    with pytest.raises(DataError, match=r"lacks .*train_data_batch_10; .* or give --allow-partial"):
        opened("imagenet64", tmp_path, tmp_path)
    assert opened("imagenet64", tmp_path, tmp_path, allow_partial=True).num_images["train"] == 40


@pytest.mark.parametrize("member", ["data", "labels"])
def test_a_flipped_byte_in_a_stored_npz_is_found(tmp_path: Path, member: str):
    write_imagenet(tmp_path, "npz", side=32)
    file = tmp_path / "train_data_batch_2.npz"
    with zipfile.ZipFile(file) as archive:
        info = archive.getinfo(f"{member}.npy")
    data = bytearray(file.read_bytes())
    data[info.header_offset + 200] ^= 1  # behind the .npy header
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"train_data_batch_2.npz: {member}.npy is damaged \(its CRC is wrong\)"):
        opened("imagenet64", tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("method", "flags"), [(9, 0), (0, 1), (8, 1), (99, 0)], ids=["deflate64", "aes", "zip", "other"]
)
def test_zips_of_unsupported_kinds_are_refused(tmp_path: Path, method: int, flags: int):
    write_imagenet(tmp_path, "npz")
    file = tmp_path / "train_data_batch_2.npz"
    data = bytearray(file.read_bytes())
    for signature, at_flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = data.find(signature)
        while at >= 0:
            data[at + at_flags : at + at_flags + 4] = flags.to_bytes(2, "little") + method.to_bytes(2, "little")
            at = data.find(signature, at + 4)
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"train_data_batch_2.npz: data.npy can't be unpacked"):
        opened("imagenet64", tmp_path, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_fuzzed_npz_files_raise_one_error(tmp_path: Path, compressed: bool):
    """2,500 damaged files of each kind: nothing but DataError, and never other numbers."""
    batch = {"data": images(3, 8, 8).reshape(3, -1), "labels": np.array([1, 2, 3])}
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **batch)
    good, rng, file = buffer.getvalue(), np.random.default_rng(int(compressed)), tmp_path / "x.npz"
    refused = 0
    for case in range(2500):
        damaged = bytearray(good)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(good))] = rng.integers(256)
        if case % 5 == 0:
            del damaged[rng.integers(len(good)) :]
        file.write_bytes(damaged)
        try:
            found = npz_arrays(file, ("data", "labels"), tmp_path / f"scratch{case}")
            for name, array in found.items():
                np.testing.assert_array_equal(array.whole(), batch[name])
        except DataError:
            refused += 1
    assert refused > 500


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["zip", "zip-npz"])
def test_fuzzed_zip_archives_raise_one_error(tmp_path: Path, layout: str):
    """2,500 damaged archives of each kind, mostly in their headers: the images are read, or there is a DataError."""
    write_imagenet(tmp_path / "in", layout, count=3)
    for name in ("train_part2", "val"):
        (tmp_path / "in" / f"Imagenet64_{name}.zip").unlink()
    file = tmp_path / "in" / "Imagenet64_train_part1.zip"
    good, draw, refused = file.read_bytes(), np.random.default_rng(len(layout)), 0
    directory = good.index(b"PK\1\2")  # the headers at the end
    for case in range(2500):
        damaged = bytearray(good)
        for _ in range(draw.integers(1, 4)):
            damaged[draw.integers(directory if case % 2 else 0, len(good))] = draw.integers(256)
        if case % 10 == 0:
            del damaged[draw.integers(len(good)) :]
        file.write_bytes(damaged)
        request = Request(tmp_path / "in", tmp_path / "scratch", options=Options(allow_partial=True))
        try:
            source = open_source("imagenet64", request)
            for at in range(source.num_images["train"]):
                source.load("train", at)
        except DataError:
            refused += 1
        shutil.rmtree(request.scratch, ignore_errors=True)
    assert refused > 500


def test_imagenet_published_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_imagenet(tmp_path, "zip")
    archive = tmp_path / "Imagenet64_val.zip"
    size, checksum = archive.stat().st_size, sha256(archive)
    monkeypatch.setattr(imagenet64, "PUBLISHED", {"val": (size, checksum)})
    archives = opened("imagenet64", tmp_path, tmp_path).facts["archives"]
    assert archives["Imagenet64_val.zip"] == f"the published val archive (sha256 {checksum})"
    assert archives["Imagenet64_train_part1.zip"] == "not a published npz archive"
    monkeypatch.setattr(imagenet64, "PUBLISHED", {"val": (size, "0" * 64)})
    with pytest.raises(DataError, match=r"size of the published val archive, but its sha256 is .* it is damaged"):
        opened("imagenet64", tmp_path, tmp_path)


# --- imdb files


@pytest.mark.parametrize("kind", [{}, {"chunks": (3, 1, 2, 3)}, {"v7": True}], ids=["contiguous", "chunked", "v7"])
def test_imdb(tmp_path: Path, kind: dict):
    sets, labels = [1, 2, 1, 3, 1, 1, 2], [1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 1.0]
    pixels = write_imdb(tmp_path / "imdb.mat", sets, labels, **kind)
    source = opened("imdb-mat", tmp_path / "imdb.mat", tmp_path)
    assert source.num_images == {"train": 4, "val": 2, "test": 1}
    assert source.classes == ("class 1", "class 2", "class 3")
    for split, rows in {"train": [0, 2, 4, 5], "val": [1, 6], "test": [3]}.items():
        found, found_labels = everything(source, split)
        np.testing.assert_array_equal(found, pixels[rows])
        assert found_labels == [labels[row] - 1 for row in rows]
    np.testing.assert_allclose(source.facts["stored_mean_rgb"], pixels[[0, 2, 4, 5]].mean((0, 1, 2)))


@pytest.mark.parametrize(
    ("sets", "labels", "message"),
    [
        ([1, 2, 4], [1, 1, 1], r"images.set contains \[4\]"),
        ([2, 2, 2], [1, 1, 1], "no training images"),
        ([1, 2, 2], [0, 1, 1], "the minimum of images.labels is 0"),
        ([1, 2, 2], [1, 1.5, 1], "images.labels contains values that are not whole numbers"),
        ([1, 2, 2], [1, float("nan"), 1], "images.labels contains values that are not whole numbers"),
        ([1, 2, 2], [1, 1, 1e200], "the maximum of images.labels is 1e\\+200, but at most 1,000,000"),
        ([1, 2, 2], [1, 1, 2e9], "the maximum of images.labels is 2e\\+09, but at most 1,000,000"),
        ([1, 2, -1e200], [1, 1, 1], "the minimum of images.set is -1e\\+200"),
        ([1, 2, 2], [1, 1], "there are 3 images, but 2 entries in images.labels"),
    ],
)
@pytest.mark.parametrize("v7", [False, True])
def test_imdb_mislabelled(tmp_path: Path, sets: list[int], labels: list[float], message: str, v7: bool):
    write_imdb(tmp_path / "imdb.mat", sets, labels, v7=v7)
    with pytest.raises(DataError, match=message):
        opened("imdb-mat", tmp_path / "imdb.mat", tmp_path)


@pytest.mark.parametrize("v7", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_imdb_truncated(tmp_path: Path, v7: bool, share: float):
    file = tmp_path / "imdb.mat"
    write_imdb(file, [1] * 60, [1.0] * 60, v7=v7)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(DataError, match=r"imdb.mat"):
        opened("imdb-mat", file, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("v7", [False, True])
def test_fuzzed_imdb_raises_one_error(tmp_path: Path, v7: bool, monkeypatch: pytest.MonkeyPatch):
    """2,500 damaged files of each version: the images are read, or there is a DataError."""
    monkeypatch.setattr(isolated, "SECONDS", 1)
    write_imdb(tmp_path / "good.mat", [1, 1, 2], [1, 2, 1], v7=v7)
    good, draw, refused = (tmp_path / "good.mat").read_bytes(), np.random.default_rng(0), 0
    for case in range(2500):
        damaged = bytearray(good)
        for _ in range(draw.integers(1, 5)):
            damaged[draw.integers(len(good))] = draw.integers(256)
        if case % 4 == 0:
            del damaged[draw.integers(len(good)) :]
        (tmp_path / "damaged.mat").write_bytes(damaged)
        try:
            everything(opened("imdb-mat", tmp_path / "damaged.mat", tmp_path), "train")
        except DataError:
            refused += 1
    assert refused > 500


def test_imdb_of_version_7_3_is_read_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """HDF5 can crash or hang on a damaged file, so reading has a time limit."""
    write_imdb(tmp_path / "imdb.mat", [1], [1])
    monkeypatch.setattr(isolated, "SECONDS", 1e-6)
    with pytest.raises(
        DataError, match=r"imdb.mat is damaged or truncated \(the reader did not finish within 0 seconds\)"
    ):
        opened("imdb-mat", tmp_path / "imdb.mat", tmp_path)


def test_imdb_foreign(tmp_path: Path):
    with pytest.raises(DataError, match="is a folder"):
        opened("imdb-mat", tmp_path, tmp_path)
    (tmp_path / "x.mat").write_bytes(b"hello" * 100)
    with pytest.raises(DataError, match="is not a MATLAB file"):
        opened("imdb-mat", tmp_path / "x.mat", tmp_path)


# --- Places365


@pytest.mark.parametrize("tar", [True, False])
def test_places(tmp_path: Path, tar: bool):
    expected = write_places(tmp_path, tar=tar)
    source = opened("places365", tmp_path, tmp_path)
    assert source.classes == ("airfield", "arch", "barn/outdoor")
    for split, (files, labels) in expected.items():
        assert source.num_images[split] == len(labels)
        for at, (data, label) in enumerate(zip(files, labels, strict=True)):
            image, found = source.load(split, at)
            np.testing.assert_array_equal(image, imresize(decode_image(data, ""), (100, 100)))
            assert found == label
    assert source.load("train", 1)[0].shape == (100, 100, 1)  # the gray one


def test_places_options(tmp_path: Path):
    write_places(tmp_path, tar=False)
    assert opened("places365", tmp_path, tmp_path, size=32, resize="pillow").load("val", 0)[0].shape == (32, 32, 3)
    with pytest.raises(ConfigError, match="--size is 0"):
        opened("places365", tmp_path, tmp_path, size=0)


def test_places_damaged(tmp_path: Path):
    write_places(tmp_path, tar=True)
    tar = tmp_path / "val_256.tar"
    good = tar.read_bytes()
    tar.write_bytes(good[:30_000])
    with pytest.raises(DataError, match=r"val_256.tar (lacks|is not a complete tar)"):
        opened("places365", tmp_path, tmp_path)
    tar.write_bytes(b"x" * 2000)
    with pytest.raises(DataError, match="is not a complete tar"):
        opened("places365", tmp_path, tmp_path)
    tar.unlink()
    with pytest.raises(DataError, match=r"neither val_256.tar nor the folder val_256"):
        opened("places365", tmp_path, tmp_path)
    tar.write_bytes(good)
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000000.jpg 3\n")
    with pytest.raises(DataError, match="labels are 3 to 3, but those of 3 categories are 0 to 2"):
        opened("places365", tmp_path, tmp_path)
    (tmp_path / "places365_val.txt").write_text("what is this\n")
    with pytest.raises(DataError, match="is not a list of `name number` lines"):
        opened("places365", tmp_path, tmp_path)


def small_places(folder: Path) -> Path:
    """One category with three images of 8×8 pixels in each split; returns the archive of the training images."""
    names = [f"/a/arch/{at}.jpg" for at in range(3)]
    (folder / "categories_places365.txt").write_text("/a/arch 0\n")
    for listing, archive in (
        ("places365_val.txt", "val_256.tar"),
        ("places365_train_standard.txt", "train_256_places365standard.tar"),
    ):
        (folder / listing).write_text("".join(f"{name} 0\n" for name in names))
        write_tar(
            folder / archive, [f"data{name}" for name in names], [jpeg(images(1, 8, 8, seed=at)[0]) for at in range(3)]
        )
    return folder / archive


@pytest.mark.slow
def test_fuzzed_tar_archives_raise_one_error(tmp_path: Path):
    """5,000 damaged archives, mostly in their headers: the images are read, or there is a DataError."""
    file = small_places(tmp_path)
    good, draw, refused = file.read_bytes().rstrip(b"\0") + bytes(1024), np.random.default_rng(0), 0
    headers = [at for at in range(0, len(good), 512) if good[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 3
    for case in range(5000):
        damaged = bytearray(good)
        for _ in range(draw.integers(1, 5)):
            header = int(draw.choice(headers))
            at = draw.integers(len(good)) if case % 4 == 0 else header + draw.integers(512)
            damaged[at] = draw.integers(256)
            # a header whose checksum is right gets further
            total = 256 + sum(damaged[header : header + 148]) + sum(damaged[header + 156 : header + 512])
            damaged[header + 148 : header + 156] = b"%06o\0 " % total
        if case % 10 == 0:
            del damaged[draw.integers(len(good)) :]
        file.write_bytes(damaged)
        try:
            everything(opened("places365", tmp_path, tmp_path, size=8, resize="pillow"), "train")
        except DataError:
            refused += 1
    assert refused > 500


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """The header of a member of a tar archive."""
    head = bytearray(name.ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 11 + b"\0" + b" " * 8 + kind).ljust(
        512, b"\0"
    )
    head[257:265] = b"ustar  \0"
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


@pytest.mark.parametrize(
    "content",
    [
        header(b"data/a/arch/0.jpg", b"\xff" * 11 + b"\x00") * 2,  # a size of -256
        header(b"data/a/arch/0.jpg", b"\xff" * 10 + b"\xfc\x00") * 4,  # a size of -1024: the same headers for ever
        (header(b"././@LongLink", b"%011o\0" % 512, b"L") + b"x".ljust(512, b"\0"))
        * 3000,  # each is read inside the last
    ],
    ids=["negative", "circle", "nested"],
)
def test_tar_archives_that_run_in_circles_are_refused(tmp_path: Path, content: bytes):
    small_places(tmp_path).write_bytes(content + bytes(1024))
    with pytest.raises(DataError, match=r"is not a complete tar archive|lacks 3 of the 3"):
        opened("places365", tmp_path, tmp_path)


# --- folders of images


def save(path: Path, image: Image.Image, **parameters) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **parameters)


def write_folder(root: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for label in ("cat", "dog"):
            for at in range(count):
                save(root / split / label / f"{at}.png", Image.fromarray(images(1, 5 + at, 4, seed=at)[0]))


def test_folder_with_splits(tmp_path: Path):
    write_folder(tmp_path / "in")
    source = opened("image-folder", tmp_path / "in", tmp_path)
    assert source.classes == ("cat", "dog")
    assert source.num_images == {"train": 6, "val": 4}
    image, label = source.load("train", 4)
    np.testing.assert_array_equal(image, images(1, 6, 4, seed=1)[0])
    assert label == 1


def test_folder_with_a_fraction(tmp_path: Path):
    write_folder(tmp_path / "in")
    root = tmp_path / "in" / "train"
    with pytest.raises(DataError, match="give --val-fraction"):
        opened("image-folder", root, tmp_path)
    source = opened("image-folder", root, tmp_path, val_fraction=0.3)
    assert source.num_images == {"train": 4, "val": 2}
    seen = [source.load(split, at) for split in ("train", "val") for at in range(source.num_images[split])]
    assert sorted(image.shape[0] for image, _ in seen) == [5, 5, 6, 6, 7, 7]
    with pytest.raises(ConfigError, match="leaves a split empty"):
        opened("image-folder", root, tmp_path, val_fraction=0.01)


def test_folder_resizes_the_middle_square(tmp_path: Path):
    pixels = images(1, 10, 30)[0]
    save(tmp_path / "in/train/a/x.png", Image.fromarray(pixels))
    save(tmp_path / "in/val/a/x.png", Image.fromarray(pixels))
    image, _ = opened("image-folder", tmp_path / "in", tmp_path, size=4, resize="matlab").load("train", 0)
    np.testing.assert_array_equal(image, imresize(pixels[:, 10:20], (4, 4)))


def test_folder_refuses(tmp_path: Path):
    (tmp_path / "in/train/a").mkdir(parents=True)
    (tmp_path / "in/val").mkdir()
    with pytest.raises(DataError, match="no class folders that contain images"):
        opened("image-folder", tmp_path / "in", tmp_path)
    write_folder(tmp_path / "in")
    save(tmp_path / "in/val/b/1.png", Image.new("L", (3, 3)))
    with pytest.raises(DataError, match="classes without training images: b"):
        opened("image-folder", tmp_path / "in", tmp_path)
    with pytest.raises(ConfigError, match="--size is 0"):
        opened("image-folder", tmp_path / "in", tmp_path, size=0)


def decoded(tmp_path: Path, image: Image.Image, ending: str = "png", **parameters) -> np.ndarray:
    save(tmp_path / f"x.{ending}", image, **parameters)
    return decode_image((tmp_path / f"x.{ending}").read_bytes(), "x")


def test_modes(tmp_path: Path):
    pixels = images(1, 3, 5)[0]
    rgb = Image.fromarray(pixels)
    np.testing.assert_array_equal(decoded(tmp_path, rgb), pixels)
    np.testing.assert_array_equal(decoded(tmp_path, rgb, "webp", lossless=True), pixels)
    np.testing.assert_array_equal(decoded(tmp_path, rgb.convert("L"))[..., 0], np.asarray(rgb.convert("L")))
    assert set(np.unique(decoded(tmp_path, rgb.convert("1")))) <= {0, 255}
    palette = rgb.quantize(4)
    np.testing.assert_array_equal(decoded(tmp_path, palette), np.asarray(palette.convert("RGB")))
    assert decoded(tmp_path, rgb.convert("CMYK"), "tif").shape == (3, 5, 3)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(tmp_path, deep)[..., 0], pixels[..., 0])


GRADIENT = np.linspace(0, 1, 256).reshape(16, 16)


def test_16_bit_gray_is_scaled(tmp_path: Path):
    """Pillow opens 16-bit PGM in mode I, and PNG and TIFF in I;16."""
    values = np.round(GRADIENT * 65535).astype(np.uint16)
    pgm = b"P5 16 16 65535\n" + values.astype(">u2").tobytes()
    expected = np.round(GRADIENT * 255).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(pgm, "x.pgm")[..., 0], expected)
    for ending in ("png", "tif"):
        np.testing.assert_array_equal(decoded(tmp_path, Image.fromarray(values), ending)[..., 0], expected)
    twelve_bits = b"P5 16 16 4095\n" + np.round(GRADIENT * 4095).astype(">u2").tobytes()
    np.testing.assert_allclose(decode_image(twelve_bits, "x.pgm")[..., 0], expected, atol=1)


def test_16_bit_tiff_with_white_at_zero(tmp_path: Path):
    values = np.round(GRADIENT * 65535).astype(np.uint16)
    found = decoded(tmp_path, Image.fromarray(values), "tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(found[..., 0], 255 - np.round(GRADIENT * 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (np.full((4, 4), 2**30, np.int32), "I"),
        (np.full((4, 4), 0.5, np.float32), "F"),
        (np.full((4, 4, 3), 128, np.uint8), "LAB"),
    ],
)
def test_modes_without_a_defined_range_are_refused_by_name(tmp_path: Path, pixels: np.ndarray, mode: str):
    image = Image.frombytes("LAB", (4, 4), pixels.tobytes()) if mode == "LAB" else Image.fromarray(pixels)
    with pytest.raises(UnreadableImage, match=rf"x: the range of Pillow's mode {mode} is not defined"):
        decoded(tmp_path, image, "tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_keeps_dark_and_bright_apart(tmp_path: Path, mode: str):
    gray = Image.fromarray(np.repeat([[0, 255]], 2, 0).astype(np.uint8))
    image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257) if mode == "I;16" else gray.convert(mode)
    ending = "tif" if mode in ("CMYK", "YCbCr", "I;16") else "png"
    if mode == "PA":
        image = image.convert("LA")
    found = decoded(tmp_path, image, ending).astype(int)
    assert found[:, 0].max() <= 3
    assert found[:, 1].min() >= 252


def test_alpha_lies_over_white(tmp_path: Path):
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert decoded(tmp_path, image).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_exif_rotation(tmp_path: Path):
    pixels = images(1, 3, 5)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated a quarter clockwise
    np.testing.assert_array_equal(decoded(tmp_path, Image.fromarray(pixels), exif=exif), np.rot90(pixels, -1))


@pytest.mark.parametrize("cut", [0, 10, 300])
def test_unreadable(cut: int):
    with pytest.raises(UnreadableImage, match=r"broken.jpg"):
        decode_image(jpeg(images(1, 40, 40)[0])[:cut], "broken.jpg")


def test_threads_leave_the_warnings_filters_as_they_were():
    before = list(warnings.filters)
    data = jpeg(images(1, 200, 200)[0])
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda at: decode_image(data, str(at)), range(200)))
    assert list(warnings.filters) == before


def test_bomb(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableImage, match="bomb"):
        decode_image(jpeg(images(1, 40, 40)[0]), "bomb.jpg")


def test_names():
    values = ["a", "", "größe", "x" * 300, "\udcff"]  # the last: a byte that isn't UTF-8
    names = Names.of(values)
    assert [names[at] for at in range(len(names))] == values
