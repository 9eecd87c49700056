"""Sources of the studies: solar cells, emoji, the whole of Fashion-MNIST, and all three together."""

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from foreign import images
from PIL import Image
from test_sources import opened, write_fashion, write_idx

from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.sources import Options, Source
from gmsop_jax.conversion.sources.elpv import CLASSES as CELL_CLASSES
from gmsop_jax.conversion.sources.emoji import CLASSES as GROUPS
from gmsop_jax.conversion.sources.emoji import VENDORS
from gmsop_jax.conversion.sources.table import fold_masks, stratified_parts, subset
from gmsop_jax.errors import ConfigError, DataError


def encoded(shade: int, ending: str = "png", size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (shade, shade, shade)).save(buffer, ending, lossless=True)
    return buffer.getvalue()


def write_elpv(package: Path, cells: int = 40) -> None:
    """Every fourth cell is defective, and the first half is monocrystalline. The shade of a cell is its number."""
    (package / "data" / "images").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    lines = []
    for at in range(cells):
        (package / f"data/images/cell{at:04}.png").write_bytes(encoded(at))
        kind = "mono" if at < cells // 2 else "poly"
        lines.append(f"images/cell{at:04}.png  {(0.0, 0.3333333333333333, 0.0, 0.6666666666666666)[at % 4]}  {kind}\n")
    (package / "data" / "labels.csv").write_text("".join(lines))


def write_emoji(folder: Path, count: int = 30, skip: dict[str, int] | None = None) -> None:
    """The shade of an emoji is its number, plus 100 for each vendor. `skip` names an emoji that a vendor lacks."""
    folder.mkdir(exist_ok=True)
    unified = [f"{0x1F600 + at:X}-FE0F" for at in range(count)]
    entries = [{"unified": code, "category": GROUPS[at % 3]} for at, code in enumerate(unified)]
    entries.append({"unified": "1F3FB", "category": "Component"})
    for number, (name, vendor) in enumerate(VENDORS.items()):
        files = {"package/emoji.json": json.dumps(entries).encode(), "package/img/sheets/1f600.png": b"not read"}
        for at, code in enumerate(unified):
            if (skip or {}).get(name) != at:
                stem, ending = (
                    (code.lower(), "png") if name != "fluent" else (code.lower().removesuffix("-fe0f"), "webp")
                )
                files[f"{vendor.folder}/{stem}.{ending}"] = encoded(at + 100 * number, ending)
        with tarfile.open(folder / f"{vendor.tarball}-1.0.0.tgz", "w:gz") as archive:
            for path, data in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def shades(source: Source, split: str) -> list[int]:
    """The middle pixel's shade of every image."""
    loaded = (source.load(split, at)[0] for at in range(source.num_images[split]))
    return [int(image[len(image) // 2, len(image) // 2].flat[0]) for image in loaded]


def test_folds_are_stratified_and_cover_every_row_once():
    strata = np.repeat([0, 1, 2], [53, 20, 9])
    parts = stratified_parts(strata, seed=1)
    tests = np.zeros(len(strata), int)
    for fold in range(5):
        masks = fold_masks(parts, fold)
        assert (np.sum(list(masks.values()), axis=0) == 1).all()
        tests += masks["test"]
        for stratum, size in enumerate((53, 20, 9)):
            assert abs(masks["test"][strata == stratum].sum() - size / 5) < 2
            assert abs(masks["val"][strata == stratum].sum() - size / 10) < 1
    assert (tests == 1).all()
    np.testing.assert_array_equal(parts, stratified_parts(strata, seed=1))
    assert (parts != stratified_parts(strata, seed=2)).any()


def test_a_smaller_subset_is_part_of_a_larger_one():
    labels = np.repeat([0, 1], [100, 4])
    rows = np.arange(104)
    small, large = (subset(rows, labels, fraction, 0) for fraction in (0.1, 0.3))
    assert np.bincount(labels[small]).tolist() == [10, 1]
    assert np.bincount(labels[large]).tolist() == [30, 1]
    assert set(small) <= set(large)
    np.testing.assert_array_equal(subset(rows, labels, None, 0), rows)


def test_elpv(tmp_path: Path):
    write_elpv(tmp_path / "elpv_dataset")
    source = opened("elpv", tmp_path / "elpv_dataset", tmp_path, size=8)
    assert tuple(source.classes) == CELL_CLASSES
    assert source.num_images == {"train": 28, "val": 4, "test": 8, "test_mono": 4, "test_poly": 4}
    for split in source.num_images:
        labels = [source.load(split, at)[1] for at in range(source.num_images[split])]
        assert labels == [int(shade % 4 == 3) for shade in shades(source, split)]
    assert shades(source, "test") == sorted(shades(source, "test_mono") + shades(source, "test_poly"))
    assert all(shade < 20 for shade in shades(source, "test_mono"))
    folds = [opened("elpv", tmp_path / "elpv_dataset", tmp_path, size=8, fold=fold) for fold in range(5)]
    assert sorted(shade for fold in folds for shade in shades(fold, "test")) == list(range(40))
    assert shades(pickle.loads(pickle.dumps(source)), "val") == shades(source, "val")


def test_elpv_is_found_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "elpv_dataset", None)  # as if it were not installed
    with pytest.raises(DataError, match="pip install elpv-dataset"):
        opened("elpv", None, tmp_path)
    write_elpv(tmp_path / "elpv_dataset")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "elpv_dataset")
    assert opened("elpv", None, tmp_path).load("test", 0)[0].shape == (300, 300, 3)


def test_damaged_elpv(tmp_path: Path):
    table = tmp_path / "labels.csv"
    for line, message in {
        "images/a.png 0.5 mono\n": "line 1: there is no image",
        "images/a.png 0.5 thin\n": "line 1: 'images/a.png 0.5 thin' is not",
        "images/a.png\n": "is not `image probability",
        "": "lists no images",
        "../../../etc/passwd 0.5 mono\n": "points outside the input",
    }.items():
        table.write_text(line)
        with pytest.raises(DataError, match=message):
            opened("elpv", tmp_path, tmp_path)
    table.unlink()
    with pytest.raises(DataError, match=r"has no data/labels\.csv"):
        opened("elpv", tmp_path, tmp_path)


def test_emoji_keep_the_drawings_of_an_emoji_in_one_split(tmp_path: Path):
    write_emoji(tmp_path / "in", skip={"fluent": 29})
    source = opened("emoji", tmp_path / "in", tmp_path, size=8)
    assert sum(source.num_images[split] for split in ("train", "val", "test")) == 3 * 29  # all but number 29
    emoji = {split: {shade % 100 for shade in shades(source, split)} for split in ("train", "val", "test")}
    assert sum(len(points) for points in emoji.values()) == 29
    assert set.union(*emoji.values()) == set(range(29))
    for number, name in enumerate(VENDORS):
        assert {shade // 100 for shade in shades(source, f"test_{name}")} == {number}
    assert [source.load("test", at)[1] for at in range(3)] == [shade % 3 for shade in shades(source, "test")[:3]]


def test_emoji_leave_a_vendor_out(tmp_path: Path):
    write_emoji(tmp_path / "in")
    source = opened("emoji", tmp_path / "in", tmp_path, size=8, leave_out="twitter")
    assert sorted(shades(source, "test")) == list(range(100, 130))
    assert {shade // 100 for shade in shades(source, "train") + shades(source, "val")} == {0, 2}
    assert {shade % 100 for shade in shades(source, "train")}.isdisjoint(shade % 100 for shade in shades(source, "val"))
    with pytest.raises(ConfigError, match="must be one of google, twitter, fluent"):
        opened("emoji", tmp_path / "in", tmp_path, leave_out="apple")
    with pytest.raises(ConfigError, match="give only one of them"):
        opened("emoji", tmp_path / "in", tmp_path, leave_out="google", fold=1)


def test_damaged_emoji(tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(DataError, match=r"has 0 files emoji-datasource-google-\*.tgz"):
        opened("emoji", folder, tmp_path)
    write_emoji(folder)
    tarball = folder / "emoji-datasource-google-1.0.0.tgz"
    good = tarball.read_bytes()
    for bad in (good[: len(good) // 2], b"no archive", good[:60] + b"\xff" * 40 + good[100:]):
        tarball.write_bytes(bad)
        with pytest.raises(DataError, match=r"tgz (is not a complete tar archive|has no package)"):
            opened("emoji", folder, tmp_path)


def test_fashion_mnist_with_a_validation_part(tmp_path: Path):
    write_fashion(tmp_path)
    assert opened("fashion-mnist", tmp_path, tmp_path, val_fraction=0.1).num_images == {
        "train": 0,  # each of the seven classes has a single image, and gives up at least one
        "val": 7,
        "test": 3,
    }
    source = opened("fashion-mnist", None, tmp_path, val_fraction=0.1, train_fraction=0.1)
    assert source.num_images == {"train": 450, "val": 500, "test": 1000}
    small = opened("fashion-mnist", None, tmp_path, val_fraction=0.1)
    train = {small.load("train", at)[0].tobytes() for at in range(small.num_images["train"])}
    assert train.isdisjoint(small.load("val", at)[0].tobytes() for at in range(500))
    assert {source.load("train", at)[0].tobytes() for at in range(450)} <= train


def test_domains_together(tmp_path: Path):
    root = tmp_path / "in"
    root.mkdir()
    write_elpv(root / "elpv")
    write_emoji(root / "emoji")
    (root / "fashion-mnist").mkdir()
    for prefix, count in (("train", 40), ("t10k", 3)):
        write_idx(root / "fashion-mnist", f"{prefix}-images-idx3-ubyte", images(count, 28, 28)[..., 0], packed=True)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(root / "fashion-mnist", f"{prefix}-labels-idx1-ubyte", labels, packed=True)
    source = opened("domains", root, tmp_path, size=16)
    assert len(source.classes) == 2 + 10 + len(GROUPS)
    assert source.num_images["train"] == 28 + 10 + 63
    assert source.num_images["test"] == 8 + 3 + 18
    parts = {name: source.num_images[f"test_{name}"] for name in ("elpv", "fashion_mnist", "emoji")}
    assert parts == {"elpv": 8, "fashion_mnist": 3, "emoji": 18}
    assert shades(source, "test") == [shade for name in parts for shade in shades(source, f"test_{name}")]
    assert {source.load("test_emoji", at)[1] for at in range(18)} == {12, 13, 14}
    (root / "emoji").rename(root / "emojis")
    with pytest.raises(DataError, match="has no folder emoji"):
        opened("domains", root, tmp_path)


def test_conversion_is_deterministic(tmp_path: Path):
    write_emoji(tmp_path / "in")
    options = Options(size=8, fold=2, train_fraction=0.5)
    manifests = [
        convert("emoji", tmp_path / "in", tmp_path / name, options=options, progress=False) for name in ("a", "b")
    ]
    assert manifests[0] == manifests[1]
    assert manifests[0] is not None
    assert manifests[0].splits["train"].num_images < manifests[0].splits["test"].num_images * 3


@pytest.mark.parametrize(("option", "value"), [("fold", 5), ("train_fraction", 0.0)])
def test_options_out_of_range(option: str, value: float):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} is {value}; it must be"):
        Options(**{option: value})  # pyright: ignore[reportArgumentType]
