"""Describes a data set and draws a contact sheet; the same as `gmsop inspect`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["inspect", *sys.argv[1:]]))
