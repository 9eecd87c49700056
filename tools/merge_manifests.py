"""Joins the parts of a conversion; the same as `gmsop merge`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
