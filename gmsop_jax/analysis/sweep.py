"""Sweeps: trains several configurations with several seeds, one run at a time, and tabulates the results."""

import contextlib
import dataclasses
import pathlib
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from gmsop_jax import config as configs
from gmsop_jax.errors import ConfigError, UserError
from gmsop_jax.training.history import read_result
from gmsop_jax.training.interrupt import RESTART_STATUS

# Exit statuses of a run that a signal stopped; negative if it was stopped before it handled signals.
_INTERRUPTED = (130, RESTART_STATUS, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)


class RunStopped(UserError):
    """A run of a sweep was stopped by a signal that the sweep itself did not receive.

    Attributes:
      status: exit status of the sweep, 75 (EX_TEMPFAIL: try again).
    """

    status = RESTART_STATUS


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: the name of its configuration, and the command that starts or resumes it."""

    name: str
    seed: int
    workdir: pathlib.Path
    command: tuple[str, ...]

    @property
    def result(self) -> dict | None:
        """The contents of `result.json`, or None if the run is not finished."""
        return read_result(self.workdir)


def expand(path: str) -> list[str]:
    """Returns the configurations of a file: `file.py:row` for each of its `ROWS`, or the file itself if it has none.

    Raises:
      ConfigError: if the file does not exist or raises an exception.
    """
    file, argument = configs.split_argument(path)
    if argument:
        return [path]
    rows = getattr(configs.run_file(file), "ROWS", ())
    return [f"{file}:{row}" for row in rows] or [str(file)]


def plan_sweep(
    paths: Sequence[str], seeds: Sequence[int], output: pathlib.Path, overrides: Sequence[str] = ()
) -> list[SweepRun]:
    """Returns the runs of a sweep, ordered by seed, so that every configuration has a result early.

    Args:
      paths: configurations; a file with `ROWS` means all of its rows.
      seeds: the seeds, with one run of each configuration per seed.
      output: the folder in which each run has the working directory `<name>/seed<n>`.
      overrides: assignments `field=value` for every run.

    Raises:
      ConfigError: if a configuration is not valid, if two have the same name, or if the output contains a run of
        another configuration.
    """
    expanded = [configuration for path in paths for configuration in expand(path)]
    names = [configs.run_name(path) for path in expanded]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ConfigError(f"two configurations have the name {sorted(twice)[0]}; give each its own --output")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {' '.join(map(str, seeds))} contains a seed twice; give each seed once")
    jobs = []
    for seed in seeds:
        for name, path in zip(names, expanded, strict=True):
            workdir = output / name / f"seed{seed}"
            _check_same(workdir, configs.load(path, [*overrides, f"seed={seed}"]))
            fields = [f"--config.{item}" for item in (*overrides, f"seed={seed}")]
            command = (sys.executable, "-m", "gmsop_jax.main", "--config", path, "--workdir", str(workdir), *fields)
            jobs.append(SweepRun(name, seed, workdir, command))
    return jobs


def _say(line: str) -> None:
    print(line, flush=True)  # flushed, so that it precedes what the run prints


def _check_same(workdir: pathlib.Path, config: configs.ConfigDict) -> None:
    file = workdir / "config.json"
    if not file.exists():
        return
    kept = configs.read(file)
    config.model.num_classes = kept.model.num_classes  # filled in from the data set
    different = configs.differences(kept, config)
    if kept.train.num_epochs != config.train.num_epochs:
        different.append(f"config.train.num_epochs: {kept.train.num_epochs} → {config.train.num_epochs}")
    if different:
        raise ConfigError(f"{workdir} belongs to another configuration ({'; '.join(different)}); give another --output")


def run(jobs: Sequence[SweepRun], say: Callable[[str], None] = _say) -> list[SweepRun]:
    """Executes the runs that are not finished, each in its own process. A run that fails does not stop the others.

    Returns: the runs that failed.

    Raises:
      KeyboardInterrupt: after a signal to the sweep.
      RunStopped: after a signal to a run.
    """
    failed = []
    for i, job in enumerate(jobs, 1):
        where = f"{i}/{len(jobs)} {job.name}, seed {job.seed}"
        if job.result is not None:
            say(f"{where}: already finished")
            continue
        say(f"{where}:")
        status = _status(job.command)
        if status in _INTERRUPTED:
            raise RunStopped(
                f"the run in {job.workdir} was stopped by a signal; run the same command again to resume the sweep"
            )
        if status:
            how = f"failed with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"
            say(f"{where}: {how}; to see the reason, run: {' '.join(job.command)}")
            failed.append(job)
    return failed


def _status(command: Sequence[str]) -> int:
    """Executes a command and returns its exit status. If the sweep is stopped, the run has time to save its state.

    The terminal sends Ctrl-C to the run as well, so this process only waits for it. SIGTERM and SIGHUP are passed on.
    A signal that was already ignored, such as SIGHUP under nohup, is still ignored.

    Raises:
      KeyboardInterrupt: after one of these signals.
    """
    caught: list[int] = []
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before: dict[int, Any] = {
        number: signal.signal(number, lambda number, _: caught.append(number)) for number in numbers
    }
    forwarded = False
    try:
        process = subprocess.Popen(command)
        while process.poll() is None:
            if not forwarded and (others := [number for number in caught if number != signal.SIGINT]):
                process.send_signal(others[0])
                forwarded = True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        if callable(handler := before[caught[0]]):
            handler(caught[0], None)  # raises KeyboardInterrupt, and records the signal for the exit status
        raise KeyboardInterrupt
    return process.returncode


def table(jobs: Sequence[SweepRun]) -> str:
    """Returns a Markdown table with the last epoch's error of each configuration, over its finished runs.

    The error is given as mean ± standard deviation (n − 1). That of the best epoch is omitted, because the best epoch
    is chosen on the same images that it is measured on.
    """
    lines = [
        "| configuration | runs | top-1 error | parameters | features | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(job.name for job in jobs):
        own = [job.result for job in jobs if job.name == name]
        results = [result for result in own if result is not None]
        runs = f"{len(results)}" if len(results) == len(own) else f"{len(results)} of {len(own)}"
        if not results:
            lines.append(f"| {name} | {runs} | – | – | – | – |")
            continue
        lines.append(
            f"| {name} | {runs} | {_spread([r['last_top1_error'] for r in results])} | {results[0]['parameters']:,} |"
            f" {results[0]['feature_dimension']} | {statistics.median(r['wall_seconds'] for r in results):.0f} |"
        )
    return "\n".join(lines) + "\n"


def _spread(errors: list[float]) -> str:
    deviation = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{statistics.mean(errors):.2f}{deviation} %"
