"""Conventions of the source: tests use public names and check something, and defaults are written only once."""

import ast
from pathlib import Path

import pytest

from gmsop_jax.config import FIELDS

PACKAGE = Path(__file__).parents[1] / "gmsop_jax"


def private_names(tree: ast.Module) -> set[str]:
    """Private attributes that a module uses, except those of `self`, and private names that it imports."""
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
    for file in sorted((PACKAGE / package).rglob("*.py")):
        repeated = keyword_defaults(ast.parse(file.read_text())) & defaults
        assert not repeated, f"{file} repeats {repeated}: take the section of the configuration instead"


def test_keyword_defaults_are_found():
    code = "def f(a, b=1, *, c='x', d): ...\nclass C:\n  e: int = 2\n  f: int\nlambda g=(3,): 0"
    assert keyword_defaults(ast.parse(code)) == {("b", "1"), ("c", "'x'"), ("e", "2"), ("g", "(3,)")}
