"""Who may import whom: one way through, one room per concern."""

import ast
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


@pytest.mark.parametrize("file", files("ops"), ids=name)
def test_ops_import_nothing_but_jax_and_numpy(file):
    standard = ("collections", "functools", "math", "typing", "dataclasses", "itertools")
    allowed = imports_any(file, "jax", "numpy", "jaxtyping", "gmsop_jax.ops", *standard)
    assert imports(file) == allowed


@pytest.mark.parametrize("file", files("models"), ids=name)
def test_models_know_neither_data_nor_training(file):
    assert imports_any(file, "gmsop_jax") == imports_any(file, "gmsop_jax.models", "gmsop_jax.ops")
    assert not imports_any(file, "optax", "orbax", "grain", "pathlib", "os", "ml_collections")


@pytest.mark.parametrize("file", files("data"), ids=name)
def test_data_knows_neither_models_nor_training(file):
    allowed = imports_any(file, "gmsop_jax.data", "gmsop_jax.errors", "gmsop_jax")
    assert not {n for n in allowed if n.startswith(("gmsop_jax.models", "gmsop_jax.ops", "gmsop_jax.train"))}
    assert not imports_any(file, "flax", "optax", "orbax", "jax")


@pytest.mark.parametrize("module", ["averaging", "losses", "metrics", "mixup", "train_step"])
def test_train_step_is_pure(module):
    file = PACKAGE / f"{module}.py"
    allowed = tuple(f"gmsop_jax.{name}" for name in ("averaging", "losses", "metrics", "mixup", "ops"))
    assert imports_any(file, "gmsop_jax") == imports_any(file, *allowed)
    assert not imports_any(file, "pathlib", "os", "io", "json", "ml_collections", "orbax", "grain")
    assert "open(" not in file.read_text()
    assert "print(" not in file.read_text()


@pytest.mark.parametrize(("library", "only"), [("orbax", "checkpoint.py"), ("tensorboardX", "writer.py")])
def test_one_room_per_library(library, only):
    assert [name(file) for file in files(".") if imports_any(file, library)] == [only]
