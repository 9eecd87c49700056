"""Initialises a network from that of another run."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from gmsop_jax.errors import CheckpointError, ConfigError
from gmsop_jax.training.restore import load, read_description

Path = tuple[str, ...]  # the path of an array: collection, backbone or head, …, name


@dataclasses.dataclass(frozen=True)
class Source:
    """A trained network that another one is initialised from; `path` is the value of `config.train.init_from`.

    The variables are in host memory. If that run averaged its parameters (`config.train.ema_decay`), they contain the
    averages.
    """

    path: str
    step: int
    mean_rgb: tuple[float, float, float]
    variables: Mapping[str, Any]


def read_source(path: str, pixel_scale: float, sharding: Sharding) -> Source:
    """Reads the network that `config.train.init_from` names. All processes must call it together.

    Args:
      path: the value of `config.train.init_from`.
      pixel_scale: `config.model.pixel_scale`.
      sharding: where the variables are placed before they are copied to host memory, such as on all devices.

    Raises:
      ConfigError: if there is no such network, or its `pixel_scale` is different.
    """
    with _naming_field(path):
        _, variables, info = load(path, sharding)
    theirs = info.config.model.pixel_scale
    if theirs != pixel_scale:
        raise ConfigError(
            f"config.model.pixel_scale = {pixel_scale}, but the network of config.train.init_from = {path!r} was"
            f" trained with {theirs}; set --config.model.pixel_scale={theirs}"
        )
    return Source(path, info.step, info.inputs.mean_rgb, jax.device_get(variables))


def read_mean_rgb(path: str) -> tuple[float, float, float]:
    """Reads the mean colour of the network that `config.train.init_from` names, without the network's arrays.

    Raises:
      ConfigError: if there is no such network.
    """
    with _naming_field(path):
        return read_description(path)[1].mean_rgb


@contextlib.contextmanager
def _naming_field(path: str) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ConfigError) as error:
        raise ConfigError(f"config.train.init_from = {path!r}: {error}") from error


def choose(like: Mapping[str, Any], source: Source) -> tuple[dict[Path, Any], str]:
    """Chooses the arrays that are copied: the backbone, and each layer of the head that fits.

    A layer is copied only if all its arrays have the same shapes in both networks, because a bias is meaningless
    without its kernel. `like` are the variables of the new network, or their shapes.

    Returns: (a mapping from paths to arrays, a message about them).

    Raises:
      ConfigError: if the backbones differ; the message names the first array that differs.
    """
    ours, theirs = _flatten(like), _flatten(source.variables)
    new_layers = set()
    for path in sorted(ours.keys() | theirs.keys(), key=lambda path: (path[0] != "params", path)):
        here, there = (str(arrays[path].shape) if path in arrays else "absent" for arrays in (ours, theirs))
        if here != there:
            if path[1] == "backbone":
                raise ConfigError(
                    f"config.train.init_from = {source.path!r} has another backbone: {'/'.join(path)} is {there}"
                    f" there and {here} here; set the fields of config.model as in that run's config.json"
                )
            if path in ours:
                new_layers.add(path[1:-1])
    taken = {path: theirs[path] for path in ours if path[1:-1] not in new_layers}
    line = f"{len(taken)} of {len(ours)} arrays are copied from {source.path} (step {source.step})"
    return taken, f"{line}; new: {_name_parts(ours.keys() - taken.keys(), taken)}"


def _flatten(variables: Mapping[str, Any]) -> dict[Path, Any]:
    return dict(flatten_dict(variables))


def _name_parts(new: set[Path], taken: Mapping[Path, Any]) -> str:
    """Lists the largest parts to which nothing is copied."""
    used = {path[1:end] for path in taken for end in range(2, len(path) + 1)}
    starts = ((path[1:end] for end in range(2, len(path) + 1)) for path in new)
    parts = {"/".join(next(part for part in parts if part not in used)) for parts in starts}
    return ", ".join(sorted(parts)) or "none"


def merge(variables: Mapping[str, Any], taken: Mapping[Path, Any]) -> dict[str, Any]:
    """Replaces arrays of the variables, keeping the dtypes."""
    own = _flatten(variables)
    return unflatten_dict({**own, **{path: array.astype(own[path].dtype) for path, array in taken.items()}})
