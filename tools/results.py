"""Makes the pages of docs/results from the raw results of the studies.

python tools/results.py
"""

import pathlib
import sys

from gmsop_jax.analysis import results
from gmsop_jax.analysis.study import load_results, load_study
from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.files import write_atomic

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = ROOT / "configs" / "studies"


def make_pages(raw: pathlib.Path, output: pathlib.Path) -> list[pathlib.Path]:
    """Writes one page and one plot for each study that has results, and returns the pages."""
    pages = []
    for file in sorted(STUDIES.glob("*.py")):
        study = load_study(file)
        if study is None or not (found := load_results(raw / study.name)):
            continue
        output.mkdir(parents=True, exist_ok=True)
        page = output / f"{study.name}.md"
        write_atomic(page, results.page(study, found, f"configs/studies/{file.name}"))
        if results.collect(study, found):
            results.plot(study, found, output / f"{study.name}.svg")
        pages.append(page)
    return pages


def main() -> None:
    """Parses the command line and writes the pages."""
    parser = ArgumentParser(description="Makes the pages of docs/results from the raw results of the studies.")
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "results", help="folder of the raw results")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "results")
    options = parser.parse_args()
    for page in make_pages(options.results, options.output):
        print(page)


if __name__ == "__main__":
    sys.exit(run_command(main))
