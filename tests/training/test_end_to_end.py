"""The command line from configuration to results, on tiny networks and data."""

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gmsop_jax.config import ConfigDict, default_config, flatten, from_json, load
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import ConfigError
from gmsop_jax.main import main
from gmsop_jax.training import parallel
from gmsop_jax.training.checkpoint import Checkpoints
from gmsop_jax.training.history import read_metrics
from gmsop_jax.training.interrupt import Interrupted
from gmsop_jax.training.layout import read_file
from gmsop_jax.training.loop import train_and_evaluate

STEPS = 12  # three epochs of four


@pytest.fixture(scope="module")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run; tests only read it."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert main(["--config", str(config_file), "--workdir", str(workdir)]) == 0
    return workdir


def arrays(workdir: Path, step: int) -> dict[str, Any]:
    folder = workdir / "checkpoints" / str(step)
    return {
        name: dict(jax.tree_util.tree_leaves_with_path(ocp.StandardCheckpointer().restore(folder / name)))
        for name in ("params", "batch_stats", "opt_state")
    }


def assert_same_arrays(workdir: Path, other: Path, step: int = STEPS) -> None:
    a, b = arrays(workdir, step), arrays(other, step)
    for name, leaves in a.items():
        assert leaves.keys() == b[name].keys()
        for path, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, b[name][path], err_msg=f"{name}{path}")


def fails(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 2) -> str:
    """Runs the command line, which must fail; returns the line that it prints."""
    assert main([str(a) for a in arguments]) == status
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.count("error: ") == 1
    return message[message.index("error: ") :]


# ---- what a run leaves


def test_folder_of_results(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"config.json", "checkpoints", "metrics.jsonl", "result.json", "curves.png"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert (finished / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_result(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["step"] == STEPS
    assert 0 <= result["last_top5_error"] <= result["last_top1_error"] <= 100
    assert result["num_classes"] == 10
    assert result["feature_dimension"] == 10  # 4 · 5/2
    with Checkpoints(finished / "checkpoints", read_only=True) as checkpoints:
        assert result["best_step"] == checkpoints.best_step
    assert result["parameters"] == sum(leaf.size for leaf in arrays(finished, STEPS)["params"].values())
    assert result["wall_seconds"] > 0


def test_resolved_configuration(finished, config_file):
    stored = from_json(read_file(finished, "config.json"))
    assert stored.model.num_classes == 10  # 0 in the file: as the data set
    config = load(config_file)
    config.model.num_classes = 10
    assert dict(flatten(stored)) == dict(flatten(config))


def test_metrics_file(finished):
    records = read_metrics(finished)
    evaluations = [r for r in records if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [4, 8, 12]
    assert [r["epoch"] for r in evaluations] == [1, 2, 3]
    # every third step, and at each epoch's end
    assert [r["step"] for r in records if r["kind"] == "train"] == [3, 4, 6, 8, 9, 12]
    training = [r for r in records if r["kind"] == "train"]
    assert [r["learning_rate"] for r in training] == pytest.approx([0.02] * 4 + [0.002] * 2)
    assert {"loss", "top1_error", "top5_error", "balance_loss", "grad_norm", "images_per_second"} <= set(training[0])
    result = json.loads((finished / "result.json").read_text())
    assert result["best_top1_error"] == min(r["top1_error"] for r in evaluations)
    assert (result["last_top1_error"], result["last_top5_error"]) == (
        evaluations[-1]["top1_error"],
        evaluations[-1]["top5_error"],
    )


def test_the_last_n_and_the_best_are_kept(finished):
    steps = {int(path.name) for path in (finished / "checkpoints").iterdir() if path.name.isdigit()}
    best = json.loads((finished / "result.json").read_text())["best_step"]
    assert steps == {8, 12, best}


def test_training_again_does_nothing_more(finished, tmp_path, config_file, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    assert main(["--config", str(config_file), "--workdir", str(copy)]) == 0
    logged = capsys.readouterr()
    assert "after the last epoch" in logged.out
    assert f"the run in {copy} is finished: step 12 of 12 was reached" in logged.err
    assert read_metrics(copy) == read_metrics(finished)
    before, after = (json.loads((d / "result.json").read_text()) for d in (finished, copy))
    assert after.pop("wall_seconds") >= 0
    before.pop("wall_seconds")
    assert before == after


# ---- evaluation


def printed(text: str) -> tuple[float, float]:
    match = re.search(r"top-1 error ([\d.]+) %, top-5 error ([\d.]+) %", text)
    assert match
    return float(match[1]), float(match[2])


def test_evaluate_prints_what_training_ended_with(finished, tmp_path, config_file, dataset, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    without_training = shutil.copytree(dataset, tmp_path / "val_only")
    for shard in without_training.glob("train-*"):
        shard.unlink()
    result = json.loads((workdir / "result.json").read_text())
    arguments = ["--mode", "evaluate", "--workdir", str(workdir)]
    for more in (
        ["--config", str(config_file)],
        [],  # the run's own configuration
        [f"--config.data.dir={without_training}"],
        ["--config.eval.batch_size=7"],  # 80 is no multiple: other padding
    ):
        assert main(arguments + more) == 0
        top1, top5 = printed(capsys.readouterr().out)
        assert (top1, top5) == pytest.approx((result["last_top1_error"], result["last_top5_error"]), abs=0.005)
    written = json.loads((workdir / "evaluation-val.json").read_text())
    assert (written["step"], written["top1_error"]) == (STEPS, result["last_top1_error"])
    assert written["num_classes"] == result["num_classes"]


def test_a_result_that_can_not_be_written_is_printed(finished, tmp_path, config_file, capsys):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "evaluation-val.json").mkdir()  # as good as a read-only directory, also for root
    assert main(["--config", str(config_file), "--mode", "evaluate", "--workdir", str(workdir)]) == 0
    captured = capsys.readouterr()
    assert "top-1 error" in captured.out
    assert f"warning: the result can't be written to {workdir / 'evaluation-val.json'}" in captured.err


def test_a_data_set_is_not_a_working_directory(config_file, dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "data")
    before = sorted(copy.iterdir())
    arguments = ["--config", config_file, f"--config.data.dir={copy}", "--workdir"]
    for workdir in (copy, tmp_path / "data" / ".." / "data"):
        assert "is a data set; give another --workdir" in fails(capsys, *arguments, workdir)
    assert sorted(copy.iterdir()) == before


def test_a_working_directory_with_a_long_name(config_file, capsys, tmp_path):
    for more in ([], ["--mode", "evaluate"], ["--mode", "predict", "--input", "x.png"]):
        message = fails(capsys, "--config", config_file, "--workdir", tmp_path / ("x" * 300), *more)
        assert "File name too long" in message


def test_a_working_directory_may_have_a_number_for_a_name(finished, tmp_path, config_file, capsys):
    copy = shutil.copytree(finished, tmp_path / "2024")
    assert main(["--config", str(config_file), "--mode", "evaluate", "--workdir", str(copy)]) == 0
    assert "top-1 error" in capsys.readouterr().out


def test_evaluate_a_given_checkpoint(finished, config_file, capsys):
    arguments = ["--config", str(config_file), "--mode", "evaluate", "--checkpoint"]
    assert main([*arguments, str(finished / "checkpoints" / "8")]) == 0
    (record,) = [r for r in read_metrics(finished) if r["kind"] == "eval" and r["step"] == 8]
    assert printed(capsys.readouterr().out)[0] == pytest.approx(record["top1_error"], abs=0.005)


# ---- interruption


def interrupt_at(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """Raises SIGINT as the n-th training batch is placed, counted over all starts."""
    place, seen = parallel.place_batch, [0]

    def place_and_raise(batch, mesh):
        if "mask" not in batch:
            seen[0] += 1
            if seen[0] in calls:
                signal.raise_signal(signal.SIGINT)
        return place(batch, mesh)

    monkeypatch.setattr(parallel, "place_batch", place_and_raise)


@pytest.mark.parametrize(
    ("calls", "stops"),
    [
        ((6,), [6]),  # within the second epoch
        ((4,), [4]),  # at an epoch's end
        ((1, 3, 7), [1, 3, 7]),  # again and again
    ],
)
def test_interrupted_run_ends_in_the_same_bits(finished, tiny, tmp_path, monkeypatch, calls, stops):
    interrupt_at(monkeypatch, *calls)
    for step in stops:
        with pytest.raises(Interrupted, match=f"SIGINT at step {step}, which is saved; run the same") as caught:
            train_and_evaluate(tiny, tmp_path / "run")
        assert caught.value.status == 130
        assert not (tmp_path / "run" / "result.json").exists()
    result = train_and_evaluate(tiny, tmp_path / "run")
    assert_same_arrays(tmp_path / "run", finished)
    expected = json.loads((finished / "result.json").read_text())
    for name in ("last_top1_error", "last_top5_error", "best_top1_error", "best_step", "step"):
        assert result[name] == expected[name]
    records = read_metrics(tmp_path / "run")
    assert [r for r in records if r["kind"] == "eval"] == [r for r in read_metrics(finished) if r["kind"] == "eval"]
    steps = [(r["kind"], r["step"]) for r in records]
    assert len(set(steps)) == len(steps)


def records_without_speed(workdir: Path) -> list[dict]:
    """The records of a run except for the speed, which no two runs have in common."""
    return [{name: value for name, value in r.items() if name != "images_per_second"} for r in read_metrics(workdir)]


@pytest.mark.parametrize("stop", [2, 5, 7])  # between records, also after one in the same epoch
def test_an_interruption_leaves_no_trace_in_metrics_jsonl(finished, tiny, tmp_path, monkeypatch, stop):
    interrupt_at(monkeypatch, stop)
    with pytest.raises(Interrupted):
        train_and_evaluate(tiny, tmp_path / "run")
    assert all(r["step"] % 3 == 0 or r["step"] % 4 == 0 for r in read_metrics(tmp_path / "run"))
    train_and_evaluate(tiny, tmp_path / "run")
    assert records_without_speed(tmp_path / "run") == records_without_speed(finished)


def test_fewer_epochs_than_were_trained(finished, tiny, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    tiny.train.num_epochs = 2
    message = r"num_epochs = 2 ends at step 8, but .*already contains a checkpoint of step 12; set .*num_epochs=3 or"
    with pytest.raises(ConfigError, match=message):
        train_and_evaluate(tiny, copy)


def test_killed_run_resumes_from_its_last_checkpoint(finished, tiny, tmp_path, monkeypatch):
    place, seen = parallel.place_batch, [0]

    def place_or_die(batch, mesh):
        seen[0] += "mask" not in batch
        if seen[0] == 7:
            raise KeyboardInterrupt  # as a second Ctrl-C: nothing is saved
        return place(batch, mesh)

    monkeypatch.setattr(parallel, "place_batch", place_or_die)
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(tiny, tmp_path / "run")
    assert max(r["step"] for r in read_metrics(tmp_path / "run")) == 6
    monkeypatch.undo()
    train_and_evaluate(tiny, tmp_path / "run")
    assert_same_arrays(tmp_path / "run", finished)
    assert records_without_speed(tmp_path / "run") == records_without_speed(
        finished
    )  # none doubled, none lost, none changed


def test_checkpoints_within_an_epoch(finished, tiny, tmp_path, monkeypatch):
    tiny.checkpoint.every_steps = 3
    train_and_evaluate(tiny, tmp_path / "run")
    assert_same_arrays(tmp_path / "run", finished)
    steps = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()}
    best = json.loads((finished / "result.json").read_text())["best_step"]
    assert steps == {9, 12, best}


def test_smaller_last_batch_is_trained_on(tiny, tmp_path):
    tiny.model.head = "gap"
    tiny.train.batch_size = 48  # 80 images: 48 and 32
    tiny.train.drop_last = False
    tiny.train.num_epochs = 1
    tiny.train.learning_rates = ((0.02, 1),)
    assert train_and_evaluate(tiny, tmp_path / "run")["step"] == 2


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Reads the standard error until these words come."""
    assert process.stderr is not None
    text = ""
    for line in process.stderr:
        text += line
        if words in line:
            return text
    raise AssertionError(f"{words!r} did not come:\n{text}")


def test_ctrl_c_in_a_process_of_its_own(start: Callable[..., subprocess.Popen[str]], config_file, tmp_path):
    arguments = ["--config", config_file, "--workdir", tmp_path / "run", "--config.train.num_epochs=1000"]
    process = start(*arguments)
    wait_for(process, "epoch    1/1000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in errors
    stopped = re.search(r"error: stopped by SIGINT at step (\d+), which is saved", errors)
    assert stopped

    process = start(*arguments)
    wait_for(process, f"resuming from step {stopped[1]} ")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75
    assert "stopped by SIGTERM at step" in errors


def test_command_in_a_process_of_its_own(start: Callable[..., subprocess.Popen[str]], finished, config_file, tmp_path):
    process = start("--config", config_file, "--workdir", tmp_path / "run")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "Warning" not in errors
    assert printed(output)[0] == pytest.approx(
        json.loads((finished / "result.json").read_text())["last_top1_error"], abs=0.005
    )
    assert_same_arrays(tmp_path / "run", finished)


def test_ctrl_c_before_the_first_step(config_file, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Manifest, "load", interrupt)
    arguments = ["--config", config_file, "--workdir", tmp_path / "run"]
    assert "stopped by Ctrl-C" in fails(capsys, *arguments, status=130)


# ---- bad input: one line that says what to do, before anything slow


def train(config_file: Path, tmp_path: Path, *more: str) -> list[str]:
    return ["--config", str(config_file), "--workdir", str(tmp_path / "run"), *more]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.batchsize=4", "no field config.train.batchsize; did you mean train.batch_size?"),
        ("train.batch_size=many", "config.train.batch_size must be an int (it is currently 20), but got 'many'"),
        ("model.num_selected=9", "config.model.num_selected (K = 9) exceeds config.model.num_candidates (N = 4)"),
        ("model.num_classes=7", "config.model.num_classes = 7, but the data set"),
        ("train.batch_size=1000", "80 images do not fill a batch of 1000"),
        ("eval.split=test", "no split 'test'; it has train, val"),
    ],
)
def test_bad_configuration(config_file, tmp_path, capsys, assignment, message):
    assert message in fails(capsys, *train(config_file, tmp_path, f"--config.{assignment}"))
    assert not (tmp_path / "run").exists()


def test_missing_configuration_file(tmp_path, capsys):
    assert "none.py does not exist" in fails(capsys, "--config", tmp_path / "none.py")


def test_missing_data_names_the_converter_and_the_quickstart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "imagenet64_gmsop.py"
    message = fails(capsys, "--config", config)
    assert str(tmp_path / "data" / "imagenet64") in message
    assert "gmsop convert imagenet64 --input" in message
    assert "gmsop train --config quickstart" in message
    assert not (tmp_path / "runs").exists()


def bad_data(capsys, config_file: Path, tmp_path: Path, directory: Path) -> str:
    return fails(capsys, *train(config_file, tmp_path, f"--config.data.dir={directory}"))


def test_empty_and_foreign_folders(config_file, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    assert "the folder is empty" in bad_data(capsys, config_file, tmp_path, folder)
    (folder / "holiday.jpg").write_bytes(b"x")
    assert "contains other files" in bad_data(capsys, config_file, tmp_path, folder)
    (folder / "dataset.json").write_text('{"rows": 3}')
    assert "isn't a manifest of gmsop_jax" in bad_data(capsys, config_file, tmp_path, folder)
    assert "it is a file" in bad_data(capsys, config_file, tmp_path, folder / "holiday.jpg")


def test_half_written_folder(config_file, tmp_path, capsys):
    (tmp_path / "data" / ".convert").mkdir(parents=True)
    assert "its conversion is unfinished" in bad_data(capsys, config_file, tmp_path, tmp_path / "data")


def test_damaged_shard(config_file, dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "data")
    shard = next(copy.glob("train-*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert f"shard {shard} has sha256" in bad_data(capsys, config_file, tmp_path, copy)
    shard.write_bytes(content[:-1])
    assert f"shard {shard} has {len(content) - 1} bytes" in bad_data(capsys, config_file, tmp_path, copy)
    shard.unlink()
    assert f"shard {shard} is missing" in bad_data(capsys, config_file, tmp_path, copy)


def test_another_schema(config_file, dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "data")
    manifest = json.loads((copy / "dataset.json").read_text())
    (copy / "dataset.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    assert "has schema_version 99; this release reads 1" in bad_data(capsys, config_file, tmp_path, copy)


def test_labels_out_of_range(config_file, dataset, tmp_path, capsys):
    copy = shutil.copytree(dataset, tmp_path / "data")
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["classes"].pop()  # nine names for labels 0…9
    for split in manifest["splits"].values():
        split["class_counts"][-2:] = [sum(split["class_counts"][-2:])]
    (copy / "dataset.json").write_text(json.dumps(manifest))
    message = fails(capsys, *train(config_file, tmp_path, f"--config.data.dir={copy}", "--config.model.head=gap"))
    assert "has label 9, but the labels of 9 classes are 0 to 8" in message


def test_workdir_of_another_configuration(finished, config_file, capsys):
    arguments = ["--config", config_file, "--workdir", finished]
    message = fails(capsys, *arguments, "--config.seed=7", "--config.model.num_selected=3")
    assert f"{finished} was created with another configuration" in message
    assert "config.seed: 0 → 7" in message
    assert "config.model.num_selected: 2 → 3" in message
    assert message.count("→") == 2


def test_what_does_not_change_the_computation_may_differ(finished, tmp_path, config_file, dataset, capsys):
    copy = shutil.copytree(finished, tmp_path / "run")
    moved = shutil.copytree(dataset, tmp_path / "moved")
    more = [f"--config.data.dir={moved}", "--config.train.log_every_steps=1", "--config.eval.batch_size=7"]
    assert main(["--config", str(config_file), "--workdir", str(copy), *more]) == 0


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": "many"}', "3"])
def test_damaged_config_json(finished, tmp_path, config_file, capsys, text):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(text)
    assert f"{tmp_path / 'run' / 'config.json'} has a damaged configuration" in fails(
        capsys, *train(config_file, tmp_path)
    )


def test_checkpoint_that_does_not_fit(finished, config_file, capsys):
    arguments = ["--config", config_file, "--mode", "evaluate", "--workdir", finished]
    message = fails(capsys, *arguments, "--config.model.candidate_widths=(6, 5)")
    assert "does not fit the model" in message
    assert "/candidates2: checkpoint (4, 6, 4), model (4, 6, 5)" in message
    assert "Traceback" not in message


def test_no_checkpoint_to_evaluate(finished, config_file, tmp_path, capsys):
    arguments = ["--config", config_file, "--mode", "evaluate", "--checkpoint"]
    assert f"no checkpoint at {tmp_path}" in fails(capsys, *arguments, tmp_path)
    message = fails(capsys, *arguments, finished / "checkpoints" / "5")
    assert "no checkpoint at" in message
    assert "there are steps" in message


@pytest.mark.parametrize("item", ["params", "batch_stats", "progress", "metrics"])
def test_damaged_checkpoint(finished, config_file, tmp_path, capsys, item):
    step = shutil.copytree(finished, tmp_path / "run") / "checkpoints" / str(STEPS)
    for file in (step / item).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])
    message = fails(capsys, "--config", config_file, "--mode", "evaluate", "--checkpoint", step)
    assert f"checkpoint {step} " in message


def test_workdir_that_can_not_be_made(config_file, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fails(capsys, "--config", config_file, "--workdir", tmp_path / "file" / "run")
    assert f"can't write to the working directory {tmp_path / 'file' / 'run'}" in message
    assert "another --workdir" in message


def test_non_finite_loss(config_file, tmp_path, capsys):
    more = ["--config.model.head=gap", "--config.train.learning_rates=((0.02, 1), (1e30, 2))"]
    message = fails(capsys, *train(config_file, tmp_path, *more))
    step = re.search(r" at step (\d+)", message)
    assert step
    assert 5 <= int(step[1]) <= 8
    assert "the last good checkpoint is step 4" in message
    assert "learning rate too high" in message
    assert "1e+30" in message


def test_rollback_from_a_rate_that_ruins_the_parameters(config_file, tmp_path, capsys):
    """No ruined state is saved as good, and the message doesn't advise the option that is on."""
    more = ["--config.model.head=gap", "--config.train.learning_rates=((0.02, 1), (1e30, 9))"]
    more += ["--config.train.num_epochs=10", "--config.train.on_nonfinite=rollback", "--config.checkpoint.keep=20"]
    message = fails(capsys, *train(config_file, tmp_path, *more))
    assert "Rolling back and skipping steps did not help" in message
    assert "on_nonfinite" not in message
    last = re.search(r"the last good checkpoint is step (\d+)", message)
    assert last
    good, saved = arrays(tmp_path / "run", 4)["params"], arrays(tmp_path / "run", int(last[1]))["params"]
    for path, leaf in saved.items():  # no update at the huge rate was kept
        np.testing.assert_array_equal(leaf, good[path])


def test_no_checkpoint_before_the_parameters_are_ruined(config_file, tmp_path, capsys):
    more = ["--config.model.head=gap", "--config.train.learning_rates=((1e30, 3),)"]
    message = fails(capsys, *train(config_file, tmp_path, *more, "--config.checkpoint.every_steps=1"))
    assert "there is no earlier checkpoint" in message
    assert "--config.train.on_nonfinite=rollback" in message


def test_flags_that_do_not_exist(capsys):
    assert "unrecognized argument --configs; did you mean --config?" in fails(capsys, "--configs", "x")
    assert "--config quickstart" in fails(capsys, "train")


# ---- library use


def test_a_config_made_in_python(dataset, tmp_path):
    config: ConfigDict = default_config()
    config.data.dir = str(dataset)
    config.model.update(head="gap", blocks_per_stage=1, stem_width=4)
    config.model.stage_widths, config.model.stage_strides = (4,), (4,)
    config.train.update(batch_size=40, num_epochs=1, learning_rates=((0.01, 1),))
    result = train_and_evaluate(config, tmp_path / "run")
    assert result["feature_dimension"] == 4
