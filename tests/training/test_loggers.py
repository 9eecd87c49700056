"""The backends of the log, with stand-ins for the packages of Weights & Biases and Trackio."""

import contextlib
import json
import pathlib
import re
import sys
import types
from collections.abc import Iterator

import pytest

from gmsop_jax import config as configs
from gmsop_jax.errors import ConfigError, UserError
from gmsop_jax.training.loggers import find_backends, open_loggers
from gmsop_jax.training.writer import Writer


class Package:
    """Stands in for `wandb` or `trackio`: remembers what was started, logged and finished."""

    def __init__(self, name: str):
        self.__name__, self.__spec__ = name, types.SimpleNamespace(name=name)
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.started.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def backends(*names: str) -> configs.ConfigDict:
    config = configs.default_config()
    config.log.backends = names
    configs.validate(config)
    return config


@contextlib.contextmanager
def logging(config: configs.ConfigDict, folder: pathlib.Path, start_step: int) -> Iterator[Writer]:
    with (
        open_loggers(config, folder, start_step) as loggers,
        Writer(folder, total_steps=9, start_step=start_step, loggers=loggers) as writer,
    ):
        yield writer


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_package_logs_what_the_run_records(name, tmp_path, monkeypatch):
    package = Package(name)
    monkeypatch.setitem(sys.modules, name, package)
    config = backends(name)
    for start in (0, 4):  # the second is resumed
        with logging(config, tmp_path, start) as writer:
            writer.record("train", start + 2, 0.5, {"loss": 1.5})
            writer.record("eval", start + 4, 1.0, {"top1_error": 40.0, "candidate_use": [0.25, 0.75]})
    evaluation = {"eval/top1_error": 40.0, "eval/candidate_use/0": 0.25, "eval/candidate_use/1": 0.75}
    assert package.logged == [(2, {"train/loss": 1.5}), (4, evaluation), (6, {"train/loss": 1.5}), (8, evaluation)]
    assert package.finished == 2
    first, second = package.started
    assert first == second  # the same run, by its name or id
    assert first["resume"] == "allow"
    assert first["config"] == config.to_dict()
    other = tmp_path / "other"
    other.mkdir()
    with open_loggers(config, other, 0):
        pass
    key = {"wandb": "id", "trackio": "name"}[name]
    assert package.started[2][key] != first[key]


def test_a_backend_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "my_backend.py").write_text(
        "import json\n"
        "class Lines:\n"
        "    def __init__(self, workdir, config, start_step):\n"
        "        self.file = open(workdir / 'lines', 'a')\n"
        "        print(config['seed'], start_step, file=self.file)\n"
        "    def record(self, step, values):\n"
        "        print(step, json.dumps(values), file=self.file)\n"
        "    def close(self):\n"
        "        self.file.close()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with logging(backends("my_backend:Lines"), tmp_path, 3) as writer:
        writer.record("train", 5, 0.5, {"loss": 1.5})
    first, second = (tmp_path / "lines").read_text().splitlines()
    assert first == "0 3"
    assert json.loads(second.removeprefix("5 ")) == {"train/loss": 1.5}
    assert not list(tmp_path.glob("events*"))


def test_the_documented_backend_runs(tmp_path):
    page = pathlib.Path(__file__).parents[2] / "docs/training.md"
    [code] = re.findall(r"```python\n(class MyLogger.*?)```", page.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    logger = names["MyLogger"](tmp_path, {}, 0)
    with contextlib.closing(logger), Writer(tmp_path, total_steps=9, loggers=[logger]) as writer:
        writer.record("train", 5, 0.5, {"loss": 1.5})
    assert (tmp_path / "my.log").read_text() == "5 {'train/loss': 1.5}\n"


def test_backends_that_are_missing_or_fail_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"names 'wandb', which needs: pip install 'gmsop-jax\[wandb\]'"):
        find_backends(["wandb"])
    with pytest.raises(ConfigError, match="names 'no_such:Class', which can't be imported"):
        find_backends(["no_such:Class"])
    with pytest.raises(ConfigError, match="names 'json:Class', which can't be imported"):
        find_backends(["json:Class"])
    with pytest.raises(ConfigError, match=r"config\.log\.backends"):
        backends("wandv")
    with pytest.raises(ConfigError, match=r"config\.log\.backends"):
        backends(".my_backend:Lines")

    package = Package("trackio")
    monkeypatch.setattr(package, "init", lambda **options: 1 // 0)
    monkeypatch.setitem(sys.modules, "trackio", package)
    with pytest.raises(UserError, match=r"logger 'trackio' of config\.log\.backends can't start \(ZeroDivisionError"):
        open_loggers(backends("trackio"), tmp_path, 0).__enter__()


def test_a_backend_without_a_connection_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def init(**options):
        raise ConnectionError("no route to host")

    package = Package("wandb")
    monkeypatch.setattr(package, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", package)
    with pytest.raises(UserError, match=r"the logger 'wandb' .* can't start \(ConnectionError: no route to host\)"):
        open_loggers(backends("wandb"), tmp_path, 0).__enter__()


def test_a_backend_that_fails_to_close_hides_no_error(tmp_path, monkeypatch):
    good, bad = Package("wandb"), Package("trackio")
    monkeypatch.setattr(bad, "finish", lambda: 1 // 0)
    for package in (good, bad):
        monkeypatch.setitem(sys.modules, package.__name__, package)
    with pytest.raises(UserError, match="the reason"), logging(backends("wandb", "trackio"), tmp_path, 0):
        raise UserError("the reason")
    assert good.finished == 1


def test_backends_that_were_started_are_closed_if_a_later_one_or_the_writer_fails(tmp_path, monkeypatch):
    first, second = Package("wandb"), Package("trackio")
    for package in (first, second):
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setattr(second, "init", lambda **options: 1 // 0)
    with pytest.raises(UserError, match=r"the logger 'trackio' .* can't start"):
        open_loggers(backends("wandb", "trackio"), tmp_path, 0).__enter__()
    assert first.finished == 1
    monkeypatch.setattr(first, "finish", lambda: 1 // 0)  # does not hide the reason
    with pytest.raises(UserError, match=r"the logger 'trackio' .* can't start"):
        open_loggers(backends("wandb", "trackio"), tmp_path, 0).__enter__()
    monkeypatch.setattr(second, "init", lambda **options: second)
    with pytest.raises(OSError, match="No such file"), open_loggers(backends("trackio"), tmp_path, 0) as loggers:
        Writer(tmp_path / "missing", total_steps=9, loggers=loggers)
    assert second.finished == 1


def test_the_field_on_the_command_line():
    config = configs.default_config()
    assert config.log.backends == ("tensorboard",)
    configs.override(config, "log.backends=('tensorboard', 'wandb')")
    configs.validate(config)
    assert config.log.backends == ("tensorboard", "wandb")
    assert configs.differences(config, configs.default_config()) == []  # a resumed run may change it
