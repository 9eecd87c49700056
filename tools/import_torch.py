"""Creates a run from PyTorch weights; the same as `gmsop import`."""

import sys

from gmsop_jax.main import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
