"""Exported networks, in the layout of model hubs: `model.safetensors`, `config.json` and the model card `README.md`."""

import dataclasses
import functools
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import read_bytes
from gmsop_jax.training.inputs import Inputs

WEIGHTS, DESCRIPTION, CARD = "model.safetensors", "config.json", "README.md"
_OLD_DESCRIPTION = "model.json"  # in exports by earlier versions; of the configuration, it has only the section `model`


def find(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """Returns the folder of an exported network, or None if the path is not one.

    Args:
      path: a folder, or the name `owner/name` of a repository on the Hugging Face Hub, which is downloaded into the
        cache of `huggingface_hub`. If there is a local folder `owner`, the name is treated as a path instead.

    Raises:
      CheckpointError: if the repository can't be downloaded.
    """
    folder = pathlib.Path(path)
    if (folder / WEIGHTS).is_file():
        return folder
    return _download(os.fspath(path)) if is_on_hub(path) else None


def is_on_hub(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is the name of a repository on the Hugging Face Hub; see `find`."""
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", os.fspath(path)) is not None
    return is_name and not pathlib.Path(path).parent.exists()


@functools.cache
def _download(name: str) -> pathlib.Path:
    try:
        from huggingface_hub import snapshot_download  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"there is no folder {name}; to use a repository of this name on the Hugging Face Hub, install"
            " huggingface_hub: pip install 'gmsop-jax[hub]'"
        ) from error
    try:
        return pathlib.Path(snapshot_download(name, allow_patterns=[WEIGHTS, DESCRIPTION]))
    except Exception as error:  # its errors and those of its HTTP library have no common base class
        raise CheckpointError(
            f"there is no folder {name}, and no such repository can be downloaded from the Hugging Face Hub"
            f" ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
        ) from error


def describe(config: ConfigDict, inputs: Inputs, step: int, metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the contents of `config.json`, which `read_description` and `load_variables` read."""
    return {
        "library_name": "gmsop_jax",
        "step": step,
        "metrics": metrics,
        **dataclasses.asdict(inputs),
        "config": public_config(config),
    }


def public_config(config: ConfigDict) -> dict[str, Any]:
    """Returns the configuration as a dictionary in which absolute paths are reduced to their last component."""
    stored = config.to_dict()
    for section, field in (("data", "dir"), ("train", "init_from")):
        if os.path.isabs(path := stored[section][field]):
            stored[section][field] = os.path.basename(os.path.normpath(path))
    return stored


def _read(folder: pathlib.Path) -> dict[str, Any]:
    file = folder / DESCRIPTION
    if not file.exists() and (folder / _OLD_DESCRIPTION).exists():
        file = folder / _OLD_DESCRIPTION
    try:
        description = json.loads(read_bytes(file))
        if "config" not in description:
            model = description["model"]
            description["config"] = {"model": model, "compute_dtype": model["compute_dtype"]}
        description["step"] = int(description["step"])
        if not isinstance(description["metrics"], dict | None):
            raise TypeError(f"metrics is {description['metrics']!r}")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{file} can't be read ({error!r}); it should be the file that `gmsop export` wrote"
        ) from error
    return description


def read_description(folder: pathlib.Path) -> tuple[ConfigDict, Inputs]:
    """Reads the configuration and the inputs of an exported network.

    Raises:
      CheckpointError: if they are missing or damaged.
    """
    description = _read(folder)
    config = configs.from_json(json.dumps(description["config"]), str(folder / DESCRIPTION))
    return config, Inputs.from_dict(description, folder / DESCRIPTION, "export the network again")


def load_variables(
    folder: pathlib.Path, like: Mapping[str, Any], sharding: Sharding
) -> tuple[dict[str, Any], int, Mapping[str, Any] | None]:
    """Loads the variables of an exported network; `like` is a tree of the shapes and dtypes that the network needs.

    Returns: (variables, step, metrics at that step).

    Raises:
      CheckpointError: if a file is missing or damaged, or the arrays don't fit.
    """
    try:
        from safetensors.flax import load_file
    except ImportError as error:
        raise CheckpointError(f"{folder / WEIGHTS} needs safetensors: pip install 'gmsop-jax[export]'") from error
    description = _read(folder)
    try:
        arrays = load_file(folder / WEIGHTS)
    except Exception as error:  # safetensors has its own error class, which only derives from Exception
        raise CheckpointError(f"{folder / WEIGHTS} can't be read ({error}); export the network again") from error
    shapes = {name: leaf.shape for name, leaf in flatten(like).items()}
    found = {name: array.shape for name, array in arrays.items()}
    if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        name = different[0]
        raise CheckpointError(
            f"{folder}: {WEIGHTS} and {DESCRIPTION} describe different arrays: {name} is {found.get(name, 'missing')}"
            f" and should be {shapes.get(name, 'missing')} ({len(different)} arrays differ); export the network again"
        )
    placed = {name: jax.device_put(arrays[name].astype(leaf.dtype), sharding) for name, leaf in flatten(like).items()}
    variables = {"batch_stats": {}, **unflatten_dict(placed, sep=".")}
    return variables, description["step"], description["metrics"]


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Names each array by its path, joined by dots: `params.backbone.stem.kernel`."""
    return flatten_dict(dict(variables), sep=".")  # pyright: ignore[reportReturnType]  # never keyed by tuples
