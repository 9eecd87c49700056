"""Prints the manifest and the number of images per class of a data set, and draws a contact sheet.

python tools/inspect_dataset.py data/fashion-mnist    # writes data/fashion-mnist/contact_sheet.png
"""

import sys
from pathlib import Path

from gmsop_jax.conversion.inspect import contact_sheet, describe
from gmsop_jax.conversion.job import SHEET_NAME
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ArgumentParser, run_command


def main() -> None:
    """Parses the command line, prints the description and draws the sheet."""
    parser = ArgumentParser(description="Prints the manifest of a data set and draws a contact sheet.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--split", default="train", help="the split to draw (default: train)")
    parser.add_argument("--sheet", type=Path, help=f"image file to write (default: {SHEET_NAME} in the data set)")
    parser.add_argument("--columns", type=int, default=10, help="images per class (default: 10)")
    parser.add_argument("--rows", type=int, default=20, help="largest number of classes (default: 20)")
    args = parser.parse_args()
    sheet = args.sheet or args.directory / SHEET_NAME
    print(describe(Manifest.load(args.directory)))
    contact_sheet(args.directory, args.split, sheet, rows=args.rows, columns=args.columns)
    print(f"contact sheet: {sheet}")


if __name__ == "__main__":
    sys.exit(run_command(main))
