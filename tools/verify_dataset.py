"""Compares a data set with its manifest; the same as `gmsop verify`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
