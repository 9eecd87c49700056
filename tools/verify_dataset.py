"""Reads a data set again and compares every checksum, label, count and the mean with its manifest.

python tools/verify_dataset.py data/fashion-mnist
"""

import argparse
import sys

from gmsop_jax.conversion.verify import verify
from gmsop_jax.data import cli


def main() -> None:
    """Parses the command line and verifies."""
    parser = argparse.ArgumentParser(description="Reads a data set again and compares it with its manifest.")
    parser.add_argument("directory")
    args = parser.parse_args()
    manifest = verify(args.directory)
    for name, split in manifest.splits.items():
        print(
            f"{args.directory}: {name}: {split.num_images:,} images in {len(split.shards)} shards, "
            "all as the manifest says"
        )


if __name__ == "__main__":
    sys.exit(cli.run(main))
