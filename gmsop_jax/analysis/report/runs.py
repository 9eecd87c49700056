"""The parts of a run that can be read from its working directory without its network."""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gmsop_jax import config as configs
from gmsop_jax.analysis.published import Published, describe_network, find_published
from gmsop_jax.config import ConfigDict
from gmsop_jax.training.history import read_metrics, read_result
from gmsop_jax.training.inputs import Inputs


@dataclasses.dataclass(frozen=True)
class Run:
    """The files of a run.

    Attributes:
      name: name of the folder, or a longer suffix of its path that distinguishes it from other runs.
      config: the resolved configuration.
      records: the records of `metrics.jsonl`.
      result: the contents of `result.json`, or {} if the run is not finished.
    """

    name: str
    workdir: Path
    config: ConfigDict
    records: list[dict[str, Any]]
    result: dict[str, Any]
    inputs: Inputs

    @property
    def network(self) -> str:
        """Head and backbone in a few words."""
        return describe_network(self.config.model)

    @property
    def is_gated(self) -> bool:
        """Whether a gate selects the candidates. Only then is there a balance loss."""
        return self.config.model.head in ("gmgap", "gmsop")

    @property
    def images_per_second(self) -> float | None:
        """The median of the logged training speeds."""
        speeds = [r["images_per_second"] for r in self.records if "images_per_second" in r]
        return statistics.median(speeds) if speeds else None

    @property
    def last(self) -> dict[str, Any]:
        """The metrics of the last evaluation, or an empty dict before the first one."""
        evaluations = [r for r in self.records if r["kind"] == "eval" and "top1_error" in r]
        return evaluations[-1] if evaluations else {}

    @property
    def published(self) -> Published | None:
        """The published result of this network on this data set, if there is one."""
        return find_published(self.config, len(self.inputs.classes), self.inputs.image_size)

    @property
    def data(self) -> str:
        """The name, folder and evaluation split of the data set."""
        split = self.config.eval.split
        images = self.inputs.splits.get(split, "").partition(",")[0]
        return f"{self.inputs.dataset} ({self.config.data.dir}), split {split}" + (images and f" of {images}")

    @property
    def training_images(self) -> str:
        """The number of training images; empty if it is unknown."""
        return self.inputs.splits.get("train", "").partition(" ")[0]


def read_run(workdir: Path) -> Run:
    """Reads a working directory.

    Raises:
      UserError: if the folder is not a working directory, or a file in it is damaged.
    """
    config, result = configs.read(workdir / "config.json"), read_result(workdir) or {}
    return Run(workdir.resolve().name, workdir, config, read_metrics(workdir), result, Inputs.load(workdir))


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Reads several working directories, with distinct names. A directory that is given twice is read once."""
    folders = list({workdir.resolve(): workdir for workdir in workdirs}.values())
    names = distinct_names(folders)
    return [dataclasses.replace(read_run(folder), name=name) for folder, name in zip(folders, names, strict=True)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest suffixes of the folders' paths that are distinct, all with the same number of parts.

    Example:
      >>> distinct_names([Path("sweep/gap/seed0"), Path("sweep/gmsop/seed0")])
      ['gap/seed0', 'gmsop/seed0']
    """
    names, depth = [folder.resolve().name for folder in folders], 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
    return names


def group_by_data(runs: list[Run]) -> list[list[Run]]:
    """Groups runs that were evaluated on the same images, whose errors can be compared."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        split = run.config.eval.split
        images = run.inputs.splits.get(split) or (run.inputs.dataset, run.config.data.dir, split)
        groups.setdefault((images, run.inputs.classes, run.inputs.image_size), []).append(run)
    return list(groups.values())


def configuration_table(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """Returns rows (field, its value in each run, whether the values differ)."""
    fields = [dict(configs.flatten(run.config)) for run in runs]
    rows = [(name, [repr(field[name]) for field in fields]) for name in fields[0]]
    # model.compute_dtype only repeats compute_dtype
    return [(name, values, len(set(values)) > 1) for name, values in rows if name != "model.compute_dtype"]
