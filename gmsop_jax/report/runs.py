"""What a working directory tells of its run without its network."""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.report.published import Published, find_published
from gmsop_jax.writer import read_metrics


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's files.

    Attributes:
      name: of the folder; made unique by `read_runs`.
      workdir: the folder.
      config: resolved.
      records: of `metrics.jsonl`.
      result: of `result.json`; {} if the run isn't finished.
      published: the authors' row for this network.
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
        m = self.config.model
        head = {"gap": "GAP", "srsop": "SR-SOP", "gmgap": "GM-GAP", "gmsop": "GM-SOP"}[m.head]
        if m.head.startswith("gm"):
            head += f"-{m.num_candidates}-{m.num_selected}"
        elif m.projection_widths:
            head += f" of {m.projection_widths[-1]} channels"
        widths = ", ".join(str(width * m.width_factor) for width in m.stage_widths)
        blocks = f"{m.blocks_per_stage} block{'s' if m.blocks_per_stage > 1 else ''}"
        return f"{head} on {blocks} × ({widths})"

    @property
    def images_per_second(self) -> float | None:
        """Median of what training told."""
        speeds = [r["images_per_second"] for r in self.records if "images_per_second" in r]
        return statistics.median(speeds) if speeds else None

    @property
    def best(self) -> dict[str, Any] | None:
        """The evaluation with the lowest top-1 error, the last of equals."""
        evaluations = [r for r in self.records if r["kind"] == "eval"]
        return min(reversed(evaluations), key=lambda r: r["top1_error"], default=None)


def read_run(workdir: Path) -> Run:
    """Reads a working directory.

    Raises:
      CheckpointError: if it is none, or a file in it is damaged.
    """
    file = workdir / "config.json"
    try:
        config = configs.from_json(file.read_text("utf-8"))
        file = workdir / "result.json"
        result = json.loads(file.read_text("utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); name a folder that a training run made") from error
    name = workdir.resolve().name
    return Run(name, workdir, config, read_metrics(workdir), result, find_published(config))


def read_runs(workdirs: list[Path]) -> list[Run]:
    """Reads several; folders of one name are told apart by their number."""
    runs: list[Run] = []
    for number, workdir in enumerate(workdirs, 1):
        run = read_run(workdir)
        taken = any(run.name == other.name for other in runs)
        runs.append(dataclasses.replace(run, name=f"{run.name} ({number})") if taken else run)
    return runs


def configuration_table(runs: list[Run]) -> list[tuple[str, list[str], bool]]:
    """Rows (field, its value in each run, whether they differ)."""
    fields = [dict(configs.flatten(run.config)) for run in runs]
    names = [name for name in fields[0] if name != "model.compute_dtype"]  # follows compute_dtype
    rows = []
    for name in names:
        values = [repr(field[name]) for field in fields]
        rows.append((name, values, len(set(values)) > 1))
    return rows
