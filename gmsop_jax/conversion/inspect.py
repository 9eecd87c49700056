"""A data set for the eye: its manifest as text, its images as a contact sheet."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError

_SCANNED = 20_000  # records looked at for a sheet


def describe(manifest: Manifest) -> str:
    """The manifest in a page of text, with a table of counts per class."""
    lines = [
        f"{manifest.name}: {manifest.num_classes} classes, schema {manifest.schema_version}",
        f"mean RGB {_numbers(manifest.mean_rgb)}",
        "covariance RGB " + " | ".join(_numbers(row) for row in manifest.covariance_rgb),
    ]
    for name, split in manifest.splits.items():
        size = "sizes differ" if split.image_size is None else f"{split.image_size[0]}×{split.image_size[1]}"
        megabytes = sum(shard.bytes for shard in split.shards) / 1e6
        lines.append(f"{name}: {split.num_images:,} images, {size}, {len(split.shards)} shards, {megabytes:,.1f} MB")
    width = max(len(name) for name in manifest.classes)
    lines.append(f"{'class':>9}  {'':{width}}  " + "".join(f"{name:>10}" for name in manifest.splits))
    for label, name in enumerate(manifest.classes):
        counts = "".join(f"{split.class_counts[label]:>10,}" for split in manifest.splits.values())
        lines.append(f"{label:>9}  {name:{width}}  {counts}")
    provenance = manifest.provenance
    lines.append(
        f"made by gmsop_jax {provenance['tool_version']}, seed {provenance['seed']}, limit "
        f"{provenance['limit']}, "
        f"codec {provenance['codec']}, options {provenance['options']}"
    )
    lines += [f"from {file['name']}: {file['bytes']:,} bytes, sha256 {file['sha256']}" for file in provenance["files"]]
    if provenance["unreadable"]:
        lines.append(f"{len(provenance['unreadable'])} unreadable images, left out")
    return "\n".join(lines)


def contact_sheet(
    directory: Path, split: str, output: Path, *, rows: int = 20, columns: int = 10, tile: int = 64
) -> None:
    """Draws the first images of each class, a row per class, and writes them as an image file.

    Args:
      directory: the data set.
      split: which of its splits.
      output: the image file to write; its ending names the format.
      rows: at most this many classes, spread over all of them.
      columns: images per class.
      tile: side of one image on the sheet, in pixels.
    Raises: DataError if the data set or the output's name is wrong.
    """
    if min(rows, columns, tile) < 1:
        raise DataError(f"a sheet of {rows} rows, {columns} columns and {tile}-pixel tiles is empty; use at least 1")
    manifest = Manifest.load(directory)
    count = min(rows, manifest.num_classes)
    chosen = np.unique(np.linspace(0, manifest.num_classes - 1, count).round().astype(int)).tolist()
    found = _first_images(manifest, directory, split, chosen, columns)
    margin = 110
    sheet = Image.new("RGB", (margin + columns * tile, len(chosen) * tile), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(chosen):
        draw.text((4, row * tile + tile // 2 - 6), f"{label} {manifest.classes[label]}"[:17], fill="black")
        for column, image in enumerate(found[label]):
            picture = Image.fromarray(image).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(picture, (margin + column * tile, row * tile))
    try:
        sheet.save(output)
    except (OSError, ValueError) as error:
        raise DataError(f"the sheet can't be written to {output} ({error})") from error


def _first_images(
    manifest: Manifest, directory: Path, split: str, labels: Sequence[int], each: int
) -> dict[int, list[np.ndarray]]:
    reader = ShardReader(directory, manifest.split(split).shards)
    found: dict[int, list[np.ndarray]] = {label: [] for label in labels}
    for start in range(0, min(len(reader), _SCANNED), 256):
        for record in reader.read(np.arange(start, min(start + 256, len(reader)))):
            example = decode(record)
            if len(found.get(example["label"], range(each))) < each:
                found[example["label"]].append(example["image"])
        if all(len(images) == each for images in found.values()):
            break
    return found


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
