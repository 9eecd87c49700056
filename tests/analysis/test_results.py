import dataclasses
import itertools
import json
import pathlib
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

import results as results_tool
from gmsop_jax.analysis import results, results_plots, study
from gmsop_jax.analysis.study import (
    Study,
    StudyData,
    StudyRunner,
    balanced_error,
    find_commit,
    load_results,
    load_study,
)
from gmsop_jax.commands.study import prepare_data
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.sources import Options
from gmsop_jax.errors import ConfigError, DataError, UserError
from gmsop_jax.training.metrics import NonFiniteError

ROOT = pathlib.Path(__file__).parents[2]
STUDY_FILES = [file for file in sorted((ROOT / "configs/studies").glob("*.py")) if load_study(file)]
TINY = """
from gmsop_jax.config import default_config

def get_config(method):
    c = default_config()
    c.model.blocks_per_stage, c.model.stage_widths, c.model.stage_strides, c.model.stem_width = 1, (4,), (2,), 4
    c.model.head = method
    c.train.learning_rates, c.train.num_epochs, c.train.batch_size = ((0.05, 1),), 1, 4
    c.eval.batch_size = 4
    return c
"""


def result(method: str, seed: int, error: float, *, data: str = "d", point: tuple[str, ...] = ("train.rate=0.1",)):
    """A result as `StudyRunner.measure` returns it, with the given error on the test images."""
    wrong = round(error)
    measured = {"balanced_error": error, "top1_error": error, "loss": 1.0}
    return {
        "method": method,
        "seed": seed,
        "data": data,
        "point": list(point),
        "splits": {"val": measured, "test": measured | {"confusion": [[100 - wrong, wrong], [0, 0]]}},
        "parameters": 1234,
        "macs": 2_500_000,
        "epoch_seconds": 1.5,
        "wall_seconds": 36.0,
        "train_images": 8,
        "classes": ["a", "b", "c"],
        "device": "1 × cpu",
        "commit": "abc",
        "versions": {"jax": "0"},
    }


def a_study(**fields) -> Study:
    grids = {method: [("train.rate=0.1",)] for method in ("srsop", "gap", "gmsop")}
    return Study(**{"name": "s", "title": "S", "grids": grids, "data": [StudyData("d", "x")], **fields})


def test_balanced_error_counts_every_class_alike():
    assert balanced_error([[90, 10], [5, 5]]) == pytest.approx((10 + 50) / 2)


def test_interval_is_that_of_students_t():
    estimate = results.Estimate.of([1.0, 2.0, 4.0, 5.0])
    # t(0.975, 3) = 3.182446; the standard deviation is sqrt(10 / 3)
    assert estimate.half_width == pytest.approx(3.182446 * (10 / 3) ** 0.5 / 2)
    assert np.isnan(results.Estimate.of([1.0]).half_width)


def test_differences_are_paired_by_seed_and_data_set():
    data = [StudyData("a", "x"), StudyData("b", "x")]
    errors = {("srsop", 0): (10, 20), ("srsop", 1): (12, 22), ("gap", 0): (11, 23), ("gap", 1): (12, 24)}
    found = [result(m, s, e, data=d) for (m, s), pair in errors.items() for d, e in zip("ab", pair, strict=True)]
    found.append(result("gap", 2, 50, data="a"))  # has no run on b yet, so seed 2 is not counted
    srsop, gap = results.collect(a_study(data=data), found)
    assert srsop.errors["test"] == {(0, "a"): 10, (0, "b"): 20, (1, "a"): 12, (1, "b"): 22}
    assert len(gap.runs) == 4
    delta = results.difference(gap, srsop, "test")
    assert delta is not None
    assert (delta.mean, delta.count) == (pytest.approx((1 + 3 + 0 + 2) / 4), 4)


def test_final_runs_of_two_points_are_not_averaged():
    found = [result("gap", seed, 10, point=(f"train.rate={rate}",)) for seed, rate in ((0, 0.1), (1, 0.1), (1, 0.2))]
    with pytest.raises(ConfigError, match=r"gap in results/s have different hyperparameters \(rate=0\.1; rate=0\.2\)"):
        results.collect(a_study(), found)


def test_page_says_which_differences_are_larger_than_chance():
    errors = {"srsop": (10, 11, 12), "gap": (15, 16.1, 16.9), "gmsop": (9, 12, 11)}
    found = [result(method, seed, error) for method, all_ in errors.items() for seed, error in enumerate(all_)]
    page = results.page(a_study(), found, "configs/studies/s.py")
    assert "lies below 0 for no method, and above 0 for gap" in page
    assert "It contains 0, or there are too few runs, for gmsop." in page
    row = "| gap | 3 | 16.00 ± 0.95 % | 16.00 ± 0.95 % | +5.00 [+4.75, +5.25] | 1,234 | 2.50 | 1.5 | rate=0.1 |"
    assert row in page


def test_page_says_how_much_a_gate_knows_about_the_classes():
    found = [result("gmsop", 0, 10), result("srsop", 0, 10)]
    gate = {"gate_entropy": 1.0, "gate_use": [[3, 0, 1], [0, 3, 1]]}
    found[0]["splits"]["test"] |= gate
    # H(class) = 1, H(candidate) = 6/8 · log₂(8/3) + 2/8 · 2 = 1.5613, H(both) = 6/8 · log₂(8/3) + 2/8 · 3 = 1.8113
    assert "| gmsop | 0.750 bits | 1.00 bits | 1.56 bits |" in results.page(a_study(), found, "x")
    assert "What the gate does" not in results.page(a_study(), found[1:], "x")


def test_page_says_how_much_a_gate_knows_about_the_kinds_of_images(tmp_path: pathlib.Path):
    found = result("gmsop", 0, 10)
    found["classes"] = ["elpv/sound", "elpv/broken", "emoji/flags"]
    found["splits"]["test"] |= {"gate_entropy": 1.0, "gate_use": [[2, 0, 1], [1, 0, 0], [0, 3, 1]]}
    # as in the test above, once the two classes of a kind are added up
    assert "| gmsop | 0.750 bits | 1.000 bits |" in results.page(a_study(), [found], "x")
    results_plots.plot_gate(a_study(), [found], tmp_path / "gate.svg")
    assert "emoji" in (tmp_path / "gate.svg").read_text()

    found["classes"] = ["a", "b", "c"]
    assert "information about the kind" not in results.page(a_study(), [found], "x")
    results_plots.plot_gate(a_study(), [found], tmp_path / "none.svg")
    assert not (tmp_path / "none.svg").exists()


def test_plot_is_the_same_each_time(tmp_path: pathlib.Path):
    found = [result(method, seed, 10 + seed) for method, seed in itertools.product(["gap", "srsop"], range(2))]
    for name in ("a.svg", "b.svg"):
        results_plots.plot(a_study(), found, tmp_path / name)
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "b.svg").read_text()
    assert "srsop" in results.page(a_study(), found, "x")


def test_two_classes_have_accuracy_and_f1():
    found = [result(method, 0, 10) for method in ("gap", "srsop")]
    for one in found:
        one["classes"] = ["sound", "broken"]
        one["splits"]["test"]["confusion"] = [[70, 10], [5, 15]]
    page = results.page(a_study(), found, "x")
    assert "precision and recall of the class *broken*" in page
    assert "| gap | 85.00 % | 66.67 % |" in page  # 2 · 15 / (20 + 25)


def test_overview_of_studies_with_all_and_with_some_methods(tmp_path: pathlib.Path):
    found = [result(method, seed, 10 + seed) for method in results.COMPARED for seed in range(2)]
    grids = {method: [("train.rate=0.1",)] for method in results.COMPARED}
    methods = results.collect(a_study(grids=grids), found)
    collected = {"Whole": methods, "Part": methods[:-1]}
    lines = results.overview(collected).splitlines()
    assert lines[0] == "| method | parameters | MMAC | Whole | Part |"
    assert lines[2] == "| gap | 1,234 | 2.50 | 10.50 ± 0.71 % | 10.50 ± 0.71 % |"
    assert lines[-1] == "| gmsop_all_selected | 1,234 | 2.50 | 10.50 ± 0.71 % | – |"
    assert len(lines) == 2 + len(results.COMPARED)
    results_plots.plot_overview(collected, tmp_path / "overview.svg")
    assert (tmp_path / "overview.svg").read_text().count("<svg") == 1


def test_learning_curves_have_the_methods_of_all_sizes(tmp_path: pathlib.Path):
    grids = {method: [("train.rate=0.1",)] for method in ("gap", "srsop", "gmsop")}
    errors = {"gap": (20, 21, 22), "srsop": (19, 20, 21.3), "gmsop": (20, 20, 20)}
    found = [result(method, seed, error) for method, all_ in errors.items() for seed, error in enumerate(all_)]
    methods = results.collect(a_study(grids=grids), found)
    sizes = {450: methods, 1350: methods[:2]}
    assert results.learning_curves(sizes).splitlines() == [
        "| method | 450 images | 1,350 images |",
        "|---|---|---|",
        "| gap | 21.00 ± 1.00 % | 21.00 ± 1.00 % |",
        "| srsop | 20.10 ± 1.15 %, -0.90 [-1.33, -0.47] | 20.10 ± 1.15 %, -0.90 [-1.33, -0.47] |",
    ]
    results_plots.plot_learning_curves(sizes, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").read_text().count("<svg") == 1


def test_table_of_a_tuned_hyperparameter():
    points = {"gap": "train.weight_decay=0.0001", "srsop": "train.weight_decay=0.002"}
    fixed_study = a_study(grids={"gap": [("train.rate=0.1",)], "srsop": [("train.rate=0.1",)]})
    tuned_study = a_study(grids={method: [("train.rate=0.1", point)] for method, point in points.items()})
    errors = {"gap": ((20, 21, 22), (20, 21, 22)), "srsop": ((19, 20, 21), (18, 19, 19.3))}
    found = [
        [
            result(method, seed, error, point=("train.rate=0.1", points[method]) if tuned else ("train.rate=0.1",))
            for method, pair in errors.items()
            for seed, error in enumerate(pair[tuned])
        ]
        for tuned in (0, 1)
    ]
    fixed, tuned = results.collect(fixed_study, found[0]), results.collect(tuned_study, found[1])
    assert results.tuning(fixed, tuned).splitlines() == [
        "| method | fixed | tuned | chosen | tuned − fixed | difference from gap, fixed | and tuned |",
        "|---|---|---|---|---|---|---|",
        "| gap | 21.00 ± 1.00 % | 21.00 ± 1.00 % | 0.0001 | +0.00 [+0.00, +0.00] | – | – |",
        "| srsop | 20.00 ± 1.00 % | 18.77 ± 0.68 % | 0.002 | -1.23 [-2.24, -0.23] | -1.00 [-1.00, -1.00]"
        " | -2.23 [-3.24, -1.23] |",
    ]
    alone = results.tuning(fixed[:1], tuned).splitlines()[-1]
    assert alone == "| srsop | – | 18.77 ± 0.68 % | 0.002 | – | – | -2.23 [-3.24, -1.23] |"


@pytest.mark.parametrize(
    ("name", "earlier"),
    [
        ("emoji_vendors", "emoji"),
        ("emoji_weight_decay", "emoji"),
        ("fashion_mnist", "fashion_sample_100"),
        ("fashion_sample_100_weight_decay", "fashion_sample_100"),
    ],
)
def test_reused_rates_of_the_classifier_are_those_that_were_chosen(name, earlier):
    def is_slow(point: tuple[str, ...]) -> bool:
        return any(assignment.startswith("train.rate_factors") for assignment in point)

    study, earlier_study = (load_study(ROOT / f"configs/studies/{one}.py") for one in (name, earlier))
    assert study
    assert earlier_study
    chosen = results.by_name(results.collect(earlier_study, load_results(ROOT / "results" / earlier)))
    assert {method: is_slow(points[0]) for method, points in study.grids.items()} == {
        method: is_slow(chosen[method].point) for method in study.grids
    }


def test_a_study_chooses_on_val_and_measures_test_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    for split, label, at in itertools.product(("train", "val", "test"), ("a", "b"), range(4)):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{at}.png")
    convert("image-folder", tmp_path / "images", tmp_path / "d", options=Options(size=8), progress=False)
    (tmp_path / "tiny.py").write_text(TINY)
    points = [(f"train.learning_rates=(({rate}, 1),)",) for rate in (0.01, 0.1)]
    tiny = a_study(grids={"gap": points}, seeds=(0, 1))
    runner = StudyRunner(
        tiny, tmp_path / "tiny.py", data_dir=tmp_path, output=tmp_path / "runs", results=tmp_path / "results"
    )
    runner.execute()
    found = load_results(tmp_path / "results" / "s")
    assert len(found) == 2 + 1  # both points with seed 0, then the chosen one with seed 1
    on_val = {tuple(r["point"]): r["splits"]["val"] for r in found if r["seed"] == 0}
    best = min(on_val, key=lambda point: (on_val[point]["balanced_error"], on_val[point]["loss"]))
    assert runner.choose("gap") == best
    with_test = {tuple(r["point"]) for r in found if "test" in r["splits"]}
    assert with_test == {best}
    assert all(np.sum(r["splits"]["val"]["confusion"]) == 8 for r in found)
    assert found[0]["train_images"] == 8

    (tmp_path / "moved").mkdir()
    (tmp_path / "d").rename(tmp_path / "moved" / "d")
    runner.data_dir = tmp_path / "moved"
    [other] = [run for run in runner.selection_runs("gap") if run.point != best]
    assert np.sum(runner.measure(other, ["test"])["splits"]["test"]["confusion"]) == 8

    monkeypatch.setattr(study, "train_and_evaluate", None)  # nothing is trained again
    runner.execute()
    file = next((tmp_path / "results" / "s").glob("gap-*-seed0.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config": {"model.head": "srsop"}}))
    with pytest.raises(ConfigError, match="measured with another configuration"):
        runner.execute()


def test_a_point_at_which_training_diverges_is_not_chosen(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny.py").write_text(TINY)

    def diverge(config, workdir):
        raise NonFiniteError("loss not finite at step 3", 3)

    monkeypatch.setattr(study, "train_and_evaluate", diverge)
    points = [(f"train.learning_rates=(({rate}, 1),)",) for rate in (0.01, 0.1)]
    runner = StudyRunner(
        a_study(grids={"gap": points}), tmp_path / "tiny.py", data_dir=tmp_path, output=tmp_path, results=tmp_path
    )
    bad, good = runner.selection_runs("gap")
    assert runner.measure(bad, ["val"])["diverged"] == "loss not finite at step 3"
    file = tmp_path / "s" / f"{good.name}.json"
    stored = json.loads((tmp_path / "s" / f"{bad.name}.json").read_text())
    fields = stored["config"] | {"train.learning_rates": [[0.1, 1]]}
    file.write_text(json.dumps(result("gap", 0, 90) | {"config": fields}))
    assert runner.choose("gap") == good.point


BAD_JSON = [b"", b"null", b"[]", b"3", b'"x"', b"{}", b'{"splits"', b"\xff\xfe", b"[" * 5000]


@pytest.mark.parametrize("content", BAD_JSON, ids=lambda content: repr(content[:9]))
def test_a_damaged_result_is_named(tmp_path: pathlib.Path, content):
    (tmp_path / "tiny.py").write_text(TINY)
    runner = StudyRunner(
        a_study(grids={"gap": [()]}), tmp_path / "tiny.py", data_dir=tmp_path, output=tmp_path, results=tmp_path
    )
    [run] = runner.selection_runs("gap")
    file = tmp_path / "s" / f"{run.name}.json"
    file.parent.mkdir()
    file.write_bytes(content)
    message = rf"{re.escape(str(file))} is damaged .*; delete it, and run the study again"
    with pytest.raises(UserError, match=message):
        load_results(file.parent)
    with pytest.raises(UserError, match=message):
        runner.measure(run, ["val"])


def test_a_result_without_a_measurement_is_damaged(tmp_path: pathlib.Path):
    whole = result("gap", 0, 5) | {"config": {}}
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert load_results(tmp_path) == [whole]
    for damage in ({"splits": 3}, {"splits": {"val": {}}}, {"splits": {"val": 3}}, {"macs": "x"}, {"seed": None}):
        (tmp_path / "a.json").write_text(json.dumps(whole | damage))
        with pytest.raises(UserError, match=r"a\.json is damaged"):
            load_results(tmp_path)


def test_a_study_without_input_uses_the_data_set_that_is_converted(tmp_path: pathlib.Path):
    data = StudyData("d", "image-folder", {"size": 8})
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / folder / "1.png")
    with pytest.raises(DataError, match="needs --input"):
        prepare_data(data, tmp_path / "d", None)
    prepare_data(data, tmp_path / "d", str(tmp_path / "images"))
    prepare_data(data, tmp_path / "d", None)
    other = dataclasses.replace(data, options={"size": 9})
    with pytest.raises(ConfigError, match=r"converted with the options .'size': 8.*, but the study needs .'size': 9"):
        prepare_data(other, tmp_path / "d", None)


def test_the_commit_is_that_of_the_repository_that_tracks_the_package(tmp_path: pathlib.Path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=x", "-c", "user.email=x@example.com")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "venv" / "study.py"
    file.parent.mkdir()
    file.write_text("")
    assert find_commit(file) == ""
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert find_commit(file) == ""  # installed inside the repository of another project
    git("add", "venv")
    git("commit", "-q", "-m", "second")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as in a hook of another repository
    commit = find_commit(file)
    monkeypatch.delenv("GIT_DIR")
    assert commit == git("rev-parse", "--short=12", "HEAD")
    file.write_text("changed")
    assert find_commit(file) == f"{commit}-dirty"


@pytest.mark.parametrize("file", STUDY_FILES, ids=lambda file: file.stem)
def test_studies_are_valid(file: pathlib.Path, tmp_path: pathlib.Path):
    found = load_study(file)
    assert found is not None
    assert found.name == file.stem
    assert found.reference in found.grids
    assert len({len(points) for points in found.grids.values()}) == 1  # equal budgets
    runner = StudyRunner(found, file, data_dir=tmp_path, output=tmp_path, results=tmp_path)
    runs = [run for method in found.grids for run in runner.selection_runs(method)]
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        config = runner.config(run)
        assert config.eval.split == "val"
        assert sum(epochs for _, epochs in config.train.learning_rates) == config.train.num_epochs


@pytest.mark.slow
def test_a_published_run_can_be_repeated(tmp_path: pathlib.Path):
    name = "fashion_sample_10"
    stored = [r for r in load_results(ROOT / "results" / name) if r["method"] == "gap" and "test" in r["splits"]]
    if not stored:
        pytest.skip(f"results/{name} has no final run of gap")
    file = ROOT / f"configs/studies/{name}.py"
    found = load_study(file)
    assert found is not None
    [data] = found.data
    convert(data.source, None, tmp_path / data.name, options=Options(**data.options), progress=False)
    runner = StudyRunner(found, file, data_dir=tmp_path, output=tmp_path / "runs", results=tmp_path / "results")
    run = study.StudyRun(name, "gap", tuple(stored[0]["point"]), stored[0]["seed"], data.name)
    repeated, published = (r["splits"]["test"] for r in (runner.measure(run, ["test"]), stored[0]))
    # On another processor, rounding differs; that changes the error by a few images in a hundred at most.
    assert repeated["top1_error"] == pytest.approx(published["top1_error"], abs=4)


def test_pages_are_those_of_the_raw_results(tmp_path: pathlib.Path):
    for page in results_tool.make_pages(ROOT / "results", tmp_path):
        assert page.read_text() == (ROOT / "docs/results" / page.name).read_text(), "run python tools/results.py"
