"""The commands for data sets: convert, merge, inspect and verify."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gmsop_jax.conversion import job
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.inspect import contact_sheet, count, describe
from gmsop_jax.conversion.sources import NAMES, Options
from gmsop_jax.conversion.verify import verify
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.data.records import CODECS
from gmsop_jax.data.resize import METHODS
from gmsop_jax.errors import ArgumentParser, ConfigError


def run_convert(arguments: Sequence[str]) -> None:
    """Converts a data set to shards: `gmsop convert fashion-mnist --output data/fashion-mnist`."""
    parser = ArgumentParser(
        prog="gmsop convert", description="Converts a data set to shards. Run the same command again to resume."
    )
    add = parser.add_argument
    add("source", choices=NAMES, help="format of the input")
    add("--input", help="the downloaded file or folder; may be omitted for elpv, and for the sample of fashion-mnist")
    add("--output", required=True, help="a new folder, or the folder of an unfinished conversion")
    add("--workers", type=int, help="number of processes (default: one per core, or a single one for few images)")
    add("--shards", type=int, help="number of training shards (default: shards of about 128 MiB)")
    add("--limit", type=int, help="maximum number of images in each split, which are then chosen at random")
    add("--seed", type=int, default=0, help="seed of the order of the images and of all random choices (default: 0)")
    add("--codec", choices=CODECS, default="raw", help="format of the pixels (default: raw)")
    add(
        "--size",
        type=int,
        help="side of the images in pixels (default: 100 for places365, 64 for emoji and domains, otherwise unchanged)",
    )
    add(
        "--resize",
        choices=METHODS,
        help="bicubic resizing as in MATLAB or by Pillow (default: matlab for places365, otherwise pillow)",
    )
    add(
        "--val-fraction",
        type=float,
        help="image-folder, fashion-mnist: fraction of the training images to set aside as val",
    )
    add(
        "--train-fraction",
        type=float,
        help="elpv, emoji, domains, fashion-mnist: fraction of the training images of each class to keep",
    )
    add("--fold", type=int, help="elpv, emoji, domains: which fifth of the images is test, 0 to 4 (default: 0)")
    add("--leave-out", help="emoji: the vendor whose drawings are the test images (google, twitter or fluent)")
    add(
        "--follow-links",
        action="store_true",
        default=None,
        help="also read files outside the input folder to which links or lists in it point",
    )
    add(
        "--allow-partial", action="store_true", default=None, help="imagenet64: convert a download with missing batches"
    )
    _add_max_unreadable(parser)
    add("--shard-range", default="0/1", help="i/n: convert every n-th shard, starting at shard i, counted from 0")
    args = parser.parse_args(arguments)
    manifest = convert(
        args.source,
        args.input,
        args.output,
        workers=args.workers,
        shards=args.shards,
        limit=args.limit,
        seed=args.seed,
        codec=args.codec,
        options=Options(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Options)}),
        shard_range=_shard_range(args.shard_range),
        max_unreadable=args.max_unreadable,
    )
    if manifest is None:
        print(f"{args.output}: part {args.shard_range} is done; when all parts are, run: gmsop merge {args.output}")
    else:
        _print_splits(args.output, manifest)


def run_merge(arguments: Sequence[str]) -> None:
    """Joins the parts of a conversion: `gmsop merge data/imagenet64 [other-folder-of-the-same-conversion …]`."""
    parser = ArgumentParser(
        prog="gmsop merge", description="Joins the parts written by `gmsop convert --shard-range` into one data set."
    )
    parser.add_argument("directory", type=Path, help="the folder that becomes the data set")
    parser.add_argument("parts", type=Path, nargs="*", help="other folders, whose shards are copied into it")
    _add_max_unreadable(parser)
    args = parser.parse_args(arguments)
    _print_splits(args.directory, job.join(args.directory, args.parts, args.max_unreadable))


def run_inspect(arguments: Sequence[str]) -> None:
    """Describes a data set, and draws a contact sheet: `gmsop inspect data/fashion-mnist`."""
    parser = ArgumentParser(
        prog="gmsop inspect",
        description="Prints the manifest and the number of images per class of a data set, and draws a contact sheet.",
    )
    parser.add_argument("directory", type=Path, help="folder of the data set")
    parser.add_argument("--split", default="train", help="the split to draw (default: train)")
    parser.add_argument("--sheet", type=Path, help=f"image file to write (default: {job.SHEET_NAME} in the data set)")
    parser.add_argument("--columns", type=int, default=10, help="images per class (default: 10)")
    parser.add_argument("--rows", type=int, default=20, help="maximum number of classes (default: 20)")
    args = parser.parse_args(arguments)
    sheet = args.sheet or args.directory / job.SHEET_NAME
    print(describe(Manifest.load(args.directory)))
    contact_sheet(args.directory, args.split, sheet, rows=args.rows, columns=args.columns)
    print(f"contact sheet: {sheet}")


def run_verify(arguments: Sequence[str]) -> None:
    """Compares every checksum, label and count, and the mean, with the manifest: `gmsop verify data/fashion-mnist`."""
    parser = ArgumentParser(
        prog="gmsop verify", description="Reads every record of a data set and compares it with the manifest."
    )
    parser.add_argument("directory", help="folder of the data set")
    args = parser.parse_args(arguments)
    _print_splits(args.directory, verify(args.directory), ", verified")


def _add_max_unreadable(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-unreadable", type=float, default=0.01, help="maximum fraction of unreadable images (default: 0.01)"
    )


def _print_splits(directory: str | Path, manifest: Manifest, comment: str = "") -> None:
    for name, split in manifest.splits.items():
        images, shards = count(split.num_images, "image"), count(len(split.shards), "shard")
        print(f"{directory}: {name}: {images} in {shards}{comment}")


def _shard_range(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"--shard-range {text!r} is not i/n, such as 0/4") from None
    return index, count
