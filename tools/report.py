"""Writes a report about a trained network, or about several side by side.

python tools/report.py runs/quickstart
"""

import pathlib
import sys

from gmsop_jax.errors import ArgumentParser, ConfigError, UserError, run_command


def main() -> None:
    """Parses the command line and writes the page."""
    parser = ArgumentParser(description="Writes a self-contained HTML page about one run or several.")
    parser.add_argument("workdir", nargs="+", type=pathlib.Path, help="working directory of a training run")
    parser.add_argument("--output", type=pathlib.Path, help="the HTML file (default: report.html in the first folder)")
    parser.add_argument("--data", type=pathlib.Path, help="folder of the data set (default: as in the configuration)")
    parser.add_argument("--max-images", type=int, default=5000, help="images per split at most (default: 5000)")
    args = parser.parse_args()
    if args.max_images < 1:
        raise ConfigError(f"--max-images must be at least 1, got {args.max_images}")
    try:
        from gmsop_jax.analysis.report import build_report
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install 'gmsop-jax[report]'") from error
    page = build_report(args.workdir, data=args.data, max_images=args.max_images)
    output = args.output or args.workdir[0] / "report.html"
    try:
        output.write_text(page, "utf-8")
    except OSError as error:
        raise UserError(f"the report can't be written to {output} ({error.strerror}); give another --output") from error
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_command(main))
