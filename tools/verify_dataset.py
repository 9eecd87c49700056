"""Reads a data set and compares every checksum, label and count, and the mean, with its manifest.

python tools/verify_dataset.py data/fashion-mnist
"""

import sys

from gmsop_jax.conversion.verify import verify
from gmsop_jax.errors import ArgumentParser, run_command


def main() -> None:
    """Parses the command line and verifies the data set."""
    parser = ArgumentParser(description="Reads a data set and compares it with its manifest.")
    parser.add_argument("directory")
    args = parser.parse_args()
    for name, split in verify(args.directory).splits.items():
        shards = len(split.shards)
        print(f"{args.directory}: {name}: {split.num_images:,} images in {shards} shards, all as the manifest says")


if __name__ == "__main__":
    sys.exit(run_command(main))
