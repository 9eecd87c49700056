"""Exports a trained network, and checks the copy against the original.

python tools/export.py runs/quickstart --format stablehlo
"""

import pathlib
import sys

from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.inference.export import export_safetensors, export_stablehlo
from gmsop_jax.training import checkpoint


def main() -> None:
    """Parses the command line, exports, and prints files and differences."""
    parser = ArgumentParser(description="Exports a trained network.")
    parser.add_argument("run", type=pathlib.Path, help="working directory, or one step's folder in it")
    parser.add_argument("--format", choices=("stablehlo", "safetensors"), required=True)
    parser.add_argument("--output", type=pathlib.Path, help="folder (default: export/FORMAT in the run's)")
    args = parser.parse_args()
    export = {"stablehlo": export_stablehlo, "safetensors": export_safetensors}[args.format]
    output = args.output or checkpoint.locate(args.run)[0].parent / "export" / args.format
    exported = export(args.run, output)
    for file in exported.files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    largest = ", ".join(f"{name} {difference:.2g}" for name, difference in exported.differences.items())
    print(f"largest differences from the original on random images: {largest}")


if __name__ == "__main__":
    sys.exit(run_command(main))
