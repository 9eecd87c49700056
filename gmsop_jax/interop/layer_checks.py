"""Reads the hyperparameters of a checkpoint's layers, and checks that the layers are those of the authors' networks.

If a checkpoint computes something else, the error names the layer.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop.layers import Layer, network
from gmsop_jax.models.network import GATED


def read_hyperparameters(config: ConfigDict, layers: Mapping[str, Layer]) -> None:
    """Sets the fields of `config` that the parameters alone do not determine: strides, iterations and dropout rate.

    Args:
      config: `config.model`.
      layers: the layers of the checkpoint, by name.

    Raises:
      CheckpointError: if a hyperparameter is missing or out of range; the message names its layer.
    """
    stages = range(2, len(config.stage_widths) + 2)
    config.stage_strides = tuple(_integer(layers, f"conv{stage}_1a_conv", "stride") for stage in stages)
    roots = [name for name, layer in layers.items() if layer.type == "dagnn.OBJ_ConvNet_Cov_Sqrtm"]
    if roots:
        config.num_iters = _integer(layers, roots[0], "iterNum")
    if config.head in GATED:
        rate = _number(layers, "dropout", "rate") if "dropout" in layers else 0.0
        if not 0 <= rate < 1:
            raise CheckpointError(f"layer 'dropout': rate is {rate}; it must be in [0, 1)")
        config.dropout_rate = rate


def number_selected(layers: Mapping[str, Layer]) -> int:
    """Returns K, which the layer `gating` stores; 1 for a network without a gate."""
    return _integer(layers, "gating", "topk") if "gating" in layers else 1


def balance_weight(layers: Mapping[str, Layer]) -> float:
    """Returns α, which the layer `Balance_loss` stores; 0 for a network without a gate."""
    return _number(layers, "Balance_loss", "loss_weight") if "Balance_loss" in layers else 0.0


def _integer(layers: Mapping[str, Layer], name: str, key: str) -> int:
    value = _number(layers, name, key)
    if value != int(value) or not 1 <= value < 2**31:
        raise CheckpointError(f"layer {name!r}: {key} is {value}; it must be a positive integer")
    return int(value)


def _number(layers: Mapping[str, Layer], name: str, key: str) -> float:
    """Returns the first number of a hyperparameter."""
    if name not in layers:
        raise CheckpointError(f"layer {name!r} is missing")
    if key not in layers[name].block:
        raise CheckpointError(f"layer {name!r} has no field {key!r} in its block")
    value = layers[name].block[key]
    numbers = _numbers(value)
    if not numbers or not math.isfinite(numbers[0]):
        raise CheckpointError(f"layer {name!r}: {key} is {value!r}; it must be a finite number")
    return float(numbers[0])


def _numbers(value: Any) -> list[float]:
    """Returns the numbers in a hyperparameter; an empty list if it is something else."""
    array = np.asarray(value)
    return array.ravel().tolist() if array.dtype.kind in "biuf" else []


def size_mismatch(layers: Mapping[str, Layer], params: Mapping[str, np.ndarray]) -> str | None:
    """Describes the first parameter whose shape differs from the size that its layer stores; None if all agree."""
    for layer in layers.values():
        size = _numbers(layer.block.get("size", layer.block.get("numChannels")))
        for name in (name for name in layer.params if size and name in params):
            shape = params[name].shape
            is_vector = layer.type == "dagnn.BatchNorm" or name.endswith("_b")
            expected = size[-1:] if is_vector else size[: len(shape)]  # MATLAB drops trailing axes of length 1
            if list(shape[: len(expected)]) != expected:
                expected = tuple(int(n) if math.isfinite(n) else n for n in expected)
                return f"layer {layer.name!r}: parameter {name!r} has shape {shape}, but the layer's size is {expected}"
    return None


def check(config: ConfigDict, layers: Mapping[str, Layer]) -> None:
    """Compares the layers of a checkpoint with those of the network that the configuration describes.

    Raises:
      CheckpointError: if a layer is missing, unknown, connected differently, or has other hyperparameters; the
        message names the layer.
    """
    expected = {layer.name: layer for layer in network(config)}
    types = sorted({layer.type for layer in expected.values()})
    for layer in layers.values():
        if layer.type not in types:
            raise CheckpointError(
                f"layer {layer.name!r} is of type {layer.type!r}; the supported types are {', '.join(types)}"
            )
        if layer.name not in expected and layer.type != "dagnn.Loss":
            raise CheckpointError(
                f"layer {layer.name!r} ({layer.type}) is not part of the network that the parameters describe"
            )
    ours, theirs = _producers(expected), _producers(layers)
    for name, layer in expected.items():
        if layer.type == "dagnn.Loss":
            continue
        if name not in layers:
            raise CheckpointError(f"layer {name!r} ({layer.type}) is missing")
        given = layers[name]
        for what, found, needed in (
            ("type", given.type, layer.type),
            ("params", list(given.params), list(layer.params)),
            ("inputs", theirs(given.inputs), ours(layer.inputs)),
        ):
            if found != needed:
                raise CheckpointError(f"layer {name!r}: {what} is {found}; the network needs {needed}")
        _check_block(given, layer)


def _producers(layers: Mapping[str, Layer]) -> Any:
    """Returns a function that replaces the names of inputs, which are arbitrary, with the layers that produce them."""
    source = {output: f"{layer.name}[{i}]" for layer in layers.values() for i, output in enumerate(layer.outputs)}
    return lambda inputs: [source.get(name, "the images") for name in inputs]


# The hyperparameters that determine what a layer computes. Its size is that of its parameters.
_COMPARED = ("hasBias", "pad", "stride", "dilate", "epsilon", "leak", "method", "coef", "iterNum", "topk", "CM_num")


def _check_block(given: Layer, expected: Layer) -> None:
    for key in _COMPARED:
        if key not in given.block or key not in expected.block:
            continue
        found, needed = given.block[key], expected.block[key]
        values = [found] if isinstance(found, str) else _numbers(found)
        allowed = needed if isinstance(needed, list) else [needed]
        if not values or any(value not in allowed for value in values):
            raise CheckpointError(f"layer {given.name!r}: {key} is {found}; the network needs {needed}")
