"""The distributions: the wheel in an empty environment, away from the checkout, and the sdist that builds it."""

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmsop_jax

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path) -> str:
    """Runs a command in a folder without a way to the checkout; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> Path:
    """A folder with the sdist, and the wheel that was built from the unpacked sdist."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # lacking before Python 3.11.4
        archive.extractall(folder / "unpacked")
    [source] = (folder / "unpacked").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=source)
    return folder


def test_the_sdist_is_complete(distributions):
    [source] = (distributions / "unpacked").iterdir()
    for folder in ("configs", "docs", "gmsop_jax", "notebooks", "tests", "tools"):
        files = {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()}
        made = {".pyc", ".pyo"}  # and caches of hypothesis, which git ignores
        missing = {file for file in files if file.suffix not in made and not (source / file).exists()}
        assert not {file for file in missing if not any(part.startswith(".") for part in file.parts)}


def test_the_wheel_contains_what_the_package_needs(distributions):
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    package = {file for file in (ROOT / "gmsop_jax").rglob("*") if file.is_file() and file.suffix != ".pyc"}
    assert {file.relative_to(ROOT).as_posix() for file in package} <= names
    assert {f"gmsop_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")} <= names
    assert not [name for name in names if not name.startswith(("gmsop_jax/", "gmsop_jax-"))]


@pytest.mark.slow
def test_the_wheel_trains_predicts_and_reports_in_an_empty_environment(distributions, tmp_path):
    """The environment has this one's libraries, without what is installed in editable mode."""
    pytest.importorskip("pip")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", folder=tmp_path)
    python = tmp_path / "venv/bin/python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", folder=tmp_path).strip())
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    wheel = next(distributions.glob("*.whl"))
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index", "--no-deps")
    run(*install, wheel, folder=tmp_path)
    gmsop = tmp_path / "venv/bin/gmsop"
    where = run(python, "-c", "import gmsop_jax; print(gmsop_jax.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(site)

    fields = ["num_epochs=1", "learning_rates=((0.05, 1),)", "batch_size=500"]
    short = [f"--config.train.{field}" for field in fields]
    assert "results in runs/quickstart" in run(gmsop, "train", "--config", "quickstart", *short, folder=tmp_path)
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(tmp_path / "photo.png")
    predicted = run(
        gmsop, "predict", "--checkpoint", "runs/quickstart", "--input", "photo.png", "--top", "1", folder=tmp_path
    )
    assert predicted.splitlines()[1].startswith("photo.png")
    assert "runs/quickstart/report.html: " in run(
        gmsop, "report", "runs/quickstart", "--max-images", "50", folder=tmp_path
    )


MODULES = {file.relative_to(ROOT).as_posix(): file for file in sorted((ROOT / "gmsop_jax").rglob("*.py"))}
MODULES.pop("gmsop_jax/analysis/results.py")  # it writes pages of the checkout's documentation


@pytest.mark.parametrize("file", MODULES.values(), ids=MODULES.keys())
def test_messages_name_no_file_of_the_checkout(file):
    """Who installed the package has the command `gmsop`, but neither tools/ nor configs/."""
    tree = ast.parse(file.read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in texts if re.search(r"tools/\w+|configs/\w+\.py|python -m gmsop_jax\.main ", text)]


def test_the_packages_are_attributes():
    """In a process of its own, in which nothing else has imported them."""
    code = "import gmsop_jax; print(gmsop_jax.ops.second_order_pool, gmsop_jax.models.GAPHead, gmsop_jax.nnx.GAPHead)"
    assert "gmsop_jax.nnx.heads.GAPHead" in run(sys.executable, "-c", code, folder=ROOT)
    with pytest.raises(AttributeError, match="module 'gmsop_jax' has no attribute 'op'"):
        gmsop_jax.op  # noqa: B018
