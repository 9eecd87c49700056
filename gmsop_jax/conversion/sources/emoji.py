"""Emoji as drawn by three vendors, read from npm packages; the classes are the groups of emoji.

The input folder contains the tarballs that `npm pack emoji-datasource-google emoji-datasource-twitter
@lobehub/fluent-emoji-3d` downloads. Emoji that are not drawn by all vendors are left out, and so are the variants with
skin tones.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.files import tar_members
from gmsop_jax.conversion.sources.images import decode_image
from gmsop_jax.conversion.sources.table import ImageTable, fold_masks, stratified_parts, subset
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import ConfigError, DataError

OPTIONS = frozenset({"size", "resize", "fold", "leave_out", "train_fraction"})
CLASSES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
_SIZE = 64
_MAX_FILE_BYTES = 2**24  # the drawings have a few thousand bytes, and the list of emoji a few million


@dataclasses.dataclass(frozen=True)
class Vendor:
    """The beginning of the name of a vendor's tarball, the folder of the drawings in it, and their licence."""

    tarball: str
    folder: str
    licence: str


VENDORS = {
    "google": Vendor("emoji-datasource-google", "package/img/google/64", "Noto Emoji, Apache 2.0"),
    "twitter": Vendor("emoji-datasource-twitter", "package/img/twitter/64", "Twemoji, CC BY 4.0"),
    "fluent": Vendor("lobehub-fluent-emoji-3d", "package/assets", "Fluent Emoji, MIT"),
}


def open_source(request: Request) -> ImageTable:
    """Opens the folder `request.path` with the three tarballs.

    All drawings of an emoji are in the same split, and the splits are those of `fold_masks`, stratified by class. With
    the option `leave_out`, the drawings of that vendor are the split `test` instead, and the other vendors' drawings
    are in `train` (90 % of the emoji) and `val`. Without it, the splits `test_google` etc. contain the images of `test`
    from one vendor.
    """
    options = request.options
    if options.leave_out is not None and options.leave_out not in VENDORS:
        raise ConfigError(f"--leave-out is {options.leave_out!r}; it must be one of {', '.join(VENDORS)}")
    if options.leave_out is not None and options.fold is not None:
        raise ConfigError("--fold and --leave-out both choose the test images; give only one of them")
    tarballs = {name: _find_tarball(request, vendor) for name, vendor in VENDORS.items()}
    groups = _read_groups(tarballs["google"])
    drawings = {name: _read_drawings(tarballs[name], vendor) for name, vendor in VENDORS.items()}
    points = sorted(point for point in groups if all(point in drawn for drawn in drawings.values()))
    if not points:
        raise DataError(f"--input {request.required_path.absolute()}: no emoji is drawn by all three vendors")
    files = tuple(drawings[name][point] for name in VENDORS for point in points)
    names = tuple(f"{name} {point}" for name in VENDORS for point in points)
    point_labels = np.array([CLASSES.index(groups[point]) for point in points])
    labels, vendors = np.tile(point_labels, len(VENDORS)), np.repeat(np.arange(len(VENDORS)), len(points))
    parts = np.tile(stratified_parts(point_labels, request.seed), len(VENDORS))
    rows = _splits(parts, vendors, options.fold or 0, options.leave_out)
    rows["train"] = subset(rows["train"], labels, options.train_fraction, request.seed)
    size = options.size or _SIZE
    decode = functools.partial(_decode, files, names, size, options.resize or "pillow")
    facts = {"licences": {name: vendor.licence for name, vendor in VENDORS.items()}}
    return ImageTable(CLASSES, labels, rows, decode, tuple(tarballs.values()), facts, 3 * size**2)


def _splits(parts: np.ndarray, vendors: np.ndarray, fold: int, leave_out: str | None) -> dict[str, np.ndarray]:
    masks = fold_masks(parts, fold)
    if leave_out is None:
        for number, name in enumerate(VENDORS):
            masks[f"test_{name}"] = masks["test"] & (vendors == number)
    else:
        left_out = vendors == list(VENDORS).index(leave_out)
        masks = {"train": ~masks["val"] & ~left_out, "val": masks["val"] & ~left_out, "test": left_out}
    return {split: np.flatnonzero(mask) for split, mask in masks.items()}


def _find_tarball(request: Request, vendor: Vendor) -> Path:
    folder = request.required_path
    found = sorted(folder.glob(f"{vendor.tarball}-*.tgz"))
    if len(found) != 1:
        raise DataError(
            f"--input {folder.absolute()} has {len(found)} files {vendor.tarball}-*.tgz; expected one, which"
            " `npm pack` downloads"
        )
    return found[0]


def _members(tarball: Path, wanted: str) -> Iterator[tuple[str, bytes]]:
    """Yields the name and content of a file, or of each file directly in a folder."""
    for member, read in tar_members(tarball, "r:gz"):
        if wanted in (member.name, member.name.rpartition("/")[0]):
            if member.size > _MAX_FILE_BYTES:
                raise DataError(f"{tarball}: {member.name} has {member.size:,} bytes, which is too large")
            yield member.name, read()


def _read_groups(tarball: Path) -> dict[str, str]:
    """Returns the group of each emoji by its code points."""
    wanted = "package/emoji.json"
    for _, data in _members(tarball, wanted):
        try:
            entries = json.loads(data)
            groups = {_code_points(str(entry["unified"])): str(entry["category"]) for entry in entries}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{tarball}: {wanted} is not a list of emoji ({error}); download it again") from error
        return {point: group for point, group in groups.items() if group in CLASSES}
    raise DataError(f"{tarball} has no {wanted}; expected the package emoji-datasource-google")


def _read_drawings(tarball: Path, vendor: Vendor) -> dict[str, bytes]:
    """Returns the image file of each emoji by its code points."""
    return {_code_points(Path(name).stem): data for name, data in _members(tarball, vendor.folder)}


def _code_points(name: str) -> str:
    """Code points in lower case without FE0F, which requests a coloured drawing and which vendors may omit."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def _decode(files: tuple[bytes, ...], names: tuple[str, ...], size: int, method: Method, row: int) -> np.ndarray:
    return resize(decode_image(files[row], names[row]), (size, size), method)
