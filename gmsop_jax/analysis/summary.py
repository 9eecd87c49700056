"""Tables of parameters, features and multiply-adds of networks, compared with the published values."""

import dataclasses
import math

from gmsop_jax import config as configs
from gmsop_jax.analysis.costs import Cost, cost
from gmsop_jax.analysis.published import Published, describe_network, find_published
from gmsop_jax.analysis.sweep import expand
from gmsop_jax.errors import ConfigError

_DATA_SETS = {"imagenet64": (1000, 64), "places365": (365, 100), "fashion-mnist": (10, 28), "image-folder": (1000, 224)}
HEADER = ["configuration", "network", "side", "features", "parameters", "GMAC", "GMAC, XLA", "published error"]


@dataclasses.dataclass(frozen=True)
class Row:
    """A configuration and a short description of its network, with the counted cost and the published result."""

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
        """Billions of multiply-adds (`Cost.macs`), with as many digits as the published number, if there is one."""
        if self.published.gmacs:
            return _like(self.cost.macs, f"{self.published.gmacs}G").removesuffix("G")
        return _giga(self.cost.macs)

    @property
    def differences(self) -> list[str]:
        """The names of the counts that differ from the published ones."""
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


def _giga(count: float) -> str:
    """Formats a count in billions with two decimals, or with two significant digits if it is small."""
    return f"{count / 1e9:.2f}" if count >= 1e8 else f"{count / 1e9:.2g}"


def summarize(path: str) -> Row:
    """The row of a configuration `file.py` or `file.py:argument`, with the classes and image size of its data set.

    Raises:
      ConfigError: if neither the configuration nor its source determines them.
    """
    config = configs.load(path)
    num_classes, image_size = _DATA_SETS.get(config.data.source, (0, 0))
    image_size = config.data.image_size or image_size
    config.model.num_classes = config.model.num_classes or num_classes
    if not (image_size and config.model.num_classes):
        raise ConfigError(
            f"the number of classes and the image size of config.data.source = {config.data.source!r} are not known;"
            f" set model.num_classes and data.image_size in {path}"
        )
    published = find_published(config) or Published("")
    file, argument = configs.split_argument(path)
    name = ":".join([file.stem, *argument])
    return Row(name, describe_network(config.model), image_size, cost(config.model, image_size), published)


def all_configurations() -> list[str]:
    """The configurations of the package, including each of the `ROWS` of a file."""
    return [path for file in configs.packaged_files() for path in expand(str(file))]


def cells(row: Row) -> list[str]:
    """The cells of a row of the table, one for each column of `HEADER`."""
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
        "–" if math.isnan(compiled) else _giga(compiled),
        " / ".join(errors) + " %" if errors else "–",
    ]


def markdown(rows: list[Row], columns: list[str]) -> str:
    """The table in Markdown, with the named columns of `HEADER`."""
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        shown = dict(zip(HEADER, cells(row), strict=True)) | {"configuration": f"`{row.name}`"}
        lines.append([shown[column] for column in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def text(rows: list[Row]) -> str:
    """The table as text, with aligned columns."""
    lines = [HEADER, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines) + "\n"
