"""Writes the tables of networks into the README and docs/networks.md, or prints them as `gmsop summary` does.

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
    """Writes the table of all networks to `docs/networks.md`, and a part of it to the README.

    The README contains the networks with published results, and that of the quickstart.
    """
    before, _, rest = README.read_text("utf-8").partition(_MARKS[0])
    _, mark, after = rest.partition(_MARKS[1])
    if not mark:
        raise UserError(
            f"{README} lacks the lines {_MARKS[0].strip()} and {_MARKS[1].strip()}; add them where the table belongs"
        )
    published = [row for row in rows if row.published.name or row.name == "quickstart"]
    short = summary.markdown(published, [column for column in summary.HEADER if column not in ("side", "GMAC, XLA")])
    write_atomic(README, f"{before}{_MARKS[0]}{short}{_MARKS[1]}{after}")
    write_atomic(DOCUMENT, f"{_INTRODUCTION}\n{summary.markdown(rows, summary.HEADER)}")


_INTRODUCTION = """# Networks

This page lists the network of every configuration in `configs/`. The numbers are counted from the code, for one image
and the number of classes of the data set; `gmsop summary --all` prints them. The columns are:

- *configuration*: the name, with an argument after a colon. `gmsop train --config NAME` trains the network.
- *network*: the head and the backbone. GM-SOP-16-8 selects 8 of 16 candidates for each image. A backbone with
  *1 block × (16, 32, 32)* has three stages of one block each, with 16, 32 and 32 channels.
- *side*: height and width of the images in pixels.
- *features*: dimension of the pooled vector that the classifier receives.
- *parameters*: number of trained parameters.
- *GMAC*: multiply-adds of the forward pass, in billions. Convolutions and matrix products are counted, including those
  of covariances and square roots, for the candidates that an image selects. An eigendecomposition of a d × d matrix
  counts as 9 d³.
- *GMAC, XLA*: half the number of operations that XLA counts. This includes element-wise operations, and excludes the
  part of a convolution that covers padding.
- *published error*: the top-1 / top-5 error that the authors report. None of these errors has been reproduced with this
  package yet.

In *parameters* and *GMAC*, `= x` means that the count agrees with the published value x, and `≠ x` means that it does
not. [Differences from the original](differences.md#networks-and-published-numbers) explains where the authors' networks
differ from their published counts.
"""


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        sys.exit(run_command(lambda: write(summarize_all(summary.all_configurations()))))
    sys.exit(main(["summary", *sys.argv[1:]]))
