"""Studies: comparisons of methods, each with hyperparameters that are chosen on validation images.

A study trains every method at every point of its grid, and chooses the point with the lowest error on the split `val`.
With that point, it trains the method with every seed on every data set, and measures the test splits once. The results
are JSON, one file for each run; a run whose file exists is not repeated.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from gmsop_jax import config as configs
from gmsop_jax.analysis.costs import cost
from gmsop_jax.config import ConfigDict
from gmsop_jax.data import pipeline
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ConfigError, DataError, UserError
from gmsop_jax.files import read_object, write_json
from gmsop_jax.inference.predict import make_predict_step
from gmsop_jax.training import restore
from gmsop_jax.training.history import read_metrics
from gmsop_jax.training.loop import train_and_evaluate
from gmsop_jax.training.metrics import NonFiniteError

Point = tuple[str, ...]  # assignments `field=value`
_RUN_FIELDS = {"method": str, "point": list, "seed": int, "data": str, "config": dict, "splits": dict}
_MEASURED_FIELDS = {  # of a run that did not diverge
    **{"parameters": int, "macs": float, "epoch_seconds": float, "wall_seconds": float, "train_images": int},
    **{"device": str, "commit": str, "versions": dict},
}
_MEASURES = ("loss", "top1_error", "balanced_error")  # of each split
_PACKAGES = ("gmsop_jax", "jax", "jaxlib", "flax", "optax", "numpy")


def short_form(assignment: str) -> str:
    """An assignment without the section of its field.

    Example:
      >>> short_form("train.balance_weight=20.0")
      'balance_weight=20.0'
    """
    field, _, value = assignment.partition("=")
    return f"{field.rpartition('.')[2]}={value}"


@dataclasses.dataclass(frozen=True)
class StudyData:
    """A data set of a study: the name of its folder, and the SOURCE and options of `gmsop convert`."""

    name: str
    source: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Study:
    """A comparison of methods.

    Attributes:
      name: name of the folder of results.
      title: heading of the page of results.
      grids: for each method, the points of hyperparameters to choose from. A method is an argument of the file's
        `get_config`.
      data: the data sets, such as folds; hyperparameters are chosen on the first one.
      seeds: seeds of the final runs; hyperparameters are chosen with the first one.
      test_splits: splits that are measured, with the main one first.
      reference: the method that the others are compared with.
      notes: text for the page of results.
    """

    name: str
    title: str
    grids: Mapping[str, Sequence[Point]]
    data: Sequence[StudyData]
    seeds: Sequence[int] = range(5)
    test_splits: Sequence[str] = ("test",)
    reference: str = "srsop"
    notes: str = ""

    def __post_init__(self):
        for name in ("grids", "data", "seeds", "test_splits"):
            if not getattr(self, name):
                raise ConfigError(f"the study {self.name} has no {name}; give at least one")


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One training run of a study; its `name` is that of its working directory and of its result."""

    study: str
    method: str
    point: Point
    seed: int
    data: str

    @property
    def name(self) -> str:
        """A name that is unique within the study."""
        name = "-".join([self.method, *map(short_form, self.point), self.data, f"seed{self.seed}"])
        return "".join(char for char in name if char.isalnum() or char in "-_.=,").replace(",", "_")


class StudyRunner:
    """Executes the runs of a study one at a time in this process.

    Args:
      study: the study.
      path: its configuration file, with `get_config(method)`.
      data_dir: the folder that contains the data sets.
      output: the folder for working directories.
      results: the folder for results, which are written to its subfolder with the name of the study.
    """

    def __init__(
        self,
        study: Study,
        path: str | pathlib.Path,
        *,
        data_dir: pathlib.Path,
        output: pathlib.Path,
        results: pathlib.Path,
    ):
        self.study, self.path, self.data_dir = study, pathlib.Path(path), data_dir
        self.output, self.results = output / study.name, results / study.name

    def selection_runs(self, method: str) -> list[StudyRun]:
        """The runs among which the hyperparameters of a method are chosen."""
        return [self._run(method, point, self.study.seeds[0], self.study.data[0]) for point in self.study.grids[method]]

    def choose(self, method: str) -> Point:
        """Returns the point with the lowest balanced error on `val`; among equal ones, that with the lowest loss."""

        def key(run: StudyRun) -> tuple[float, float]:
            measured = self.measure(run, ["val"])["splits"].get("val", {})  # nothing, if the run diverged
            return measured.get("balanced_error", math.inf), measured.get("loss", math.inf)

        return min(self.selection_runs(method), key=key).point

    def execute(self) -> None:
        """Executes all runs that have no result yet. If it is interrupted, call it again to continue."""
        study = self.study
        points = {method: self.choose(method) for method in study.grids}
        for seed in study.seeds:
            for data in study.data:
                for method, point in points.items():
                    self.measure(self._run(method, point, seed, data), ["val", *study.test_splits])

    def measure(self, run: StudyRun, splits: Sequence[str]) -> dict[str, Any]:
        """Returns the result of a run with measurements of `splits`; trains and measures what is missing.

        If the loss becomes non-finite, the result has the entry `diverged` and no measurements.

        Raises:
          ConfigError: if the stored result was measured with another configuration.
          UserError: if the stored result is damaged.
        """
        file = self.results / f"{run.name}.json"
        config = self.config(run)
        fields = _changed_fields(config)
        result = read_result(file) if file.exists() else {}
        if result and result["config"] != json.loads(json.dumps(fields)):
            raise ConfigError(f"{file} was measured with another configuration; delete it, or rename the study")
        missing = [split for split in splits if split not in result.get("splits", {})]
        if not missing or "diverged" in result:
            return result
        workdir = self.output / run.name
        print(f"{run.name}:")
        try:
            trained = train_and_evaluate(config, workdir)
            result = result or _describe(run, config, fields, trained, workdir)
            measured = {split: measure_split(workdir, split, config.data) for split in missing}
            result["splits"] = result.get("splits", {}) | measured
        except NonFiniteError as error:  # other points may not diverge, so the study continues
            result = dataclasses.asdict(run) | {"config": fields, "diverged": str(error), "splits": {}}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        jax.clear_caches()  # every run compiles its own step, whose program is no longer needed
        return result

    def config(self, run: StudyRun) -> ConfigDict:
        """The configuration of a run."""
        folder = self.data_dir / run.data
        fields = [*run.point, f"seed={run.seed}", f"data.dir={folder}", "eval.split=val", "checkpoint.keep=1"]
        return configs.load(f"{self.path}:{run.method}", fields)

    def _run(self, method: str, point: Point, seed: int, data: StudyData) -> StudyRun:
        return StudyRun(self.study.name, method, point, seed, data.name)


def load_study(path: str | pathlib.Path) -> Study | None:
    """Returns the study that a configuration file defines as `STUDY`, or None if it defines none."""
    file, _ = configs.split_argument(path)
    study = getattr(configs.run_file(file), "STUDY", None)
    if not isinstance(study, Study | None):
        raise ConfigError(f"STUDY in {file} must be a gmsop_jax.analysis.study.Study, got {study!r}")
    return study


def load_results(folder: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the results in a folder, sorted by file name. Raises UserError if one is damaged."""
    return [read_result(file) for file in sorted(folder.glob("*.json"))]


def read_result(file: pathlib.Path) -> dict[str, Any]:
    """Reads the result of a run. Raises UserError if it is damaged."""
    remedy = "delete it, and run the study again"
    result = read_object(file, _RUN_FIELDS, remedy)
    if "diverged" not in result:
        read_object(file, _MEASURED_FIELDS, remedy)
    for split, measured in result["splits"].items():
        values = [measured.get(name) for name in _MEASURES] if isinstance(measured, dict) else [None]
        if not all(type(value) in (int, float) for value in values):
            raise UserError(f"{file} is damaged (the split {split} lacks one of {', '.join(_MEASURES)}); {remedy}")
    return result


def measure_split(workdir: pathlib.Path, split: str, data: ConfigDict) -> dict[str, Any]:
    """Measures the last checkpoint of a run on a split of `data`, which may have moved since the run started.

    Returns: `loss` (nats), `top1_error` and `balanced_error` (percent), and `confusion`, the number of images of each
      true class (row) that were predicted as each class (column). For a gate, also `gate_entropy`, the mean entropy of
      an image's weights (bits), and `gate_use`, the sum of the weights over the images of each class [classes, n].
    """
    model, variables, info = restore.load(workdir)
    config = info.config
    predict = jax.jit(make_predict_step(model, mean_rgb=info.inputs.mean_rgb, flip_average=config.eval.flip_average))
    counts = np.zeros((len(info.inputs.classes),) * 2, int)
    use = np.zeros((len(info.inputs.classes), info.num_candidates))
    loss = entropy = 0.0
    evaluation = ConfigDict(config.eval.to_dict())
    evaluation.split = split
    batches = pipeline.eval_batches(data, evaluation, Manifest.load(data.dir, splits=(split,)))
    with contextlib.closing(batches):
        for batch in batches:
            outputs = {
                name: np.asarray(value, np.float64)[batch["mask"]]
                for name, value in predict(variables, batch["image"]).items()
            }
            labels, probabilities, weights = (
                batch["label"][batch["mask"]],
                outputs["probabilities"],
                outputs["gate_weights"],
            )
            np.add.at(use, labels, weights)
            entropy -= np.sum(weights * np.log2(np.where(weights > 0, weights, 1)))
            np.add.at(counts, (labels, probabilities.argmax(1)), 1)
            loss -= np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-30)).sum()
    measured = {
        "loss": loss / counts.sum(),
        "top1_error": float(100 * (1 - np.trace(counts) / counts.sum())),
        "balanced_error": balanced_error(counts),
        "confusion": counts.tolist(),
    }
    if info.num_candidates > 1:
        measured |= {"gate_entropy": entropy / counts.sum(), "gate_use": np.round(use, 3).tolist()}
    return measured


def balanced_error(confusion: Any) -> float:
    """The mean error over the classes that occur, in percent.

    Example:
      >>> balanced_error([[8, 2], [0, 0]])
      20.0
    """
    counts = np.asarray(confusion)
    sizes = counts.sum(1)
    return float(np.mean(100 - 100 * np.diag(counts)[sizes > 0] / sizes[sizes > 0]))


def _describe(
    run: StudyRun, config: ConfigDict, fields: dict[str, Any], trained: Mapping[str, Any], workdir: pathlib.Path
) -> dict[str, Any]:
    """Returns the part of a result that describes how it was obtained."""
    manifest = Manifest.load(config.data.dir, splits=())
    size = config.data.image_size or (manifest.split("train").image_size or (0,))[0]
    if not size:
        raise DataError(f"the images of {config.data.dir} differ in size; a study needs images of one size")
    network = ConfigDict(config.model.to_dict())
    network.num_classes = manifest.num_classes
    speeds = [record["images_per_second"] for record in read_metrics(workdir) if "images_per_second" in record]
    num_images = manifest.split("train").num_images
    return dataclasses.asdict(run) | {
        "config": fields,
        "classes": list(manifest.classes),
        "train_images": num_images,
        "parameters": trained["parameters"],
        "features": trained["feature_dimension"],
        "macs": cost(network, size).macs,
        "epoch_seconds": round(num_images / statistics.median(speeds), 2),
        "wall_seconds": trained["wall_seconds"],
        "device": f"{trained['device']}, {platform.processor() or platform.machine()}",
        "commit": find_commit(pathlib.Path(__file__)),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _changed_fields(config: ConfigDict) -> dict[str, Any]:
    """The fields that differ from their defaults, without the seed and the folder of the data."""
    default = dict(configs.flatten(configs.default_config()))
    ignored = ("data.dir", "seed")
    return {name: value for name, value in configs.flatten(config) if value != default[name] and name not in ignored}


def find_commit(file: pathlib.Path) -> str:
    """Returns the commit of the repository that tracks a file, with `-dirty` after changes, or an empty string.

    A package that is installed inside another repository, as in a virtual environment, is not tracked by it.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return ""
