"""The notebooks, run top to bottom in a kernel of their own."""

import pathlib
import subprocess
import sys

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
def test_notebook_is_valid_and_kept_without_outputs(name):
    notebook = nbformat.read(FOLDER / name, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert code[0].source.startswith("# Installs the package on Colab")
    assert 'if "google.colab" in sys.modules:' in code[0].source


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
    assert text.count(".png ") == 3


@pytest.mark.slow
def test_second_order_head(tmp_path):
    text = _execute("second_order_head.ipynb", tmp_path)
    errors = [float(line.split()[-2]) for line in text.splitlines() if "top-1 error" in line]
    assert len(errors) == 3
    assert max(errors[1:]) < errors[0]  # second order beats the average


@pytest.mark.slow
def test_restore_and_evaluate(tmp_path):
    text = _execute("restore_and_evaluate.ipynb", tmp_path)
    first, second = (line for line in text.splitlines() if "val: top-1 error" in line and line.startswith("step"))
    assert first.split(":")[1] == second.split(":")[1]
    assert float(text.rsplit(":", 1)[1]) < 1e-4
