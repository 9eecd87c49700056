"""Parameters, features and multiply-adds of networks, beside the published values.

python tools/summary.py configs/imagenet64_gmsop.py configs/imagenet.py:resnet50,srsop
python tools/summary.py --all [--markdown]
"""

import dataclasses
import math
import pathlib
import sys

from gmsop_jax import config as configs
from gmsop_jax.analysis.costs import Cost, cost
from gmsop_jax.analysis.report.published import Published, find_published
from gmsop_jax.analysis.report.runs import describe_network
from gmsop_jax.analysis.sweep import expand
from gmsop_jax.errors import ArgumentParser, UserError, run_command
from gmsop_jax.files import write_atomic

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
_DATA_SETS = {"imagenet64": (1000, 64), "places365": (365, 100), "fashion-mnist": (10, 28), "image-folder": (1000, 224)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration's network.

    Attributes:
      name: name of the configuration, with its argument.
      network: short description of the network.
      image_size: side of the images.
      cost: the cost, counted from the code.
      published: the published result; its fields are None where there is no value.
    """

    name: str
    network: str
    image_size: int
    cost: Cost
    published: Published

    @property
    def parameters(self) -> str:
        """The number of parameters, with as many digits as the published number."""
        return _like(self.cost.parameters, self.published.parameters)

    @property
    def gmacs(self) -> str:
        """Billions of multiply-adds by formula, with as many digits as the published number."""
        if self.published.gmacs:
            return _like(self.cost.macs, f"{self.published.gmacs}G").removesuffix("G")
        return f"{self.cost.macs / 1e9:.2f}"

    @property
    def differences(self) -> list[str]:
        """The counts that differ from the published ones."""
        pairs = {"parameters": (self.parameters, self.published.parameters), "GMAC": (self.gmacs, self.published.gmacs)}
        return [name for name, (ours, theirs) in pairs.items() if theirs and ours != theirs]


def _like(count: int, printed: str | None) -> str:
    """Formats a count like a published one, which may be rounded or truncated; without one, with two decimals."""
    if printed and printed[-1].isdigit():
        return f"{count:,}"
    unit, digits = (printed[-1], 1) if printed else ("M", 2)
    value = count / {"M": 1e6, "G": 1e9}[unit]
    cut = f"{math.floor(value * 10**digits) / 10**digits:.{digits}f}{unit}"
    return cut if cut == printed else f"{value:.{digits}f}{unit}"


def summarize(path: str) -> Row:
    """The row of a configuration `file.py` or `file.py:argument`, with the classes and image size of its data set."""
    config = configs.load(path)
    num_classes, image_size = _DATA_SETS[config.data.source]
    image_size = config.data.image_size or image_size
    config.model.num_classes = config.model.num_classes or num_classes
    published = find_published(config) or Published("")
    file, argument = configs.split_argument(path)
    name = ":".join([file.name, *argument])
    return Row(name, describe_network(config.model), image_size, cost(config.model, image_size), published)


def all_configurations() -> list[str]:
    """All configurations in configs/; a file with `ROWS` stands for all of them."""
    return [path for file in sorted(CONFIGS.glob("*.py")) for path in expand(str(file))]


def cells(row: Row) -> list[str]:
    """The cells of a row."""
    published = row.published
    errors = [f"{error:g}" for error in (published.top1_error, published.top5_error) if error is not None]

    def beside(ours: str, theirs: str | None) -> str:
        return ours if not theirs else f"{ours} = {theirs}" if ours == theirs else f"{ours} ≠ {theirs}"

    compiled = row.cost.compiled_macs
    return [
        row.name,
        row.network,
        str(row.image_size),
        f"{row.cost.features}",
        beside(row.parameters, published.parameters),
        beside(row.gmacs, published.gmacs),
        "–" if math.isnan(compiled) else f"{compiled / 1e9:.2f}",
        " / ".join(errors) + " %" if errors else "–",
    ]


README = pathlib.Path(__file__).parents[1] / "README.md"
DOCUMENT = README.with_name("docs") / "networks.md"
_MARKS = ("<!-- networks: python tools/summary.py --write -->\n", "<!-- end of networks -->\n")


def write(rows: list[Row]) -> None:
    """Writes the table of all networks to `docs/networks.md`, and those with published results into the README."""
    before, _, rest = README.read_text("utf-8").partition(_MARKS[0])
    _, mark, after = rest.partition(_MARKS[1])
    if not mark:
        raise UserError(f"{README} lacks the lines {_MARKS[0].strip()} and {_MARKS[1].strip()}")
    published = [row for row in rows if row.published.name or row.name == "quickstart.py"]
    short = markdown(published, [column for column in HEADER if column not in ("side", "GMAC, XLA")])
    write_atomic(README, f"{before}{_MARKS[0]}{short}{_MARKS[1]}{after}")
    write_atomic(DOCUMENT, f"{_INTRODUCTION}\n{markdown(rows, HEADER)}")


_INTRODUCTION = """# Networks

Every configuration in `configs/`, as counted by `python tools/summary.py --all`: trained parameters, and multiply-
adds of one image in billions (GMAC). *GMAC* follows the formulas for convolutions, matrix products, covariances and
square roots, and counts only the selected candidates of a gated mixture. *GMAC, XLA* is half the number of operations
that XLA counts, which includes element-wise operations and leaves out the part of a convolution that meets padding.
`= x` agrees with the published value x, and `≠ x` does not. The published errors are those of the authors; none was
reproduced here.
"""
HEADER = ["configuration", "network", "side", "features", "parameters", "GMAC", "GMAC, XLA", "published error"]


def markdown(rows: list[Row], columns: list[str]) -> str:
    """The table in Markdown, with the named columns of `HEADER`."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        shown = dict(zip(HEADER, cells(row), strict=True)) | {"configuration": f"`{row.name}`"}
        lines.append([shown[column] for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def text(rows: list[Row]) -> str:
    """The table in columns."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines) + "\n"


def main() -> None:
    """Parses the command line and prints the table."""
    parser = ArgumentParser(description="Counts networks; '= x' and '≠ x' compare with the published x.")
    parser.add_argument("configs", nargs="*", help="configurations, file.py or file.py:argument")
    parser.add_argument("--all", action="store_true", help="every configuration in configs/")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the tables in README.md and docs/networks.md")
    options = parser.parse_args()
    paths = [*options.configs, *(all_configurations() if options.all or options.write else [])]
    if not paths:
        parser.error("name configurations, or --all")
    rows = []
    for i, path in enumerate(paths, 1):
        if sys.stderr.isatty():
            print(f"\r{i}/{len(paths)}", end="", file=sys.stderr, flush=True)
        rows.append(summarize(path))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # clears the line
    if options.write:
        write(rows)
    print(markdown(rows, HEADER) if options.markdown else text(rows), end="")
    different = [f"{row.name}: {', '.join(row.differences)}" for row in rows if row.differences]
    print(f"\n{len(rows)} networks; counts that differ from the published ones: {'; '.join(different) or 'none'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
