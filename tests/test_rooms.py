"""Which package may import which, and which libraries stay in one module."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gmsop_jax"


def imports(file: Path) -> set[str]:
    """Dotted names of all that a module imports, wherever in it; what type checkers alone see is left out."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imports_any(file: Path, *modules: str) -> set[str]:
    return {name for name in imports(file) if any(f"{name}.".startswith(f"{m}.") for m in modules)}


def files(folder: str) -> list[Path]:
    found = sorted((PACKAGE / folder).rglob("*.py"))
    assert found
    return found


def name(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


# For each package or module at the top, the others that it may import; `files` and `errors` are open to all.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "ops": set(),
    "models": {"ops"},
    "config": {"models"},
    "data": set(),
    "conversion": {"data", "interop.matfile"},
    "training": {"config", "data", "models", "ops"},
    "inference": {"config", "conversion.sources", "data", "models", "training"},
    "interop": {"config", "data", "models", "ops", "training"},
    "analysis": {"config", "data", "models", "inference", "training"},
    "main": {"analysis", "config", "conversion", "inference", "training"},
}
GROUND = {"errors", "files"}


def test_every_package_has_a_place():
    found = {
        file.name.removesuffix(".py") for file in PACKAGE.iterdir() if file.name not in ("py.typed", "__pycache__")
    }
    assert found == {*ALLOWED, "__init__"}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_run_downwards(room):
    members = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else files(room)
    ground = GROUND if room not in GROUND | {"ops", "models"} else set()
    allowed = {f"gmsop_jax.{name}" for name in {room} | ALLOWED[room] | ground}
    for file in members:
        wrong = imports_any(file, "gmsop_jax") - imports_any(file, *allowed)
        assert not wrong - {"gmsop_jax"}, f"{name(file)} may not import {wrong}"


@pytest.mark.parametrize(
    ("room", "libraries"),
    [
        ("ops", {"jax", "numpy", "jaxtyping"}),
        ("models", {"jax", "flax", "numpy", "jaxtyping"}),
        ("data", {"numpy", "absl", "grain", "array_record", "PIL"}),
    ],
)
def test_libraries_of_the_lower_packages(room, libraries):
    for file in files(room):
        used = {item.partition(".")[0] for item in imports(file)} - {"gmsop_jax"}
        assert not used - libraries - sys.stdlib_module_names, name(file)


@pytest.mark.parametrize("module", ["losses", "metrics", "step"])
def test_the_step_knows_no_files_and_no_configuration(module):
    file = PACKAGE / f"training/{module}.py"
    assert not imports_any(file, "pathlib", "os", "io", "json", "ml_collections", "orbax", "grain", "gmsop_jax.config")
    assert "open(" not in file.read_text()
    assert "print(" not in file.read_text()


@pytest.mark.parametrize(
    ("library", "only"), [("orbax", "training/checkpoint.py"), ("tensorboardX", "training/writer.py")]
)
def test_one_module_per_library(library, only):
    assert [name(file) for file in files(".") if imports_any(file, library)] == [only]
