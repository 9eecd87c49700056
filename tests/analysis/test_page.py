import dataclasses
import json
import os
import pathlib
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser

import pytest

from gmsop_jax.analysis.report import build_report, predict_split
from gmsop_jax.errors import ConfigError
from gmsop_jax.files import write_json
from gmsop_jax.main import main
from gmsop_jax.training.inputs import Inputs

ROOT = pathlib.Path(__file__).parents[2]


class _Outline(HTMLParser):
    """Text outside of scripts and styles, and every address that the page would load."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.loaded, self._open, self.unbalanced = "", [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.loaded += [
            value for name, value in attrs if name in ("src", "srcset", "data") or (tag, name) == ("link", "href")
        ]
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag):
        if self._open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not {"script", "style", "svg"} & set(self._open):
            self.text += data


@pytest.fixture(scope="module")
def page(trained_run):
    return build_report([trained_run])


def test_page_is_well_formed_and_loads_nothing(page):
    outline = _Outline(page)
    assert outline.unbalanced == []
    assert all(address.startswith("data:") for address in outline.loaded)
    assert "@import" not in page
    assert len(page) < 3e6


def test_page_says_the_essentials_without_scripts(page, trained_run):
    text = _Outline(page).text
    result = json.loads((trained_run / "result.json").read_text())
    assert f"{result['last_top1_error']:.2f} %" in text
    assert "GM-SOP-4-2 on 1 block × (8, 12)" in text
    for title in ("The network misclassifies", "The gate selects 2 of 4 candidates", "With the weights of the gate",
                  "If the gate selects K = 1, …, 4 candidates", "A single candidate alone", "Cross entropy",
                  "Learning rate", "Balance loss", "Throughput", "Confusion", "Most confused pairs",
                  "Most confident, wrong", "Least confident", "Use of each candidate over training",
                  "Candidates that are selected together", "Error if the gate selects K candidates", "The candidates",
                  "Images with the largest weight for each candidate",
                  "train.batch_size"):  # fmt: skip
        assert title in text, title
    assert page.count("<svg") >= 8
    assert 'class="card"' in page


def test_each_card_has_its_candidates(page):
    for gate in re.findall(r'<span class="gate">(.*?)</span>\s*</figcaption>', page, re.S):
        weights = [float(weight) for weight in re.findall(r"\d+: (\d\.\d\d)", gate)]
        assert len(weights) == 2
        assert sum(weights) == pytest.approx(1, abs=0.011)


def test_use_over_training_has_every_epoch(page):
    specs = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]
    [use] = [spec["data"]["values"] for spec in specs if spec["data"]["values"] and "use" in spec["data"]["values"][0]]
    assert {(point["epoch"], point["candidate"]) for point in use} == {(e, i) for e in (1.0, 2.0) for i in range(4)}


def test_several_runs_are_compared(trained_run, tmp_path):
    other = shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((other / "config.json").read_text())
    config["train"]["momentum"] = 0.5
    (other / "config.json").write_text(json.dumps(config))
    (other / "result.json").unlink()
    page = build_report([trained_run, other, trained_run])  # one of them is given twice
    text = _Outline(page).text
    for run in (trained_run, other):
        assert f"What {run.parent.name}/run learned" in text
    assert "unfinished" in text
    assert re.findall(r"<tr class=differs><th>(.*?)</th>", page) == ["train.momentum"]


def test_many_runs_are_named_and_have_a_legend_of_several_rows(trained_run, tmp_path):
    names = [f"heads-{head}/seed{seed}" for head in ("gap", "sop", "gmsop") for seed in (0, 1)]
    page = build_report([shutil.copytree(trained_run, tmp_path / name) for name in names], data=tmp_path)
    assert "<h1>6 runs</h1>" in page
    assert [name for name in names if f"<tr><th>{name}</th>" in page] == names
    [loss] = [
        text for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S) if "nats" in text
    ]
    assert json.loads(loss)["encoding"]["color"]["legend"]["columns"] == 3


def test_two_classes_have_no_table_of_confused_pairs(trained_run, monkeypatch):
    ten = predict_split(trained_run, None, 50)
    two = dataclasses.replace(ten, classes=ten.classes[:2], labels=ten.labels % 2, predicted=ten.predicted % 2)
    monkeypatch.setattr("gmsop_jax.analysis.report.page.predict_split", lambda *_: two)
    text = _Outline(build_report([trained_run])).text
    assert "Confusion" in text
    assert "Most confused pairs" not in text


def test_a_network_without_a_gate_has_no_balance_loss(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["head"] = "gap"
    (run / "config.json").write_text(json.dumps(config))
    assert "Balance loss" not in _Outline(build_report([run], data=tmp_path)).text


def test_runs_on_different_data_are_kept_apart(trained_run, tmp_path):
    names = ("first", "second", "elsewhere")
    runs = [shutil.copytree(trained_run, tmp_path / name) for name in names]
    inputs = json.loads((runs[2] / "inputs.json").read_text())
    inputs["dataset"] = "emoji"
    inputs["splits"]["val"] = "7 images, sha256 0123"
    (runs[2] / "inputs.json").write_text(json.dumps(inputs))
    page = build_report([runs[0], runs[2], runs[1]], data=tmp_path)
    result = page[page.index('<section id="result">') : page.index('<section id="curves">')]
    headings = re.findall(r'<h3 class="data">(.*?)</h3>|<tr><th>(first|second|elsewhere)</th>', result)
    data = json.loads((trained_run / "inputs.json").read_text())["dataset"]
    assert [name for heading, name in headings if name] == ["first", "second", "elsewhere"]
    assert headings[0][0].startswith(f"{data} (")
    assert headings[0][0].endswith("split val of 200 images")
    assert headings[3][0].startswith("emoji (")
    assert "evaluated on 2 different sets of images" in result
    specs = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]
    shown = [
        frozenset(v["run"] for v in spec["data"]["values"]) for spec in specs if "run" in spec["data"]["values"][0]
    ]
    assert set(shown) == {frozenset({"first", "second"}), frozenset({"elsewhere"})}


def test_the_error_is_that_of_the_last_evaluation(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"kind": "eval", "step": 15, "epoch": 3.0, "top1_error": 99.5, "top5_error": 40.0}) + "\n"
        )
    page = build_report([run], data=tmp_path)
    assert re.search(r"<dt>top-1 error</dt><dd>99\.50 %</dd>", page)


def test_values_that_say_nothing_are_left_out(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")

    def titles() -> list[str]:
        return re.findall(r"<dt>(.*?)</dt>", build_report([run], data=tmp_path))

    assert titles()[:3] == ["network", "top-1 error", "top-5 error"]
    assert "published" not in titles()
    inputs = Inputs.load(run)
    write_json(run / "inputs.json", dataclasses.asdict(dataclasses.replace(inputs, classes=inputs.classes[:5])))
    assert titles()[:3] == ["network", "top-1 error", "epoch"]


def test_candidates_without_images_have_nothing_to_unfold(page):
    assert not re.search(r'<div class="cards">\s*</div>\s*</details>', page)
    assert len(re.findall(r"</i> candidate \d", page)) == 4


def test_the_axes_of_epochs_have_whole_numbers(page):
    specs = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]
    axes = [spec["encoding"]["x"]["axis"] for spec in specs if spec["encoding"]["x"]["field"] == "epoch"]
    assert len(axes) == 6
    assert all(axis["tickMinStep"] == 1 for axis in axes)


def test_without_data_or_checkpoint_the_curves_remain(trained_run, tmp_path):
    text = _Outline(build_report([trained_run], data=tmp_path)).text
    assert "The predictions can't be shown: " in text
    assert "Use of each candidate over training" in text
    run = shutil.copytree(trained_run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    text = _Outline(build_report([run])).text
    assert "no checkpoint at" in text
    assert "No metrics have been logged yet" in text


def test_names_are_escaped(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "<script>alert(1)<")
    other = shutil.copytree(trained_run, tmp_path / "plain")
    page = build_report([run, other], data=tmp_path)  # without images, which would take longer
    assert "&lt;script&gt;alert" in page
    assert "<script>alert" not in page


def test_a_folder_that_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json can't be read .*; give the working directory"):
        build_report([tmp_path])


def test_a_report_is_written_to_anything_that_can_be_written_to(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("gmsop_jax.analysis.report.build_report", lambda *_, **__: "<p>page</p>")

    def report(output: object) -> int:
        return main(["report", "run", "--output", str(output)])

    assert report("/dev/stdout") == 0
    assert capfd.readouterr().out.startswith("<p>page</p>")
    fifo, link, page = (tmp_path / name for name in ("fifo", "link", "page.html"))
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert report(fifo) == 0
    assert os.read(reader, 99) == b"<p>page</p>"
    os.close(reader)
    link.symlink_to(page)
    assert report(link) == 0
    assert page.read_text() == "<p>page</p>"
    assert link.is_symlink()
    capfd.readouterr()
    refused = {tmp_path: "Is a directory", tmp_path / "missing/x.html": "No such file", page / "x": "Not a directory"}
    for output, reason in refused.items():
        assert report(output) == 2
        assert re.fullmatch(rf"error: the report can't be written to {output} \({reason}.*\n", capfd.readouterr().err)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fifo", "link", "page.html"]


def test_tool(trained_run, tmp_path, monkeypatch, capsys):
    def run(*arguments) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "tools" / "report.py"), run_name="__main__")
        out, err = capsys.readouterr()
        return exit_.value.code, out, err

    status, out, _ = run(trained_run, "--output", tmp_path / "page.html", "--max-images", 64)
    assert status == 0
    assert re.fullmatch(r".*page\.html: \d\.\d MB\n", out)
    assert "64 images of the split “val”, drawn at random from its 200." in (tmp_path / "page.html").read_text()
    status, _, err = run(tmp_path, "--output", tmp_path / "x.html")
    assert status == 2
    assert re.fullmatch(r"error: .*config\.json can't be read .*\n", err)
    assert "--max-images must be at least 1" in run(trained_run, "--max-images", 0)[2]
    assert "can't be written to" in run(trained_run, "--max-images", 1, "--output", "/nowhere/x.html")[2]
