"""Image folders and lists of images as users have them: hidden files, links, empty folders."""

import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from foreign import images, write_places
from PIL import Image

from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.sources import Options, Request, Source, image_folder, open_source
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ConfigError, DataError, FileAccessError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of each of two classes, in the splits train and val."""
    for split in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            for at in range(3):
                save(tmp_path / "in" / split / name / f"{at}.png", seed=3 * label + at)
    return tmp_path / "in"


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images(1, 6, 6, seed=seed)[0]).save(path)


def opened(path: Path, **options) -> Source:
    return open_source("image-folder", Request(path, path.parent / "out/scratch", options=Options(**options)))


def test_hidden_files_and_empty_folders_are_not_classes(folder: Path, caplog: pytest.LogCaptureFixture):
    expected = opened(folder)
    (folder / "train/.git/objects").mkdir(parents=True)
    save(folder / "train/.git/objects/x.png")
    save(folder / "train/.ipynb_checkpoints/0.png")
    (folder / "train/.DS_Store").touch()
    (folder / "train/cat/._0.png").write_bytes(b"AppleDouble")
    (folder / "train/__MACOSX").mkdir()
    (folder / "train/__MACOSX/._cat").write_bytes(b"AppleDouble")
    (folder / "train/aardvark").mkdir()
    (folder / "val/zebra").mkdir()
    (folder / "train/cat/notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        found = opened(folder)
    assert found.classes == ("cat", "dog")
    assert found.num_images == {"train": 6, "val": 6}
    assert found.facts == expected.facts
    assert [found.load("train", at)[1] for at in range(6)] == [0, 0, 0, 1, 1, 1]
    assert "2 folders of" in caplog.text
    assert "contain no images: __MACOSX, aardvark" in caplog.text
    assert "contain no images: zebra" in caplog.text
    assert "notes.txt" in caplog.text


def test_a_single_class_is_mentioned(folder: Path, caplog: pytest.LogCaptureFixture):
    """As if the folders of the classes were one level too deep."""
    with caplog.at_level(logging.WARNING):
        opened(folder)
        assert "single class" not in caplog.text
        for split in ("train", "val"):
            deeper = folder / split / "images"
            deeper.mkdir()
            for name in ("cat", "dog"):
                (folder / split / name).rename(deeper / name)
        opened(folder)
    assert f"{folder / 'train'} has a single class folder, images; if the classes are the folders in it" in caplog.text


def test_a_class_without_validation_images_is_mentioned(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for file in (folder / "val/dog").iterdir():
        file.unlink()
    with caplog.at_level(logging.WARNING):
        convert("image-folder", folder, tmp_path / "set", progress=False)
    assert "split 'val' contains no images of 1 of the 2 classes: dog" in caplog.text


def test_an_output_inside_the_input_is_refused(folder: Path):
    with pytest.raises(DataError, match="the output folder is inside the folder of images"):
        convert("image-folder", folder / "train", folder / "train/set", options=Options(val_fraction=0.5))
    with pytest.raises(DataError, match="the output folder is inside the folder of images"):
        convert("image-folder", folder, folder / "val/set")
    assert sorted(os.listdir(folder / "train")) == sorted(os.listdir(folder / "val")) == ["cat", "dog"]
    (folder.parent / "link").symlink_to(folder / "train", target_is_directory=True)
    with pytest.raises(DataError, match="the output folder is inside the folder of images"):
        convert("image-folder", folder / "train", folder.parent / "link/set", options=Options(val_fraction=0.5))
    convert("image-folder", folder, folder / "set", progress=False)  # beside train and val: none of the images
    assert Manifest.load(folder / "set").classes == ("cat", "dog")


@pytest.mark.parametrize("what", ["image", "class", "nested", "split"])
def test_links_out_of_the_input_are_followed_only_if_asked_for(folder: Path, tmp_path: Path, what: str):
    save(tmp_path / "elsewhere/cat/9.png", seed=9)
    source, target = {
        "image": ("train/dog/9.png", "elsewhere/cat/9.png"),
        "class": ("train/cow", "elsewhere/cat"),
        "nested": ("train/dog/more", "elsewhere/cat"),
        "split": ("test", "elsewhere"),
    }[what]
    (folder / source).symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"points outside the input .* give --follow-links"):
        opened(folder)
    found = opened(folder, follow_links=True)
    assert sum(found.num_images.values()) == 13
    split = "test" if what == "split" else "train"
    pixels = [found.load(split, at)[0] for at in range(found.num_images[split])]
    assert any(np.array_equal(image, images(1, 6, 6, seed=9)[0]) for image in pixels)


def test_links_inside_the_input_are_followed(folder: Path):
    (folder / "train/dog/9.png").symlink_to("../cat/0.png")
    (folder / "train/cow").symlink_to("dog")
    (folder / "val/cow").symlink_to(folder / "val/dog")
    found = opened(folder)
    assert found.classes == ("cat", "cow", "dog")
    assert found.num_images == {"train": 3 + 4 + 4, "val": 9}


def test_links_that_lead_nowhere_or_in_circles_are_refused(folder: Path):
    link = folder / "train/dog/9.png"
    link.symlink_to("missing.png")
    with pytest.raises(DataError, match=r"9\.png is a link to a file that does not exist"):
        opened(folder)
    link.unlink()
    link.symlink_to("9.png")
    with pytest.raises(DataError, match=r"9\.png is a link to a file that does not exist"):
        opened(folder)
    link.unlink()
    (folder / "train/dog/again").symlink_to("..")
    with pytest.raises(DataError, match="is a link to a folder that contains the link"):
        opened(folder)


def test_folders_nested_a_thousand_deep_are_read(folder: Path):
    deep = folder / "train/cat"
    for _ in range(1100):
        deep /= "d"
        deep.mkdir()
    (folder / "train/cat/0.png").rename(deep / "0.png")
    assert opened(folder).num_images["train"] == 6
    subprocess.run(["rm", "-r", folder], check=True)  # pytest's own cleaning up is recursive


def test_links_that_form_a_graph_with_endless_paths_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """40 folders, each of which has two links to the next one: 2^40 paths."""
    monkeypatch.setattr(image_folder, "MAX_FOLDERS", 2000)
    for number in range(40):
        level = folder / "train" / "cat" / f"level{number}"
        level.mkdir()
        for name in "ab":
            (level / name).symlink_to(f"../level{number + 1}" if number < 39 else "../../dog")
    with pytest.raises(DataError, match="has more than 2,000 folders"):
        opened(folder)


def test_names_that_are_not_utf8(folder: Path, tmp_path: Path):
    (folder / "train/cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(b"damaged")
    manifest = convert("image-folder", folder, tmp_path / "set", max_unreadable=0.5, progress=False)
    assert manifest is not None
    assert manifest.provenance["unreadable"][0].startswith(r"train/cat/caf\udce9.png: ")
    (folder / "train/cat").rename(folder / "train" / os.fsdecode(b"caf\xe9"))
    (folder / "val/cat").rename(folder / "val" / os.fsdecode(b"caf\xe9"))
    with pytest.raises(DataError, match="is not valid UTF-8; rename it"):
        opened(folder)


def test_fifos_are_not_read(folder: Path):
    os.mkfifo(folder / "train/cat/9.png")
    assert opened(folder).num_images == {"train": 6, "val": 6}


def test_a_file_instead_of_a_folder(folder: Path):
    with pytest.raises(DataError, match="is a file; expected a folder"):
        opened(folder / "train/cat/0.png", val_fraction=0.5)


def test_a_fraction_beside_a_folder_of_validation_images(folder: Path):
    with pytest.raises(ConfigError, match=r"--val-fraction is given, but .* already has a folder val/"):
        opened(folder, val_fraction=0.5)


def test_an_image_that_cannot_be_opened_is_not_called_damaged(folder: Path, tmp_path: Path):
    source = opened(folder)
    (folder / "train/cat/1.png").unlink()
    (folder / "train/cat/1.png").symlink_to("1.png")  # too many links: as for missing permission, open() fails
    with pytest.raises(FileAccessError, match=r"cat/1\.png can't be read: Too many levels"):
        source.load("train", 1)  # an UnreadableImage would be skipped


# --- lists of Places365


@pytest.mark.parametrize("name", ["../secret.jpg", "/../secret.jpg", "a/../../../secret.jpg"])
def test_names_in_lists_that_leave_the_input_are_refused(tmp_path: Path, name: str):
    write_places(tmp_path / "in", tar=False)
    save(tmp_path / "secret.jpg")
    save(tmp_path / "in/secret.jpg")
    (tmp_path / "in/places365_val.txt").write_text(f"Places365_val_00000000.jpg 0\n../{name.lstrip('/')} 1\n")
    request = Request(tmp_path / "in", tmp_path / "out")
    with pytest.raises(DataError, match="points outside the input"):
        open_source("places365", request)
    (tmp_path / "in/places365_val.txt").write_text("../secret.jpg 1\n")  # stays inside
    open_source("places365", request)


def test_linked_images_and_archives_of_places_are_refused(tmp_path: Path):
    write_places(tmp_path / "in", tar=False)
    save(tmp_path / "secret.jpg")
    image = tmp_path / "in/val_256/Places365_val_00000001.jpg"
    image.unlink()
    image.symlink_to(tmp_path / "secret.jpg")
    source = open_source("places365", Request(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(DataError, match="points outside the input"):
        source.load("val", 1)
    follow = Request(tmp_path / "in", tmp_path / "out", options=Options(follow_links=True))
    assert open_source("places365", follow).load("val", 1)[0].shape == (100, 100, 3)
    (tmp_path / "in/places365_val.txt").rename(tmp_path / "list.txt")
    (tmp_path / "in/places365_val.txt").symlink_to(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"places365_val\.txt points outside the input"):
        open_source("places365", Request(tmp_path / "in", tmp_path / "out"))
    open_source("places365", follow)


@pytest.mark.parametrize("text", ["/a/airfield 1\n/a/arch 0\n/b/barn/outdoor 2\n", "/a/airfield 0\n/a/arch 2\n"])
def test_categories_out_of_order_are_refused(tmp_path: Path, text: str):
    write_places(tmp_path, tar=False)
    (tmp_path / "categories_places365.txt").write_text(text)
    with pytest.raises(DataError, match="numbers of the categories are not 0 to"):
        open_source("places365", Request(tmp_path, tmp_path / "out"))


@pytest.mark.parametrize("line", ["x.jpg 99999999999", "x\0.jpg 1", f"x.jpg {'9' * 5000}"])
def test_odd_lines_of_lists_are_refused(tmp_path: Path, line: str):
    write_places(tmp_path, tar=False)
    (tmp_path / "places365_val.txt").write_text(f"{line}\n")
    with pytest.raises(DataError, match=r"places365_val\.txt is not a list"):
        open_source("places365", Request(tmp_path, tmp_path / "out"))
