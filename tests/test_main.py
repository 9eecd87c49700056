"""The command line: flags, exit statuses, and what a user sees of a mistake or a signal."""

import contextlib
import errno
import io
import json
import os
import pwd
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

import gmsop_jax
from gmsop_jax.conversion import prepare
from gmsop_jax.errors import ArgumentParser, UserError, run_command
from gmsop_jax.main import COMMANDS, MODES, main
from gmsop_jax.training import loop
from gmsop_jax.training.interrupt import SignalCatcher

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
TOOLS = [file for file in sorted((ROOT / "tools").glob("*.py")) if "sys.exit(" in file.read_text()]


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command line, which should fail; returns the one line that it prints."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: .+\n", err, re.DOTALL)
    return err


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--wrkdir=x", "--workdir"),
        ("--chekpoint", "--checkpoint"),
        ("--num_processes=2", "--num-processes"),
        ("--config=x --modes", "--mode"),
        ("--conf", "--config"),
    ],
)
def test_a_mistyped_flag_suggests_the_right_one(capsys, flag, meant):
    assert f"did you mean {meant}?" in error(capsys, *flag.split())


@pytest.mark.parametrize(
    ("best_step", "remark"), [(30, ""), (20, " (lowest of all epochs: 9.00 %, step 20)")], ids=["last", "earlier"]
)
def test_training_ends_with_the_error_of_the_last_epoch(monkeypatch, tmp_path, capsys, best_step, remark):
    result = {"last_top1_error": 10.0, "last_top5_error": 0.0, "step": 30, "num_classes": 2}
    result |= {"best_top1_error": 9.0, "best_step": best_step, "wall_seconds": 61.4}
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *_, **__: result)
    monkeypatch.setattr(prepare, "prepare_data", lambda data: None)
    assert main(["train", "--config", QUICKSTART, "--workdir", str(tmp_path)]) == 0
    expected = f"top-1 error 10.00 % after the last epoch{remark}; 61 s; results in {tmp_path}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [("train quickstart", "--config"), ("evaluate runs/x", "--checkpoint"), ("predict runs/x --input y", "--input")],
)
def test_an_argument_without_a_flag_is_named(capsys, arguments, flag):
    stray = arguments.split()[1]
    assert re.search(rf"{stray} is not preceded by a flag; expected .*{flag} ", error(capsys, *arguments.split()))


def test_a_missing_data_set_of_a_network_is_made_from_the_source_of_its_images(capsys, monkeypatch, tmp_path):
    folder = shutil.copytree(ROOT / "pretrained" / "fashion_mnist_gap", tmp_path / "network")
    description = json.loads((folder / "config.json").read_text())
    description["config"]["data"]["source"] = "imagenet64"
    (folder / "config.json").write_text(json.dumps(description))
    monkeypatch.chdir(tmp_path)
    assert "\n  gmsop convert fashion-mnist --input" in error(capsys, "evaluate", "--checkpoint", str(folder))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gmsop_jax {gmsop_jax.__version__}\n"


def test_what_the_output_cannot_encode_is_escaped(monkeypatch):
    """The name of a file that is not UTF-8, or a terminal without UTF-8, is no reason for a traceback."""
    for encoding, printed in (("utf-8", "caf\\udce9 ± 1".encode()), ("ascii", b"caf\\udce9 \\xb1 1")):
        output = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))
        assert run_command(lambda: print(os.fsdecode(b"caf\xe9 "), "± 1", sep="")) == 0
        assert output.getvalue() == printed + b"\n"
        assert sys.stdout.errors == "strict"


def test_a_summary_without_standard_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)  # as after 2>&-
    assert main(["summary", "quickstart"]) == 0
    assert "quickstart" in capsys.readouterr().out


@pytest.mark.parametrize("tool", TOOLS, ids=lambda file: file.stem)
def test_a_mistyped_flag_of_a_tool_suggests_the_right_one(tool, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool.name, "--hepl"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(tool), run_name="__main__")
    assert capsys.readouterr().err.startswith("error: unrecognized argument --hepl; did you mean --help?")


@pytest.mark.parametrize("flag", ["--workdir", "--config", "--checkpoint", "--features", "--input"])
@pytest.mark.parametrize("text", ["", "a\0b"])
def test_an_empty_path_is_refused(capsys, flag, text):
    assert f"argument {flag}: {text!r} is not a path" in error(capsys, "--config", QUICKSTART, flag, text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--config is needed; start with --config quickstart"),
        (["--config.seed=1"], "--config is needed; start with --config quickstart"),
        (["evaluate"], "gmsop evaluate needs --checkpoint, the working directory of a training run"),
        (["trian"], "there is no command 'trian'; did you mean train?"),
        (["train", "--checkpoint", "x"], "unrecognized argument --checkpoint"),
        (["--mode", "evaluate"], "--mode evaluate needs --checkpoint, the working directory of a training run"),
        (["--mode", "predict"], "--mode predict needs --checkpoint, the working directory of a training run"),
        (["--mode", "predict", "--checkpoint", "x"], "--mode predict needs --input"),
        (["--mode", "trian", "--config", QUICKSTART], "invalid choice: 'trian'"),
        (["--config", QUICKSTART, "stray"], "unrecognized arguments: stray"),
        (
            ["--config", QUICKSTART, "--config.seed=99999999999999999999"],
            "config.seed must be between 0 and 42949",
        ),
        (["--config", QUICKSTART, "--config.data.image_size=100000"], "image_size must be between 0 and 4096"),
        (["--config", QUICKSTART, "--config.seed", "3"], "--config.seed needs a value: --config.seed=…"),
        (["--config", "x" * 300 + ".py"], "File name too long"),
        (["--config", QUICKSTART, f"--config.data.dir={'x' * 300}"], f"config.data.dir = '{'x' * 300}' can't be read"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert message in error(capsys, *arguments)


def test_help_returns(capsys):
    """In a notebook, `main` returns in any case, rather than ending the kernel."""
    assert main([]) == 2
    overview = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert overview == capsys.readouterr().out
    for command in [*MODES, *COMMANDS]:
        assert f"\n  {command} " in overview
        assert main([command, "--help"]) == 0
        assert f"usage: gmsop {command} " in capsys.readouterr().out


def test_a_user_without_passwd_entry_or_home_needs_none(capsys, monkeypatch, tmp_path):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    before = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        arguments = ["--config.data.auto_convert=false", f"--config.data.dir={tmp_path / 'none'}"]
        assert "no data set at" in error(capsys, "--config", QUICKSTART, *arguments)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# ---- exit statuses


def raising(error: BaseException):
    def command():
        raise error

    return command


def test_exit_statuses(capsys):
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1
    assert run_command(raising(UserError("wrong"))) == 2
    assert capsys.readouterr().err == "error: wrong\n"
    assert run_command(raising(OSError(errno.ENOSPC, "No space left on device", "/x/y"))) == 2
    assert capsys.readouterr().err == "error: /x/y: No space left on device\n"
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: stopped by Ctrl-C\n"
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is not hidden
        run_command(lambda: 1 // 0)
    with pytest.raises(OSError, match="not from the system"):
        run_command(raising(OSError("not from the system")))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_with_a_line(capsys, signum):
    assert run_command(lambda: os.kill(os.getpid(), signum) or time.sleep(10)) == 75
    assert capsys.readouterr().err == f"error: stopped by {signum.name}\n"
    assert signal.getsignal(signum) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert run_command(lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_not_lost_where_python_ignores_exceptions(capsys):
    class Stops:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def command():
        Stops()  # is deleted at once
        time.sleep(10)

    assert run_command(command) == 75
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"


def test_a_suppressed_signal_stops_a_run_before_its_first_step(capsys):
    def command():
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        with SignalCatcher():
            pytest.fail("the run started")

    assert run_command(command) == 75
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"
    with SignalCatcher():  # the next run starts
        pass


def test_a_stopped_command_leaves_no_timer(capsys):
    timer = threading.Timer(60, print)

    def command():
        timer.start()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    assert run_command(command) == 75
    timer.join(5)
    assert not timer.is_alive()


@pytest.mark.parametrize("delay", [0.3, 0.9])
@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_during_start_up_leaves_no_traceback(tmp_path, signum, status, delay):
    """The command line is ready for signals before it imports JAX, which takes seconds."""
    command = "import sys; from gmsop_jax.main import main; print('ready', flush=True); sys.exit(main(sys.argv[1:]))"
    arguments = ["--config", QUICKSTART, "--workdir", str(tmp_path / "run"), f"--config.data.dir={tmp_path / 'data'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(delay)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert f"stopped by {'Ctrl-C' if signum == signal.SIGINT else 'SIGTERM'}" in errors


@pytest.mark.parametrize(
    "moment",
    ["main.main = lambda: os.kill(os.getpid(), SIGINT) or 0", "atexit.register(os.kill, os.getpid(), SIGINT)"],
    ids=["after the command", "while Python shuts down"],
)
def test_ctrl_c_at_the_end_leaves_no_traceback(moment):
    program = f"import atexit, os, sys; from signal import SIGINT; from gmsop_jax import main; {moment}"
    process = subprocess.run(
        [sys.executable, "-c", f"{program}; sys.exit(main.console())", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == -signal.SIGINT
    assert process.stderr == ""


def test_a_closed_pipe_is_not_an_error():
    """As in `gmsop summary --all | head -1`."""
    command = "import sys; from gmsop_jax.errors import run_command; sys.exit(run_command(lambda: print('x' * 10**6)))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(30) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


def test_values_that_look_like_flags_follow_a_double_dash():
    parser = ArgumentParser(prog="tool", takes_overrides=True)
    parser.add_argument("files", nargs="*")
    options = parser.parse_args(["--config.seed=3", "--", "--x"])
    assert (options.files, options.overrides) == (["--x"], ["seed=3"])
