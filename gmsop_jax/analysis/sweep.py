"""Many runs: configurations × seeds, one after the other, and one table of their results."""

import contextlib
import dataclasses
import json
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence

from gmsop_jax import config as configs
from gmsop_jax.errors import ConfigError

# exit statuses of a run that was stopped and can go on; negative before it caught signals
_INTERRUPTED = (130, 75, -signal.SIGINT, -signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
      name: of its configuration.
      seed: of the run.
      workdir: its results.
      command: what runs it, or goes on with it.
    """

    name: str
    seed: int
    workdir: pathlib.Path
    command: tuple[str, ...]

    @property
    def result(self) -> dict | None:
        """What `result.json` holds; None before the run is finished."""
        file = self.workdir / "result.json"
        return json.loads(file.read_text("utf-8")) if file.exists() else None


def expand(path: str) -> list[str]:
    """The configurations of a file: itself, or `file.py:row` for each of its `ROWS`.

    Raises:
      ConfigError: if there is no such file, or what it does goes wrong.
    """
    file, argument = configs.split_argument(path)
    if argument:
        return [path]
    rows = getattr(configs.run_file(file), "ROWS", ())
    return [f"{file}:{row}" for row in rows] or [str(file)]


def plan(paths: Sequence[str], seeds: Sequence[int], output: pathlib.Path, overrides: Sequence[str] = ()) -> list[Job]:
    """The runs, seed after seed, so that every configuration has a result early.

    Args:
      paths: configurations; a file with `ROWS` stands for all of them.
      seeds: one run for each.
      output: gets a working directory `<name>/seed<n>` for each run.
      overrides: `field=value` of every run.

    Raises:
      ConfigError: if a configuration is not valid, before anything runs, two have the same name, or the
        output has a run of another configuration.
    """
    expanded = [configuration for path in paths for configuration in expand(path)]
    names = [configs.run_name(path) for path in expanded]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two configurations have the name {sorted(twice)[0]}; sweep them into folders of their own")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"a seed is named twice: {' '.join(map(str, seeds))}")
    jobs = []
    for seed in seeds:
        for name, path in zip(names, expanded, strict=True):
            workdir = output / name / f"seed{seed}"
            _check_same(workdir, configs.load(path, [*overrides, f"seed={seed}"]))
            fields = [f"--config.{item}" for item in (*overrides, f"seed={seed}")]
            command = (sys.executable, "-m", "gmsop_jax.main", "--config", path, "--workdir", str(workdir), *fields)
            jobs.append(Job(name, seed, workdir, command))
    return jobs


def _say(line: str) -> None:
    print(line, flush=True)  # before what the run itself prints


def _check_same(workdir: pathlib.Path, config: configs.ConfigDict) -> None:
    file = workdir / "config.json"
    if not file.exists():
        return
    kept = configs.from_json(file.read_text("utf-8"))
    config.model.num_classes = kept.model.num_classes  # what the data set filled in
    different = configs.differences(kept, config)
    if kept.train.num_epochs != config.train.num_epochs:
        different.append(f"config.train.num_epochs: {kept.train.num_epochs} → {config.train.num_epochs}")
    if different:
        raise ConfigError(f"{workdir} is of another configuration ({'; '.join(different)}); give another --output")


def run(jobs: Sequence[Job], say: Callable[[str], None] = _say) -> list[Job]:
    """Runs what isn't finished, each as a process of its own; those that fail don't stop the others.

    Returns: the runs that failed.

    Raises:
      KeyboardInterrupt: if a run was stopped; the same sweep goes on with it.
    """
    failed = []
    for i, job in enumerate(jobs, 1):
        where = f"{i}/{len(jobs)} {job.name}, seed {job.seed}"
        if job.result is not None:
            say(f"{where}: done before")
            continue
        say(f"{where}:")
        status = _status(job.command)
        if status in _INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            say(f"{where}: failed with status {status}; to see why: {' '.join(job.command)}")
            failed.append(job)
    return failed


def _status(command: Sequence[str]) -> int:
    """A run's exit status. A run is given the time to save its state when the sweep is stopped.

    Ctrl-C reaches it from the terminal too, so here it is only waited for; SIGTERM is handed on.

    Raises:
      KeyboardInterrupt: after either.
    """
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers}
    handed_on = False
    try:
        process = subprocess.Popen(command)
        while process.poll() is None:
            if signal.SIGTERM in caught and not handed_on:
                process.terminate()
                handed_on = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
    return process.returncode


def table(jobs: Sequence[Job]) -> str:
    """Mean ± standard deviation (over n − 1) of each configuration's finished runs, in Markdown."""
    lines = [
        "| configuration | runs | top-1 error, last | top-1 error, best | parameters | features | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(job.name for job in jobs):
        own = [job.result for job in jobs if job.name == name]
        results = [result for result in own if result is not None]
        runs = f"{len(results)}" if len(results) == len(own) else f"{len(results)} of {len(own)}"
        if not results:
            lines.append(f"| {name} | {runs} | – | – | – | – | – |")
            continue
        lines.append(
            f"| {name} | {runs} | {_spread([r['last_top1_error'] for r in results])} |"
            f" {_spread([r['top1_error'] for r in results])} | {results[0]['parameters']:,} |"
            f" {results[0]['feature_dimension']} | {statistics.median(r['wall_seconds'] for r in results):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _spread(errors: list[float]) -> str:
    deviation = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{deviation} %"
