"""Converts a data set to shards; the same as `gmsop convert`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
