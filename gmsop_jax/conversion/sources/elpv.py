"""ELPV: 2,624 electroluminescence photographs of solar cells, read from the package `elpv-dataset`.

The images are gray and have 300×300 pixels. A cell is labelled defective if experts rated the probability of a defect
at ½ or more. The package is licensed under CC BY-NC-SA 4.0, so it is read where it is installed and is not part of
gmsop_jax.
(Deitsch et al. 2019, 2021; Buerhop-Lutz et al. 2018.)
"""

import functools
import hashlib
import importlib.util
from pathlib import Path

import numpy as np

from gmsop_jax.conversion.sources import Request
from gmsop_jax.conversion.sources.files import read_lines
from gmsop_jax.conversion.sources.image_folder import read_image_file
from gmsop_jax.conversion.sources.images import decode_image
from gmsop_jax.conversion.sources.table import ImageTable, fold_masks, stratified_parts, subset
from gmsop_jax.data.resize import Method, resize
from gmsop_jax.errors import DataError

OPTIONS = frozenset({"size", "resize", "fold", "train_fraction"})
CLASSES = ("functional", "defective")
CELL_TYPES = ("mono", "poly")
_PACKAGE = "elpv_dataset"
_SIZE = 300


def open_source(request: Request) -> ImageTable:
    """Opens the folder of the package `elpv_dataset`; by default, that of the installed package.

    The splits are those of `fold_masks`, stratified by class and by type of cell. The splits `test_mono` and
    `test_poly` contain the images of `test` that show monocrystalline and polycrystalline cells.
    """
    table = _find_table(request)
    paths, labels, types = _read_table(request, table)
    options = request.options
    masks = fold_masks(stratified_parts(len(CLASSES) * types + labels, request.seed), options.fold or 0)
    rows = {split: np.flatnonzero(mask) for split, mask in masks.items()}
    rows["train"] = subset(rows["train"], labels, options.train_fraction, request.seed)
    for number, name in enumerate(CELL_TYPES):
        rows[f"test_{name}"] = np.flatnonzero(masks["test"] & (types == number))
    listing = "".join(f"{path.name}\t{path.stat().st_size}\n" for path in paths)
    facts = {
        "licence": "CC BY-NC-SA 4.0, https://github.com/zae-bayern/elpv-dataset",
        "listing_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        "layout": "of the lines `name<tab>bytes`",
    }
    size = options.size or _SIZE
    decode = functools.partial(_decode, paths, size, options.resize or "pillow")
    return ImageTable(CLASSES, labels, rows, decode, (table,), facts, size**2)


def _find_table(request: Request) -> Path:
    folder = request.path
    if folder is None:
        spec = importlib.util.find_spec(_PACKAGE)
        if spec is None or spec.origin is None:
            raise DataError("source 'elpv' needs --input, the folder elpv_dataset; or run: pip install elpv-dataset")
        folder = Path(spec.origin).parent
    else:
        folder = request.required_path
    for table in (folder / "data" / "labels.csv", folder / "labels.csv"):
        if table.is_file():
            return table
    raise DataError(f"{folder.absolute()} has no data/labels.csv; expected the folder elpv_dataset of the package")


def _read_table(request: Request, table: Path) -> tuple[tuple[Path, ...], np.ndarray, np.ndarray]:
    """Returns the path of each image, its class, and its type of cell (an index into `CELL_TYPES`)."""
    paths, labels, types = [], [], []
    for number, line in enumerate(read_lines(table), 1):
        try:
            name, probability, kind = line.split()
            labels.append(int(float(probability) >= 0.5))
            types.append(CELL_TYPES.index(kind))
        except ValueError as error:
            raise DataError(
                f"{table}, line {number}: {line[:80]!r} is not `image probability mono|poly`; install the package again"
            ) from error
        path = table.parent / name
        if request.path is not None:
            request.check_inside(path)
        if not path.is_file():
            raise DataError(f"{table}, line {number}: there is no image {path}; install the package again")
        paths.append(path)
    if not paths:
        raise DataError(f"{table} lists no images; install the package again")
    return tuple(paths), np.array(labels), np.array(types)


def _decode(paths: tuple[Path, ...], size: int, method: Method, row: int) -> np.ndarray:
    image = decode_image(read_image_file(paths[row]), paths[row].name)
    return resize(image, (size, size), method)
