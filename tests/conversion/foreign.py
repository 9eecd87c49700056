"""Small data sets in the exact foreign layouts, made by the tests themselves."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import scipy.io
from PIL import Image


def images(count: int, height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, channels), np.uint8)


def imagenet_batches(count: int, side: int = 8, classes: int = 5) -> dict[str, dict]:
    """Ten training batches and one of validation, as the release's dicts; only 1, 2, 10 and the last have images."""
    empty = {f"train_data_batch_{number}": 0 for number in range(3, 10)}
    filled = dict.fromkeys(["train_data_batch_1", "train_data_batch_2", "train_data_batch_10", "val_data"], count)
    batches = {}
    for at, (name, count) in enumerate((filled | empty).items()):
        pixels = images(count, side, side, seed=at)
        planes = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(count, 3 * side**2)
        labels = [(at + row) % classes + 1 for row in range(count)]
        batches[name] = {"data": planes, "labels": labels or np.zeros(0, np.int64)}
        if name != "val_data":
            batches[name]["mean"] = planes.mean(0) if count else np.zeros(planes.shape[1])
    return batches


def write_clsloc(folder: Path, classes: int = 5) -> None:
    lines = [f"n{at:08} {at} {'crane' if at in (2, 4) else f'name_{at}'}\n" for at in range(1, classes + 1)]
    (folder / "map_clsloc.txt").write_text("".join(lines))


def write_imagenet(folder: Path, layout: str, count: int = 20, side: int = 8, protocol: int = 4) -> dict[str, dict]:
    """`layout`: pickle, npz, npz-compressed, zip (of pickles) or zip-npz."""
    folder.mkdir(parents=True, exist_ok=True)
    write_clsloc(folder)
    batches = imagenet_batches(count, side)
    files = {}
    for name, batch in batches.items():
        buffer = io.BytesIO()
        if "npz" in layout:
            (np.savez if layout == "npz" else np.savez_compressed)(buffer, **batch)
        else:
            pickle.dump(batch, buffer, protocol=protocol)
        files[name + (".npz" if "npz" in layout else "")] = buffer.getvalue()
    if not layout.startswith("zip"):
        for name, data in files.items():
            (folder / name).write_bytes(data)
        return batches
    for part in ("train_part1", "train_part2", "val"):
        with zipfile.ZipFile(folder / f"Imagenet64_{part}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                where = "val" if name.startswith("val") else "train_part2" if "10" in name else "train_part1"
                if where == part:
                    archive.writestr(f"Imagenet64_{part}/{name}", data)
    return batches


def write_imdb(path: Path, sets: list[int], labels: list[float], *, chunks: tuple | None = None, v7: bool = False):
    """An imdb file with images 6 high and 4 wide; returns them as [n, h, w, 3]."""
    pixels = images(len(sets), 6, 4)
    mean = pixels[np.array(sets) == sets[0]].mean((0, 1, 2))  # the first set's, usually training
    if v7:
        fields = {
            "images": {
                "data": pixels.transpose(1, 2, 3, 0),
                "labels": np.array([labels]),
                "set": np.array([sets], float),
            },
            "meta": {"rgbMean": mean},
        }
        scipy.io.savemat(path, fields)
        return pixels
    with h5py.File(path, "w", userblock_size=512) as file:
        data = pixels.transpose(0, 3, 2, 1)
        file.create_dataset("images/data", data=data, chunks=chunks, compression="gzip" if chunks else None)
        file["images/labels"] = np.array(labels, float)[:, None]
        file["images/set"] = np.array(sets, float)[:, None]
        file["meta/rgbMean"] = mean[:, None]
    return pixels


def jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_places(folder: Path, *, tar: bool, count: int = 6) -> dict[str, tuple[list[bytes], list[int]]]:
    """Three categories; returns each split's JPEG bytes and labels in the order of its list."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["/a/airfield", "/a/arch", "/b/barn/outdoor"]
    (folder / "categories_places365.txt").write_text("".join(f"{name} {at}\n" for at, name in enumerate(names)))
    result = {}
    for split, root, listing in (
        ("train", "data_256", "places365_train_standard.txt"),
        ("val", "val_256", "places365_val.txt"),
    ):
        labels = [at % 3 for at in range(count)]
        files = [
            f"{names[label]}/{at:08}.jpg" if split == "train" else f"Places365_val_{at:08}.jpg"
            for at, label in enumerate(labels)
        ]
        data = [jpeg(images(1, 256, 256, 1 if at == 1 else 3, seed=at)[0]) for at in range(count)]
        (folder / listing).write_text("".join(f"{name} {label}\n" for name, label in zip(files, labels, strict=True)))
        paths = [f"{root}/{name.lstrip('/')}" for name in files]
        if tar:
            write_tar(folder / ("train_256_places365standard.tar" if split == "train" else "val_256.tar"), paths, data)
        else:
            for path, content in zip(paths, data, strict=True):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content)
        result[split] = data, labels
    return result


def write_tar(path: Path, names: list[str], data: list[bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for at in np.random.default_rng(0).permutation(len(names)):  # not in the order of the list
            info = tarfile.TarInfo(names[at])
            info.size = len(data[at])
            archive.addfile(info, io.BytesIO(data[at]))
