"""Which package may import which, which libraries stay in one module, and what tests may use."""

import ast
import sys
from pathlib import Path

import pytest

from gmsop_jax.config import FIELDS

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
GROUND = {"errors", "files"}


def test_every_package_has_a_place():
    found = {
        file.name.removesuffix(".py") for file in PACKAGE.iterdir() if file.name not in ("py.typed", "__pycache__")
    }
    assert found == {*ALLOWED, "__init__"}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_downwards(package):
    members = [PACKAGE / f"{package}.py"] if (PACKAGE / f"{package}.py").exists() else files(package)
    ground = GROUND if package not in GROUND | {"ops", "models", "nnx"} else set()
    allowed = {f"gmsop_jax.{name}" for name in {package} | ALLOWED[package] | ground}
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
def test_the_step_knows_no_files_and_no_configuration(module):
    file = PACKAGE / f"training/{module}.py"
    assert not imports_any(file, "pathlib", "os", "io", "json", "ml_collections", "orbax", "grain", "gmsop_jax.config")
    assert "open(" not in file.read_text()
    assert "print(" not in file.read_text()


def private_names(tree: ast.Module) -> set[str]:
    """Private attributes that a module takes from other things than `self`, and private names that it imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in OWN):
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "monkeypatch.setattr",
            "patch.setattr",
        ):
            names.update(arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
    return {name for name in names if name.startswith("_") and not name.startswith("__")} - PUBLIC


OWN = {"self", "cls"}
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}  # of namedtuples and os


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda file: file.stem)
def test_tests_use_public_names(file):
    assert private_names(ast.parse(file.read_text())) == set()


CHECKS = ("assert", "check_grads", "pytest.raises", "pytest.warns")


def unchecked(tree: ast.Module) -> list[str]:
    """Names of the tests that can't fail except by an error: they neither assert nor expect an exception."""
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [test.name for test in tests if not any(check in ast.unparse(test) for check in CHECKS)]


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.rglob("test_*.py")), ids=lambda file: file.stem)
def test_every_test_checks_something(file):
    assert unchecked(ast.parse(file.read_text())) == []


def test_unchecked_tests_are_found():
    assert unchecked(ast.parse("def test_a():\n    f()\ndef test_b():\n    assert f()\ndef g(): pass")) == ["test_a"]


def test_private_names_are_found():
    code = "from a import _b\nc._d\nself._e\nf()._g\nx._replace(y=1)\nx.__name__\nmonkeypatch.setattr(x, '_h', 1)"
    assert private_names(ast.parse(code)) == {"_b", "_d", "_g", "_h"}


@pytest.mark.parametrize(
    ("library", "only"),
    [("difflib", "errors.py"), ("orbax", "training/checkpoint.py"), ("tensorboardX", "training/loggers.py")],
)
def test_one_module_per_library(library, only):
    assert [name(file) for file in files(".") if imports_any(file, library)] == [only]


def keyword_defaults(tree: ast.Module) -> set[tuple[str, str]]:
    """Names and values of the literal defaults of a module's arguments and class fields."""
    pairs: list[tuple[str, ast.expr | None]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            arguments = [*node.args.posonlyargs, *node.args.args]
            named = arguments[len(arguments) - len(node.args.defaults) :]
            pairs += [(arg.arg, value) for arg, value in zip(named, node.args.defaults, strict=True)]
            pairs += [(arg.arg, value) for arg, value in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)]
        elif isinstance(node, ast.ClassDef):
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            pairs += [(ast.unparse(field.target), field.value) for field in fields]
    return {(name, ast.unparse(value)) for name, value in pairs if value is not None}


@pytest.mark.parametrize("package", ["data", "training"])
def test_no_default_of_the_configuration_is_written_twice(package):
    defaults = {(name.rpartition(".")[2], repr(field.default)) for name, field in FIELDS.items()}
    for file in files(package):
        repeated = keyword_defaults(ast.parse(file.read_text())) & defaults
        assert not repeated, f"{name(file)} repeats {repeated}: take the section of the configuration instead"


def test_keyword_defaults_are_found():
    code = "def f(a, b=1, *, c='x', d): ...\nclass C:\n  e: int = 2\n  f: int\nlambda g=(3,): 0"
    assert keyword_defaults(ast.parse(code)) == {("b", "1"), ("c", "'x'"), ("e", "2"), ("g", "(3,)")}
