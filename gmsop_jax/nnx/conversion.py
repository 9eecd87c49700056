"""Conversion of heads between Flax Linen and NNX, which use the same parameter names."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from gmsop_jax import models
from gmsop_jax.models.gate import shared_fields
from gmsop_jax.nnx.heads import HEADS, Head
from gmsop_jax.ops.triangle import triangle_side

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}


def from_linen(head: nn.Module, variables: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> Head:
    """Converts a Linen head to an NNX head with the same fields, parameters and batch statistics.

    Args:
      head: a head of `gmsop_jax.models` that also exists in `gmsop_jax.nnx`.
      variables: its collections `params` and `batch_stats`, of JAX or NumPy arrays. For a head within a model, they are
        `{name: collection.get("head", {}) for name, collection in variables.items()}`.
      rngs: provides the streams `gating` and `dropout` that the NNX head uses in training; by default `nnx.Rngs(0)`.

    Returns: the NNX head, in evaluation mode.

    Raises:
      TypeError: if `head` is not such a head.
      ValueError: if `variables` do not fit the head, or its batch norm is not `gmsop_jax.models.BatchNorm`.

    Example:
      >>> import jax
      >>> from gmsop_jax import models
      >>> linen, x = models.GAPHead(10), jnp.ones((2, 7, 4))
      >>> variables = linen.init(jax.random.key(0), x)
      >>> head = from_linen(linen, variables)
      >>> bool(jnp.all(head(x)[0] == linen.apply(variables, x)[0]))
      True
    """
    classes = {cls.linen: cls for cls in HEADS}
    if type(head) not in classes:
        known = ", ".join(sorted(cls.__name__ for cls in classes))
        raise TypeError(f"from_linen converts the heads of gmsop_jax.models ({known}), got {type(head).__name__}")
    unknown = set(variables) - set(_COLLECTIONS)
    if unknown or "params" not in variables:
        raise ValueError(
            f"variables must have the collections params and, for batch norm, batch_stats; got {sorted(variables)}"
        )
    params = flatten_dict(dict(variables["params"]))
    fields = shared_fields(head, type(head))
    num_classes = fields.pop("num_classes")
    module = classes[type(head)](
        _in_features(head, params), num_classes, rngs=nnx.Rngs(0) if rngs is None else rngs, **fields
    )
    for name, kind in _COLLECTIONS.items():
        _fill(module, kind, name, flatten_dict(dict(variables.get(name, {}))))
    return module


def to_linen(module: Head) -> tuple[nn.Module, dict[str, Any]]:
    """Converts an NNX head to a Linen head with the same fields, parameters and batch statistics.

    Args:
      module: a head of `gmsop_jax.nnx`.

    Returns: (head, variables) for `head.apply(variables, x)`.

    Raises:
      TypeError: if `module` is not a head of `gmsop_jax.nnx`.

    Example:
      >>> import jax
      >>> from gmsop_jax.nnx import SecondOrderHead
      >>> module = SecondOrderHead(4, 10, rngs=nnx.Rngs(0))
      >>> head, variables = to_linen(module)
      >>> jax.tree.map(jnp.shape, variables)
      {'params': {'classifier': {'bias': (10,), 'kernel': (10, 10)}}}
    """
    if not isinstance(module, Head):
        raise TypeError(f"to_linen converts the heads of gmsop_jax.nnx, got {type(module).__name__}")
    variables = {}
    for name, kind in _COLLECTIONS.items():
        values = {path: variable[...] for path, variable in _flatten(nnx.state(module, kind)).items()}
        if values:
            variables[name] = unflatten_dict(values)
    return module.config, variables


def _in_features(head: Any, params: Mapping[tuple[str, ...], Any]) -> int:
    """The number of channels, from the shape of the first kernel."""
    for path in (("mixture", "candidates1"), ("projection1", "kernel"), ("queries_keys", "kernel")):
        if path in params:
            return params[path].shape[-2]
    if ("classifier", "kernel") in params:
        features = params["classifier", "kernel"].shape[0]
        return features if isinstance(head, models.GAPHead) else triangle_side(features)
    raise ValueError(f"params do not fit {type(head).__name__}: they contain no classifier kernel")


def _flatten(state: Any) -> dict[tuple[str, ...], nnx.Variable]:
    return {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def _fill(module: Head, kind: type[nnx.Variable], collection: str, values: Mapping[tuple[str, ...], Any]) -> None:
    """Sets the variables of a kind to the values of a Linen collection."""
    state = nnx.state(module, kind)
    variables = _flatten(state)
    if set(variables) != set(values):
        missing = sorted("/".join(path) for path in set(variables) - set(values))
        unexpected = sorted("/".join(path) for path in set(values) - set(variables))
        raise ValueError(
            f"{collection} do not fit {type(module.config).__name__}: missing {missing}, unexpected {unexpected}"
        )
    for path, variable in variables.items():
        if variable.shape != values[path].shape:
            raise ValueError(
                f"{collection} do not fit {type(module.config).__name__}: {'/'.join(path)} must have shape"
                f" {variable.shape}, got {values[path].shape}"
            )
        variable.set_value(jnp.asarray(values[path]))
    nnx.update(module, state)
