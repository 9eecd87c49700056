"""Shows a data set: its manifest as text, and a contact sheet of its images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import decode
from gmsop_jax.data.shard_reader import ShardReader
from gmsop_jax.errors import DataError
from gmsop_jax.files import replacing

_MAX_SCANNED = 20_000  # maximum number of records read to find the images of a sheet
_BLOCK = 256  # records read at a time
_MARGIN = (110, 300)  # smallest and largest width of the names of the classes, in pixels


def describe(manifest: Manifest) -> str:
    """Describes a manifest as text, with a table of the number of images per class."""
    lines = [
        f"{manifest.name}: {manifest.num_classes} classes, schema {manifest.schema_version}",
        f"mean RGB {_numbers(manifest.mean_rgb)}",
        "covariance RGB " + " | ".join(_numbers(row) for row in manifest.covariance_rgb),
    ]
    for name, split in manifest.splits.items():
        size = "different sizes" if split.image_size is None else f"{split.image_size[0]}×{split.image_size[1]}"
        megabytes = sum(shard.bytes for shard in split.shards) / 1e6
        images, shards = count(split.num_images, "image"), count(len(split.shards), "shard")
        lines.append(f"{name}: {images}, {size}, {shards}, {megabytes:,.1f} MB")
    width = max(len(name) for name in manifest.classes)
    lines.append(f"{'class':>9}  {'':{width}}  " + "".join(f"{name:>10}" for name in manifest.splits))
    for label, name in enumerate(manifest.classes):
        counts = "".join(f"{split.class_counts[label]:>10,}" for split in manifest.splits.values())
        lines.append(f"{label:>9}  {name:{width}}  {counts}")
    provenance = manifest.provenance
    settings = {name: provenance.get(name) for name in ("seed", "limit", "codec")} | provenance.get("options", {})
    given = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    lines.append(f"converted by gmsop_jax {provenance.get('tool_version')}: {given}")
    for file in provenance.get("files", ()):
        lines.append(f"from {file['name']}: {file['bytes']:,} bytes, sha256 {file['sha256']}")
    if unreadable := provenance.get("unreadable"):
        lines.append(f"{len(unreadable)} unreadable images were skipped")
    return "\n".join(lines)


def contact_sheet(
    directory: Path, split: str, output: Path, *, rows: int = 20, columns: int = 10, tile: int = 64
) -> None:
    """Draws the first images of each class, one row per class, and writes them as an image file.

    Only the first 20,000 images of the split are searched.

    Args:
      directory: the folder of the data set.
      split: the split to show.
      output: the image file to write; its extension determines the format.
      rows: maximum number of classes to show; they are spread evenly over all classes.
      columns: maximum number of images per class.
      tile: side of an image on the sheet, in pixels.

    Raises:
      DataError: if the sheet would be empty or can't be written, or the data set is damaged or has no such split.
    """
    import matplotlib  # for its font, which has more characters than Pillow's

    if min(rows, columns, tile) < 1:
        raise DataError(f"a sheet of {rows} rows, {columns} columns and {tile}-pixel tiles is empty; use at least 1")
    manifest = Manifest.load(directory)
    count = min(rows, manifest.num_classes)
    labels = np.unique(np.linspace(0, manifest.num_classes - 1, count).round().astype(int)).tolist()
    found = _first_images(manifest, directory, split, labels, columns)
    columns = max(1, *map(len, found.values()))
    names = [f"{label} {manifest.classes[label]}" for label in labels]
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 11)
    margin = round(min(max(_MARGIN[0], *(font.getlength(name) + 12 for name in names)), _MARGIN[1]))
    sheet = Image.new("RGB", (margin + columns * tile, len(labels) * tile), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (label, name) in enumerate(zip(labels, names, strict=True)):
        draw.text((4, row * tile + tile // 2), name, fill="black", font=font, anchor="lm")
        for column, image in enumerate(found[label]):
            picture = Image.fromarray(image).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(picture, (margin + column * tile, row * tile))
    try:
        kind = Image.registered_extensions().get(output.suffix.lower())
        if kind is None:
            raise ValueError(f"{output.suffix!r} is not the extension of an image file")
        with replacing(output) as temporary:
            sheet.save(temporary, kind)
    except (OSError, ValueError) as error:
        raise DataError(f"the contact sheet {output} can't be written ({error}); give another --sheet") from error


def _first_images(
    manifest: Manifest, directory: Path, split: str, labels: Sequence[int], count: int
) -> dict[int, list[np.ndarray]]:
    reader = ShardReader(directory, manifest.split(split).shards)
    found: dict[int, list[np.ndarray]] = {label: [] for label in labels}
    for start in range(0, min(len(reader), _MAX_SCANNED), _BLOCK):
        for record in reader.read(np.arange(start, min(start + _BLOCK, len(reader)))):
            example = decode(record)
            images = found.get(example["label"])
            if images is not None and len(images) < count:
                images.append(example["image"])
        if all(len(images) == count for images in found.values()):
            break
    return found


def count(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 shard" or "2 shards"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
