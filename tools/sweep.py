"""Trains configurations with several seeds; the same as `gmsop sweep`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
