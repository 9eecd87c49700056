"""Joins the parts that `tools/convert.py --shard-range i/n` converted into one data set.

python tools/merge_manifests.py data/imagenet64 [other-folder-of-the-same-conversion …]
"""

import sys
from pathlib import Path

from gmsop_jax.conversion import job
from gmsop_jax.errors import ArgumentParser, run_command


def main() -> None:
    """Parses the command line and joins the parts."""
    parser = ArgumentParser(description="Joins the parts converted with --shard-range into one data set.")
    parser.add_argument("directory", type=Path, help="the folder that becomes the data set")
    parser.add_argument("parts", type=Path, nargs="*", help="other folders, whose shards are copied into it")
    parser.add_argument("--max-unreadable", type=float, default=0.01, help="largest accepted share (default: 0.01)")
    args = parser.parse_args()
    for name, split in job.join(args.directory, args.parts, args.max_unreadable).splits.items():
        print(f"{args.directory}: {name}: {split.num_images:,} images in {len(split.shards)} shards")


if __name__ == "__main__":
    sys.exit(run_command(main))
