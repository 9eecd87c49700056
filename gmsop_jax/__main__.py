"""Runs the command line with `python -m gmsop_jax`."""

import sys

from gmsop_jax.main import console

if __name__ == "__main__":
    sys.exit(console())
