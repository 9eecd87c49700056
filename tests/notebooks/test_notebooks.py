"""The notebooks, run top to bottom in a kernel of their own."""

import pathlib
import re
import subprocess
import sys
import types
import zipfile

import nbformat
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "notebooks"
NAMES = sorted(file.name for file in FOLDER.glob("*.ipynb"))

_RUN = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": sys.argv[2]}}).execute()
nbformat.write(notebook, sys.argv[3])
"""


def test_there_are_three():
    assert NAMES == ["quickstart.ipynb", "restore_and_evaluate.ipynb", "second_order_head.ipynb"]


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_valid_and_kept_with_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source.startswith("# Install the package on Colab")
    assert 'if "google.colab" in sys.modules:' in code[0].source
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    assert any("image/png" in output.get("data", {}) for cell in code[-2:] for output in cell.outputs)
    assert re.search(r"\d.*\.$", outputs[-1].text.rstrip(), re.DOTALL), "ends with a sentence about its figures"
    assert (FOLDER / name).stat().st_size < 300_000


@pytest.mark.parametrize("repository", ["", "https://example.org/gmsop_jax.git"])
def test_install_cell_on_colab(repository, tmp_path, monkeypatch):
    """With Colab's module and pip replaced: what is uploaded or cloned is installed, and its notebooks entered."""
    [cell] = {
        next(cell.source for cell in nbformat.read(FOLDER / name, as_version=4).cells if cell.cell_type == "code")
        for name in NAMES
    }
    commands = []

    def upload():
        with zipfile.ZipFile(tmp_path / "gmsop_jax-main.zip", "w") as archive:  # as a repository's download is
            archive.writestr("gmsop_jax-main/pyproject.toml", "")
            archive.writestr("gmsop_jax-main/notebooks/quickstart.ipynb", "")
        return {"gmsop_jax-main.zip": b""}

    def run(command, check):
        assert check
        commands.append(command)
        if command[0] == "git":
            (pathlib.Path(command[-1]) / "notebooks").mkdir(parents=True)
            (pathlib.Path(command[-1]) / "pyproject.toml").touch()

    colab = types.ModuleType("google.colab")
    vars(colab)["files"] = types.SimpleNamespace(upload=upload)
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    exec(cell.replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}"), {})
    root = tmp_path / "project" if repository else tmp_path / "project" / "gmsop_jax-main"
    assert pathlib.Path.cwd() == root / "notebooks"
    assert commands[-1][-1].startswith(f"{root}[report,")
    assert [command[:2] for command in commands[:-1]] == ([["git", "clone"]] if repository else [])


def _execute(name: str, tmp_path: pathlib.Path) -> str:
    """All that the notebook printed."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, FOLDER / name, FOLDER, tmp_path / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(tmp_path / name, as_version=4)
    outputs = (output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    return "".join(output.get("text", "") for output in outputs)


@pytest.mark.slow
def test_quickstart(tmp_path):
    text = _execute("quickstart.ipynb", tmp_path)
    assert "step 400, val: top-1 error" in text
    assert text.count(".png: ") == 3
    assert "The network misclassifies" in text.rsplit("report.html", 1)[1]


@pytest.mark.slow
def test_second_order_head(tmp_path):
    text = _execute("second_order_head.ipynb", tmp_path)
    lines = [line for line in text.splitlines() if "test errors" in line]
    errors = [re.findall(r"\d+\.\d", line.partition("test errors")[2]) for line in lines]
    average, wide, second_order, mixture = (list(map(float, found)) for found in errors)
    assert max(second_order + mixture) < min(average + wide)
    assert text.splitlines()[-1].startswith("With 120 steps for each head and 3 seeds, second-order pooling")


@pytest.mark.slow
def test_restore_and_evaluate(tmp_path):
    text = _execute("restore_and_evaluate.ipynb", tmp_path)
    first, second = (line for line in text.splitlines() if "val: top-1 error" in line and line.startswith("step"))
    assert first.split(":")[1] == second.split(":")[1]
    assert text.rstrip().endswith("so it is the same network.")
