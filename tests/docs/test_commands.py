"""The commands in the README and the guides: each is understood, whatever data it asks for."""

import re
import shlex
from pathlib import Path

import pytest

from gmsop_jax.analysis import sweep
from gmsop_jax.conversion import prepare
from gmsop_jax.main import main
from gmsop_jax.training import devices, loop, processes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """The lines of a page's shell examples that call `gmsop`, without their comments."""
    blocks = re.findall(r"```(?:ba)?sh\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [match[1] for line in lines if (match := re.search(r"(?:^|&& |srun )\s*(gmsop [^#]*)", line))]


COMMANDS = [command for page in PAGES for command in commands(page)]


def test_commands_are_found():
    found = {command.split()[1] for command in COMMANDS}
    assert {"train", "evaluate", "predict", "convert", "inspect", "report", "export", "import", "sweep"} <= found


@pytest.mark.parametrize("command", sorted({command for command in COMMANDS if "[" not in command}))
def test_a_documented_command_is_understood(command, tmp_path, monkeypatch, capsys):
    """It runs, or fails because this folder has no such data, checkpoint or configuration; never because of a flag."""
    result = {"last_top1_error": 1.0, "last_top5_error": 1.0, "num_classes": 10, "step": 1, "best_step": 1}
    result["wall_seconds"] = 1.0
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *args, **options: result)
    monkeypatch.setattr(sweep, "run", lambda jobs: [])
    monkeypatch.setattr(processes, "start_processes", lambda *args: None)
    monkeypatch.setattr(devices, "use_cpu_devices", lambda *args: None)
    monkeypatch.setattr(prepare, "prepare_data", lambda data: None)
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)[1:]
    status = main(arguments)
    errors = capsys.readouterr().err
    assert status in (0, 2)
    assert "--help)" not in errors  # what every complaint about a flag ends with
    assert "did you mean" not in errors
    if arguments[0] in ("train", "sweep") and "FILE" not in arguments:
        assert status == 0, errors
