"""Which package may import which, and which libraries each package or a single module may use."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "gmsop_jax"


def imports(file: Path) -> set[str]:
    """Dotted names of everything that a module imports, at its top or inside functions."""
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


# For each package and each module at the top: those that it may import. `errors` and `files` may be imported by all
# packages except `ops`, `models` and `nnx`.
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "ops": set(),
    "models": {"ops"},
    "nnx": {"models", "ops"},
    "config": {"models", "ops"},
    "data": set(),
    "conversion": {"data", "interop.matfile"},
    "training": {"config", "data", "models", "ops"},
    "inference": {"config", "conversion.sources", "data", "models", "ops", "training"},
    "interop": {"config", "data", "models", "ops", "training"},
    "analysis": {"config", "data", "models", "inference", "training"},
    "commands": {"analysis", "config", "conversion", "data", "inference", "interop", "training"},
    "main": {"commands"},
    "__main__": {"main"},
}
BASE = {"errors", "files"}


def test_every_package_is_listed():
    found = {
        file.name.removesuffix(".py") for file in PACKAGE.iterdir() if file.name not in ("py.typed", "__pycache__")
    }
    assert found == {*ALLOWED, "__init__"}


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_what_it_may(package):
    members = [PACKAGE / f"{package}.py"] if (PACKAGE / f"{package}.py").exists() else files(package)
    base = BASE if package not in BASE | {"ops", "models", "nnx"} else set()
    allowed = {f"gmsop_jax.{name}" for name in {package} | ALLOWED[package] | base}
    for file in members:
        wrong = imports_any(file, "gmsop_jax") - imports_any(file, *allowed)
        assert not wrong - {"gmsop_jax"}, f"{name(file)} may not import {wrong}"


@pytest.mark.parametrize(
    ("package", "libraries"),
    [
        ("ops", {"jax", "numpy", "jaxtyping"}),
        ("models", {"jax", "flax", "numpy", "jaxtyping"}),
        ("nnx", {"jax", "flax", "numpy", "jaxtyping"}),
        ("data", {"numpy", "absl", "grain", "array_record", "PIL"}),
    ],
)
def test_libraries_of_the_lower_packages(package, libraries):
    for file in files(package):
        used = {item.partition(".")[0] for item in imports(file)} - {"gmsop_jax"}
        assert not used - libraries - sys.stdlib_module_names, name(file)


@pytest.mark.parametrize("module", ["metrics", "step"])
def test_the_step_uses_no_files_and_no_configuration(module):
    file = PACKAGE / f"training/{module}.py"
    assert not imports_any(file, "pathlib", "os", "io", "json", "ml_collections", "orbax", "grain", "gmsop_jax.config")
    assert "open(" not in file.read_text()
    assert "print(" not in file.read_text()


@pytest.mark.parametrize(
    ("library", "only"),
    [("difflib", "errors.py"), ("orbax", "training/checkpoint.py"), ("tensorboardX", "training/loggers.py")],
)
def test_one_module_per_library(library, only):
    assert [name(file) for file in files(".") if imports_any(file, library)] == [only]
