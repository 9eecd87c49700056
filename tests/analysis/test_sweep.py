import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from gmsop_jax.analysis import sweep
from gmsop_jax.commands.study import run_sweep
from gmsop_jax.errors import ConfigError, UserError
from gmsop_jax.models.network import HEADS

ROOT = pathlib.Path(__file__).parents[2]
HEADS_FILE = str(ROOT / "configs" / "heads.py")
QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def finish(job: sweep.SweepRun, best: float, last: float, seconds: float) -> None:
    job.workdir.mkdir(parents=True)
    result = {"best_top1_error": best, "last_top1_error": last, "wall_seconds": seconds}
    (job.workdir / "result.json").write_text(json.dumps(result | {"parameters": 1234567, "feature_dimension": 32}))


def test_the_heads_file_has_every_head():
    from gmsop_jax import config

    assert {config.load(path).model.head for path in sweep.expand(HEADS_FILE)} == set(HEADS)


def test_plan_takes_one_seed_after_the_other(tmp_path):
    jobs = sweep.plan_sweep([f"{HEADS_FILE}:gap", QUICKSTART], [3, 4], tmp_path, ["train.num_epochs=2"])
    assert [(job.name, job.seed) for job in jobs] == [
        ("heads-gap", 3),
        ("quickstart", 3),
        ("heads-gap", 4),
        ("quickstart", 4),
    ]
    assert jobs[0].workdir == tmp_path / "heads-gap" / "seed3"
    assert jobs[0].command[-2:] == ("--config.train.num_epochs=2", "--config.seed=3")


def test_nothing_runs_where_a_configuration_is_wrong(tmp_path):
    for paths, overrides, message in [
        ([f"{HEADS_FILE}:gapp"], [], "defines no head 'gapp'; choose one of"),
        ([QUICKSTART], ["train.epochs=2"], "no field config.train.epochs"),
        ([QUICKSTART, QUICKSTART], [], "two configurations have the name quickstart"),
        ([str(tmp_path / "absent.py")], [], r"absent\.py does not exist"),
    ]:
        with pytest.raises(ConfigError, match=message):
            sweep.plan_sweep(paths, [0], tmp_path, overrides)


def test_a_run_of_another_configuration_is_not_taken(tmp_path):
    from gmsop_jax import config

    [job] = sweep.plan_sweep([QUICKSTART], [0], tmp_path)
    finish(job, 1, 1, 1)
    kept = config.load(QUICKSTART)
    kept.model.num_classes = 10
    (job.workdir / "config.json").write_text(config.to_json(kept))
    sweep.plan_sweep([QUICKSTART], [0], tmp_path)
    for override in ("train.num_epochs=17", "model.num_iters=5"):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            sweep.plan_sweep([QUICKSTART], [0], tmp_path, [override])


@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_damaged_file_of_a_run_is_named(tmp_path, name):
    [job] = sweep.plan_sweep([QUICKSTART], [0], tmp_path)
    finish(job, 1, 1, 1)
    for content in (b"", b"null", b"[]", b"3", b'"x"', b'{"seed"', b"\xff\xfe", b"[" * 5000, b'{"wall_seconds": "x"}'):
        (job.workdir / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{job.workdir / name} "):
            sweep.table(sweep.plan_sweep([QUICKSTART], [0], tmp_path))


def test_seeds_are_checked_first(tmp_path):
    with pytest.raises(ConfigError, match="--seeds 0 0 contains a seed twice"):
        sweep.plan_sweep([QUICKSTART], [0, 0], tmp_path)
    with pytest.raises(ConfigError, match="seed must be between 0"):
        sweep.plan_sweep([QUICKSTART], [-1], tmp_path)


def test_finished_runs_are_not_run_again_and_failures_do_not_stop_the_others(tmp_path):
    def job(name: str, code: str) -> sweep.SweepRun:
        return sweep.SweepRun(name, 0, tmp_path / name, (sys.executable, "-c", code))

    touch = f"open({str(tmp_path / 'ran')!r}, 'a').write('x')"
    kill = "import os; os.kill(os.getpid(), 9)"
    jobs = [job("done", touch), job("bad", "raise SystemExit(2)"), job("killed", kill), job("good", touch)]
    finish(jobs[0], 1, 1, 1)
    said: list[str] = []
    assert sweep.run(jobs, said.append) == jobs[1:3]
    assert (tmp_path / "ran").read_text() == "x"
    assert said[0] == "1/4 done, seed 0: already finished"
    assert "2/4 bad, seed 0: failed with status 2; to see the reason, run: " in said[2]
    assert "3/4 killed, seed 0: was killed by SIGKILL; to see the reason, run: " in said[4]


@pytest.mark.parametrize(
    "code", ["raise SystemExit(130)", "raise SystemExit(75)", "import os; os.kill(os.getpid(), 15)"]
)
def test_a_run_that_was_stopped_stops_the_sweep(tmp_path, code):
    job = sweep.SweepRun("a", 0, tmp_path / "a", (sys.executable, "-c", code))
    with pytest.raises(sweep.RunStopped, match=f"the run in {tmp_path / 'a'} was stopped by a signal") as caught:
        sweep.run([job], lambda _: None)
    assert caught.value.status == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_and_the_run_may_save(tmp_path, number):
    run = f"""
import pathlib, signal, sys, time
def save(*_):
    time.sleep(0.5)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(75)
signal.signal({int(number)}, save)
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(60)
"""
    job = sweep.SweepRun("a", 0, tmp_path / "a", (sys.executable, "-c", run))

    def stop():
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    noted: list[int] = []
    before = signal.signal(number, lambda number, _: noted.append(number))
    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        sweep.run([job], lambda _: None)
    thread.join()
    signal.signal(number, before)
    assert (tmp_path / "saved").exists()
    assert noted == [number]  # for the exit status


def test_table_by_hand(tmp_path):
    jobs = sweep.plan_sweep([f"{HEADS_FILE}:gap", f"{HEADS_FILE}:sop", QUICKSTART], [0, 1], tmp_path)
    finish(jobs[0], 10, 11, 60)
    finish(jobs[3], 12, 14, 80)
    finish(jobs[1], 20, 20, 50)
    # gap: the last errors 11 and 14 have mean 12.5 and deviation 3/√2
    assert sweep.table(jobs).splitlines()[2:] == [
        "| heads-gap | 2 | 12.50 ± 2.12 % | 1,234,567 | 32 | 70 |",
        "| heads-sop | 1 of 2 | 20.00 % | 1,234,567 | 32 | 50 |",
        "| quickstart | 0 of 2 | – | – | – | – |",
    ]


@pytest.mark.parametrize("flags", [["--part", "0/2"], ["--gather"], ["--seeds", "0"]])
def test_flags_of_sweeps_are_refused_for_studies(tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--seeds, --part and --gather do not apply to studies"):
        run_sweep([str(ROOT / "configs/studies/fashion_sample_10.py"), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sweep_from_the_command_line_resumes(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), f"{HEADS_FILE}:gap", f"{HEADS_FILE}:avesop"]
    command += ["--seeds", "0", "--output", str(tmp_path / "sweep"), "--config.train.num_epochs=1"]
    command += [f"--config.data.dir={tmp_path / 'data'}", "--config.train.batch_size=1000"]

    def call(*arguments: str) -> str:
        return subprocess.run([*command, *arguments], check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert "heads-avesop | 0 of 1" in call("--gather")
    first = call("--part", "0/2")
    assert "1/1 heads-gap, seed 0:" in first
    assert "heads-avesop | 0 of 1" in first
    both = call()
    assert "1/2 heads-gap, seed 0: already finished" in both
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table in both
    assert "heads-avesop | 1 |" in table
