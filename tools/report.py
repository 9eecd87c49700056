"""Writes an HTML report about one or more runs; the same as `gmsop report`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
