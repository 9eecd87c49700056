"""Converts a foreign data set to shards.

python tools/convert.py fashion-mnist --output data/fashion-mnist
"""

import sys

from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.sources import NAMES, Options
from gmsop_jax.data.records import CODECS
from gmsop_jax.data.resize import METHODS
from gmsop_jax.errors import ArgumentParser, ConfigError, run_command


def main() -> None:
    """Parses the command line and converts the data set."""
    parser = ArgumentParser(description="Converts a data set to shards. Run again to resume.")
    parser.add_argument("source", choices=NAMES)
    parser.add_argument(
        "--input", help="the downloaded file or folder; may be omitted for elpv, and for the sample of fashion-mnist"
    )
    parser.add_argument("--output", required=True, help="a new folder, or that of an unfinished conversion")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    parser.add_argument("--shards", type=int, help="number of training shards (default: about 128 MiB each)")
    parser.add_argument("--limit", type=int, help="keep a random subset of at most this many images of each split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the training images (default: 0)")
    parser.add_argument("--codec", choices=CODECS, default="raw", help="format of the pixels (default: raw)")
    parser.add_argument("--size", type=int, help="side of the images (default: 100 for places365, else unchanged)")
    parser.add_argument("--resize", choices=METHODS, help="bicubic resizing like MATLAB's imresize, or by Pillow")
    parser.add_argument(
        "--val-fraction",
        type=float,
        help="image-folder, fashion-mnist: share of the training images to set aside as val",
    )
    parser.add_argument("--train-fraction", type=float, help="share of the training images of each class to keep")
    parser.add_argument("--fold", type=int, help="elpv, emoji, domains: which fifth of the images is test, 0 to 4")
    parser.add_argument("--leave-out", help="emoji: the vendor whose drawings are test (google, twitter or fluent)")
    parser.add_argument(
        "--follow-links", action="store_true", default=None, help="also read files outside the input folder"
    )
    parser.add_argument(
        "--allow-partial", action="store_true", default=None, help="imagenet64: convert a download with missing batches"
    )
    parser.add_argument(
        "--max-unreadable", type=float, default=0.01, help="largest accepted share of unreadable images (default: 0.01)"
    )
    parser.add_argument("--shard-range", default="0/1", help="i/n: convert every n-th shard from the i-th, i from 0")
    args = parser.parse_args()
    manifest = convert(
        args.source,
        args.input,
        args.output,
        workers=args.workers,
        shards=args.shards,
        limit=args.limit,
        seed=args.seed,
        codec=args.codec,
        options=Options(
            size=args.size,
            resize=args.resize,
            val_fraction=args.val_fraction,
            train_fraction=args.train_fraction,
            fold=args.fold,
            leave_out=args.leave_out,
            follow_links=args.follow_links,
            allow_partial=args.allow_partial,
        ),
        shard_range=_range(args.shard_range),
        max_unreadable=args.max_unreadable,
    )
    if manifest is None:
        print(f"{args.output}: part {args.shard_range} is done; when all are, join them with tools/merge_manifests.py")
        return
    for name, split in manifest.splits.items():
        print(f"{args.output}: {name}: {split.num_images:,} images in {len(split.shards)} shards")


def _range(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"--shard-range {text!r} is not i/n, such as 0/4") from None
    return index, count


if __name__ == "__main__":
    sys.exit(run_command(main))
