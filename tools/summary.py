"""Writes the tables of networks into the README and docs/networks.md; prints them as `gmsop summary` does.

python tools/summary.py --write
python tools/summary.py --all [--markdown]    the same as `gmsop summary --all`
"""

import pathlib
import sys

from gmsop_jax.analysis import summary
from gmsop_jax.commands.study import summarize_all
from gmsop_jax.errors import UserError, run_command
from gmsop_jax.files import write_atomic
from gmsop_jax.main import main

README = pathlib.Path(__file__).parents[1] / "README.md"
DOCUMENT = README.with_name("docs") / "networks.md"
_MARKS = ("<!-- networks: python tools/summary.py --write -->\n", "<!-- end of networks -->\n")


def write(rows: list[summary.Row]) -> None:
    """Writes the table of all networks to `docs/networks.md`, and those with published results into the README."""
    before, _, rest = README.read_text("utf-8").partition(_MARKS[0])
    _, mark, after = rest.partition(_MARKS[1])
    if not mark:
        raise UserError(f"{README} lacks the lines {_MARKS[0].strip()} and {_MARKS[1].strip()}")
    published = [row for row in rows if row.published.name or row.name == "quickstart.py"]
    short = summary.markdown(published, [column for column in summary.HEADER if column not in ("side", "GMAC, XLA")])
    write_atomic(README, f"{before}{_MARKS[0]}{short}{_MARKS[1]}{after}")
    write_atomic(DOCUMENT, f"{_INTRODUCTION}\n{summary.markdown(rows, summary.HEADER)}")


_INTRODUCTION = """# Networks

Every configuration in `configs/`, as counted by `python tools/summary.py --all`: trained parameters, and multiply-
adds of one image in billions (GMAC). *GMAC* follows the formulas for convolutions, matrix products, covariances and
square roots, and counts only the selected candidates of a gated mixture. *GMAC, XLA* is half the number of operations
that XLA counts, which includes element-wise operations and leaves out the part of a convolution that meets padding.
`= x` agrees with the published value x, and `≠ x` does not. The published errors are those of the authors; none was
reproduced here.
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        sys.exit(run_command(lambda: write(summarize_all(summary.all_configurations()))))
    sys.exit(main(["summary", *sys.argv[1:]]))
