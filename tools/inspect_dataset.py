"""Prints a data set's manifest and counts per class, and draws a contact sheet.

python tools/inspect_dataset.py data/fashion-mnist
"""

import argparse
import sys
from pathlib import Path

from gmsop_jax.conversion.inspect import contact_sheet, describe
from gmsop_jax.data import cli
from gmsop_jax.data.manifest import Manifest


def main() -> None:
    """Parses the command line, prints and draws."""
    parser = argparse.ArgumentParser(description="Prints a data set's manifest and draws a contact sheet.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--split", default="train", help="that the sheet shows (default: train)")
    parser.add_argument("--sheet", type=Path, default=Path("contact_sheet.png"), help="the PNG's name")
    parser.add_argument("--columns", type=int, default=10, help="images per class (default: 10)")
    parser.add_argument("--rows", type=int, default=20, help="at most this many classes (default: 20)")
    args = parser.parse_args()
    manifest = Manifest.load(args.directory)
    print(describe(manifest))
    contact_sheet(args.directory, args.split, args.sheet, rows=args.rows, columns=args.columns)
    print(f"contact sheet: {args.sheet}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
