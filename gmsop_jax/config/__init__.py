"""Configurations: files, overrides from the command line, and JSON; `fields` lists what can be set.

A configuration file is a Python program with a function `get_config()` that returns a `ConfigDict` made with
`default_config()`. It is executed, so use only files that you trust. One file can define several configurations: for
`file.py:argument`, `get_config(argument)` is called.
"""

import ast
import contextlib
import importlib.util
import json
import pathlib
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gmsop_jax.config.fields import FIELDS, LOG_BACKENDS, ConfigDict, Field, default_config, model_defaults
from gmsop_jax.config.validation import check_known, flatten, validate, wrong_type
from gmsop_jax.errors import ConfigError, did_you_mean, reason
from gmsop_jax.files import read_bytes

__all__ = [
    "FIELDS",
    "LOG_BACKENDS",
    "ConfigDict",
    "Field",
    "apply_overrides",
    "as_tuples",
    "default_config",
    "differences",
    "flatten",
    "from_json",
    "load",
    "model_defaults",
    "override",
    "packaged_files",
    "read",
    "run_file",
    "run_name",
    "split_argument",
    "to_json",
    "validate",
]

# What the config.json of earlier versions may contain: removed fields, with the values that did not affect the results,
# and removed values of fields, with their replacements.
_REMOVED_FIELDS = {"parallel.shard_optimizer": (False, True), "parallel.shard_classifier": (False, True)}
_REMOVED_VALUES = {("model.dispatch", "pallas"): "auto"}


def _locate(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    """Returns the section that contains a field, and the field's name in it."""
    section, _, leaf = name.rpartition(".")
    return (config[section] if section else config), leaf


def load(path: str | pathlib.Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """Reads a configuration file, applies overrides, and validates the result.

    Args:
      path: `file.py`, `file.py:argument`, or the name of a packaged configuration, `name` or `name:argument`.
      overrides: assignments `field=value`; see `override`.

    Raises:
      ConfigError: if the file does not exist or has no `get_config`, and as raised by `override` and `validate`.
    """
    file, argument = split_argument(path)
    module = run_file(file)
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{file} has no function get_config()")
    with _naming_line(file):
        config = module.get_config(*argument)
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"get_config() of {file} returns {config!r}; it should return default_config() with changes")
    apply_overrides(config, overrides)
    return config


def apply_overrides(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Sets fields as `override` does, and validates the result.

    Raises:
      ConfigError: as raised by `override` and `validate`.
    """
    for assignment in overrides:
        override(config, assignment)
    validate(config)


def run_file(file: pathlib.Path) -> types.ModuleType:
    """Executes a configuration file and returns it as a module.

    Raises:
      ConfigError: if the file does not exist or raises an exception.
    """
    if not file.is_file():
        names = [packaged.stem for packaged in packaged_files()]
        raise ConfigError(
            f"configuration file {file} does not exist, and no packaged configuration has this name;"
            f" {did_you_mean(file.stem, names)}"
        )
    spec = importlib.util.spec_from_file_location(f"gmsop_config_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} is not a Python file; a configuration is a .py file with a function get_config()")
    module = importlib.util.module_from_spec(spec)
    with _naming_line(file):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _naming_line(file: pathlib.Path) -> Iterator[None]:
    """Turns any exception in a user's file into a ConfigError that states the line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == str(file)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else str(file)
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error


def split_argument(path: str | pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    """Splits `file.py:argument` into the file and a list with the argument, or an empty list without one.

    Instead of `file.py`, a packaged configuration can be given by its name, as in `imagenet:resnet50,gmsop`.

    Example:
      >>> split_argument("my/imagenet.py:resnet50,gmsop")
      (PosixPath('my/imagenet.py'), ['resnet50,gmsop'])
      >>> file, arguments = split_argument("imagenet:resnet50,gmsop")
      >>> file.name, file.exists(), arguments
      ('imagenet.py', True, ['resnet50,gmsop'])
    """
    file, separator, argument = str(path).partition(".py:")
    if separator:
        return pathlib.Path(f"{file}.py"), [argument]
    name, separator, argument = file.partition(":")
    packaged = _packaged_folder() / f"{name}.py"
    if "/" not in name and packaged.is_file() and not pathlib.Path(file).is_file():
        return packaged, [argument] if separator else []
    return pathlib.Path(file), []


def packaged_files() -> list[pathlib.Path]:
    """Returns the configuration files that come with the package."""
    return sorted(_packaged_folder().glob("*.py"))


def _packaged_folder() -> pathlib.Path:
    """Returns the folder `configs`: inside the package if it is installed, and beside it in a checkout."""
    package = pathlib.Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def run_name(path: str | pathlib.Path) -> str:
    """Creates a name for the runs of a configuration from its file and argument.

    Example:
      >>> run_name("imagenet:resnet50,gmsop")
      'imagenet-resnet50-gmsop'
    """
    file, argument = split_argument(path)
    return "-".join([file.stem, *argument]).replace(",", "-").replace("/", "-")


def override(config: ConfigDict, assignment: str) -> None:
    """Sets one field from text, such as `train.batch_size=64`. The text is parsed as the field's type.

    Raises:
      ConfigError: if there is no such field, no value is given, or the value does not have the field's type.

    Example:
      >>> config = default_config()
      >>> override(config, "train.batch_size=64")
      >>> config.train.batch_size
      64
      >>> override(config, "train.batchsize=64")
      Traceback (most recent call last):
      ...
      gmsop_jax.errors.ConfigError: there is no field config.train.batchsize; did you mean train.batch_size?
    """
    name, separator, text = assignment.partition("=")
    if not separator:
        raise ConfigError(f"--config.{name} needs a value: --config.{name}=…")
    check_known(name)
    section, leaf = _locate(config, name)
    try:
        section[leaf] = _PARSERS[type(FIELDS[name].default)](text)
    except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError) as error:
        raise ConfigError(wrong_type(name, text, f"it is currently {section[leaf]!r}")) from error


def _parse_tuple(text: str) -> tuple:
    value = as_tuples(ast.literal_eval(text))
    if not isinstance(value, tuple):
        raise ValueError(text)
    return value


_PARSERS: dict[type, Callable[[str], Any]] = {
    str: str,
    int: lambda text: int(text, 10),
    float: float,
    bool: lambda text: {"true": True, "false": False}[text.lower()],
    tuple: _parse_tuple,
}


def as_tuples(value: Any) -> Any:
    """Returns the value with all lists in it replaced by tuples."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def to_json(config: ConfigDict) -> str:
    """Returns the configuration as JSON text."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, place: str = "the stored configuration") -> ConfigDict:
    """Reads what `to_json` returned. Missing fields, which were added later, have their defaults.

    Error messages name the place where the text comes from.

    Raises:
      ConfigError: if the text is not JSON, or contains an unknown field or a value of another type.
    """
    try:
        stored = json.loads(text)
        fields = list(flatten(stored)) if isinstance(stored, dict) else []
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is not JSON ({error})") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{place} contains {text.strip()[:40]} instead of an object with fields")
    if "library_name" in stored:
        raise ConfigError(f"{place} belongs to an exported network; give the working directory of a training run")
    config = default_config()
    for name, value in fields:
        if value in _REMOVED_FIELDS.get(name, ()):
            continue
        if name not in FIELDS:
            raise ConfigError(
                f"{place} has the field config.{name} = {value!r}, which this version of gmsop_jax"
                " does not know; use the version that wrote it"
            )
        section, leaf = _locate(config, name)
        try:
            if value is None:
                raise TypeError  # ml_collections accepts it for every field
            section[leaf] = _REMOVED_VALUES.get((name, value), value) if isinstance(value, str) else as_tuples(value)
        except TypeError as error:
            raise ConfigError(f"{place} has config.{name} = {value!r}, of the wrong type") from error
    return config


def read(file: pathlib.Path) -> ConfigDict:
    """Reads the `config.json` of a run.

    Raises:
      ConfigError: if the file can't be read, and as raised by `from_json`.
    """
    try:
        text = read_bytes(file).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} can't be read ({reason(error)}); give the working directory of a training run"
        ) from error
    return from_json(text, str(file))


def differences(config: ConfigDict, other: ConfigDict) -> list[str]:
    """Returns a line `config.field: a → b` for each difference in a field that a resumed run may not change."""
    a, b = dict(flatten(config)), dict(flatten(other))
    return [
        f"config.{name}: {a[name]!r} → {b[name]!r}"
        for name, field in FIELDS.items()
        if not field.resumable and a[name] != b[name]
    ]
