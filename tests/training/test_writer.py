import json
import os
import termios

import pytest
from matplotlib.figure import Figure
from PIL import Image
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from gmsop_jax.config import default_config
from gmsop_jax.training.history import METRICS, plot_curves, read_metrics
from gmsop_jax.training.loggers import open_loggers
from gmsop_jax.training.writer import Writer

VALUES = {"loss": 1.5, "top1_error": 50.0, "images_per_second": 7.0}


def test_records(tmp_path, capsys):
    with Writer(tmp_path, total_steps=4) as writer:
        for step in (1, 2):
            writer.advance()
            writer.record("train", step, step / 2, {**VALUES, "learning_rate": 0.1})
        writer.record("eval", 2, 1.0, {"loss": 1.0, "top1_error": 40.0})
        writer.show(VALUES)
        writer.say("hello")
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(lines[0]) == {"kind": "train", "step": 1, "epoch": 0.5, **VALUES, "learning_rate": 0.1}
    assert [(r["kind"], r["step"]) for r in read_metrics(tmp_path)] == [("train", 1), ("train", 2), ("eval", 2)]
    assert capsys.readouterr().err == "step 2/4: loss 1.500, error 50.0 %, 7 images/s\nhello\n"


def test_nothing_is_cut_off_on_a_terminal_of_80_columns(tmp_path, monkeypatch):
    try:
        controller, terminal = os.openpty()
    except OSError as error:  # for example in a chroot
        pytest.skip(f"there are no pseudo-terminals here ({error})")
    termios.tcsetwinsize(terminal, (24, 80))
    with open(terminal, "w") as stream, open(controller, "rb", buffering=0) as shown:
        monkeypatch.setattr("sys.stderr", stream)
        with Writer(tmp_path, total_steps=600_000, start_step=500_000) as writer:
            writer.show({"loss": 12.3456, "top1_error": 100.0, "images_per_second": 12345.0})
            writer.advance()
            writer.say("hello")
        text = ""
        while "hello\r\n" not in text:  # the kernel passes it on piece by piece
            text += shown.read(10_000).decode()
    lines = [line.strip("\n") for line in text.split("\r")]
    assert any(line.startswith("step 500001/600000 |") and line.endswith("12345 images/s") for line in lines), lines
    assert max(map(len, lines)) <= 80


def scalars(folder) -> set[tuple[str, int, float]]:
    """What TensorBoard would show: each record of an events file is a length, its checksum, bytes, their checksum."""
    found = set()
    for file in folder.glob("events.out.tfevents*"):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            found |= {(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")}
            data = data[16 + size :]
    return found


def test_events(tmp_path):
    with (
        open_loggers(default_config(), tmp_path, 0) as loggers,
        Writer(tmp_path, total_steps=4, loggers=loggers) as writer,
    ):
        writer.record("train", 3, 1.5, {"loss": 1.5})
    assert ("train/loss", 3, 1.5) in scalars(tmp_path)


def test_resumed_run_drops_what_will_be_done_again(tmp_path):
    with Writer(tmp_path, total_steps=9) as writer:
        for step in (1, 2, 3, 4):
            writer.record("train", step, step, VALUES)
    with Writer(tmp_path, total_steps=9, start_step=2) as writer:
        writer.record("train", 3, 3, {**VALUES, "loss": 9.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1.5), (2, 1.5), (3, 9.0)]


def test_torn_last_line_is_left_out_and_mended(tmp_path):
    with Writer(tmp_path, total_steps=9) as writer:
        writer.record("train", 1, 1, VALUES)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    with Writer(tmp_path, total_steps=9, start_step=1) as writer:
        writer.record("train", 2, 2, VALUES)
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_other_processes_log_nothing(tmp_path, capsys):
    with Writer(tmp_path, total_steps=4, enabled=False) as writer:
        writer.advance()
        writer.record("train", 1, 1, VALUES)
        writer.show(VALUES)
        writer.say("hello")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


def test_curves_have_whole_epochs_and_show_the_highest_value(tmp_path, monkeypatch):
    with Writer(tmp_path, total_steps=3) as writer:
        for step in (1, 2, 3):
            writer.record("eval", step, step, {"loss": 1.0, "top1_error": 90.0})
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_curves(tmp_path)
    error = figures[0].axes[1]
    assert error.get_ylim() == (0, pytest.approx(94.5))
    assert all(tick == round(tick) for tick in error.get_xticks())


def test_curves(tmp_path):
    with Writer(tmp_path, total_steps=4) as writer:
        for step in (1, 2):
            writer.record("train", step, step, {**VALUES, "learning_rate": 0.1, "balance_loss": 0.0})
            writer.record("eval", step, step, {"loss": 1.0, "top1_error": 40.0})
    plot_curves(tmp_path)
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) >= 400
        assert len(image.convert("RGB").getcolors(10**6) or []) > 10  # not a blank sheet
