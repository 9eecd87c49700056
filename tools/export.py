"""Exports a trained network; the same as `gmsop export`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
