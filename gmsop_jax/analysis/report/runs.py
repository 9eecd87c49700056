"""The parts of a run that can be read from its working directory without its network."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from gmsop_jax import config as configs
from gmsop_jax.analysis.report.published import Published, find_published
from gmsop_jax.config import ConfigDict
from gmsop_jax.training.writer import read_metrics, read_result


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a run.

    Attributes:
      name: name of the folder, made unique by `read_runs`.
      workdir: the folder.
      config: the resolved configuration.
      records: the records of `metrics.jsonl`.
      result: the contents of `result.json`, or {} if the run is not finished.
      published: the published result of this network, if there is one.
    """

    name: str
    workdir: Path
    config: ConfigDict
    records: list[dict[str, Any]]
    result: dict[str, Any]
    published: Published | None

    @property
    def network(self) -> str:
        """Head and backbone in a few words."""
        return describe_network(self.config.model)

    @property
    def images_per_second(self) -> float | None:
        """The median of the logged training speeds."""
        speeds = [r["images_per_second"] for r in self.records if "images_per_second" in r]
        return statistics.median(speeds) if speeds else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest top-1 error. If several are equal, the last of them."""
        evaluations = [r for r in self.records if r["kind"] == "eval" and "top1_error" in r]
        return min(reversed(evaluations), key=lambda r: r["top1_error"], default=None)


def read_run(workdir: Path) -> Run:
    """Reads a working directory.

    Raises:
      UserError: if the folder is not a working directory, or a file in it is damaged.
    """
    config, result = configs.read(workdir / "config.json"), read_result(workdir) or {}
    return Run(workdir.resolve().name, workdir, config, read_metrics(workdir), result, find_published(config))


def read_runs(workdirs: list[Path]) -> list[Run]:
    """Reads several working directories. A number is added to a name that is already taken."""
    runs: list[Run] = []
    for number, workdir in enumerate(workdirs, 1):
        run = read_run(workdir)
        taken = any(run.name == other.name for other in runs)
        runs.append(dataclasses.replace(run, name=f"{run.name} ({number})") if taken else run)
    return runs


def configuration_table(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """Returns rows (field, its value in each run, whether the values differ)."""
    fields = [dict(configs.flatten(run.config)) for run in runs]
    rows = [(name, [repr(field[name]) for field in fields]) for name in fields[0]]
    # model.compute_dtype only repeats compute_dtype
    return [(name, values, len(set(values)) > 1) for name, values in rows if name != "model.compute_dtype"]


_HEADS = {"gap": "GAP", "sop": "SOP", "srsop": "SR-SOP", "mpncov": "MPN-COV", "dropcov": "DropCov", "sot": "SoT"}
_MIXTURES = {"gm": "GM", "ave": "Ave", "concat": "Concat"}
_NARROW = {(2, 1): "ResNet-18", (4, 2): "WRN-36-2", (6, 1): "narrow ResNet-50"}


def describe_network(m: ConfigDict) -> str:
    """Describes the head and the backbone of `config.model` in a few words.

    Example:
      >>> from gmsop_jax.config import model_defaults
      >>> describe_network(model_defaults())
      'GM-SOP-16-8 on ResNet-18'
    """
    return f"{_describe_head(m)} on {_describe_backbone(m)}"


def _describe_head(m: ConfigDict) -> str:
    kind = m.head.removesuffix("gap").removesuffix("sop")
    if kind in _MIXTURES:
        size = f"{m.num_candidates}-{m.num_selected}" if kind == "gm" else f"{m.num_candidates}"
        return f"{_MIXTURES[kind]}-{m.head.removeprefix(kind).upper()}-{size}"
    projection = f" of {m.projection_widths[-1]} channels" if m.projection_widths else ""
    return f"{_HEADS.get(m.head, m.head)}{projection}"


def _describe_backbone(m: ConfigDict) -> str:
    if m.backbone != "narrow":
        return m.backbone.replace("resnext", "ResNeXt-").replace("resnet", "ResNet-").replace("_", " ")
    size = (m.blocks_per_stage, m.width_factor)
    if tuple(m.stage_widths) == (16, 32, 64, 128) and size in _NARROW:
        return _NARROW[size]
    widths = ", ".join(str(width * m.width_factor) for width in m.stage_widths)
    return f"{m.blocks_per_stage} block{'s' if m.blocks_per_stage > 1 else ''} × ({widths})"
