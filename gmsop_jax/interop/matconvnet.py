"""Reads and writes checkpoints of the authors' MatConvNet training script, `net-epoch-N.mat`.

    model_config, variables = load("net-epoch-60.mat")
    logits, aux = create_model(model_config).apply(variables, images)

`images` are preprocessed as in training: pixels of 0–255 with the mean colour subtracted
(`load_checkpoint(path).mean_rgb`). Blocks, widths, candidates and classes are inferred from the contents of the file.
`from_params` and `to_params` convert dictionaries of the authors' arrays.
"""

import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop import layer_checks, matfile, parameters
from gmsop_jax.interop import layers as dag
from gmsop_jax.interop.parameters import Tree, from_params, to_params

__all__ = ["Checkpoint", "from_params", "load", "load_checkpoint", "save", "to_params"]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint of the authors' script.

    Attributes:
      model_config: `config.model`; `gate_gradient` is `masked`, as in the authors' code.
      variables: `params` and `batch_stats`, NumPy arrays of the file's dtype.
      momentum: a tree like `params`, with the sign of `optax.trace`, which is opposite to that of the authors' code;
        None if the file has no `state`.
      epoch: epochs trained.
      balance_weight: α; 0 for a network without a gate.
      meta: `net.meta`, unchanged: normalisation, training options, and classes if present.
      stats: errors and losses of every epoch; {} if the file has none.
    """

    model_config: ConfigDict
    variables: Tree
    momentum: Tree | None = None
    epoch: int = 0
    balance_weight: float = 100.0
    meta: dict[str, Any] = field(default_factory=dict)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def normalization(self) -> dict[str, Any]:
        """`net.meta.normalization`: the size of the images and their mean; {} if the file has none."""
        value = self.meta.get("normalization")
        return value if isinstance(value, dict) else {}

    @property
    def mean_rgb(self) -> np.ndarray | None:
        """The mean colour of the training images [3], float64, 0–255; None if the file has none."""
        mean = self.normalization.get("averageImage")
        if not isinstance(mean, np.ndarray) or mean.dtype.kind not in "biuf" or mean.size < 3:
            return None
        if mean.size == 3:
            return mean.reshape(3).astype(np.float64)
        return mean.mean(axis=(0, 1), dtype=np.float64) if mean.shape[2:] == (3,) else None

    @property
    def class_names(self) -> list[str] | None:
        """The names of the classes; None if the file has none."""
        classes = self.meta.get("classes")
        names = classes.get("description", classes.get("name")) if isinstance(classes, dict) else None
        return _texts(names, "meta.classes") if isinstance(names, np.ndarray) else None


def load(path: str | pathlib.Path) -> tuple[ConfigDict, Tree]:
    """Loads the network in a checkpoint.

    Args:
      path: a file written by the authors' script or by `save`, in MATLAB v7 or v7.3 format.

    Returns: (`config.model`, variables), for `create_model` and its `apply`.

    Raises:
      CheckpointError: if the file is not a MATLAB file, is damaged, lacks a field, or contains a network that
        gmsop_jax can't compute; the message names the field, parameter or layer.
    """
    checkpoint = load_checkpoint(path)
    return checkpoint.model_config, checkpoint.variables


def load_checkpoint(path: str | pathlib.Path) -> Checkpoint:
    """Loads a checkpoint with everything that is needed to resume training; raises the same errors as `load`."""
    path = pathlib.Path(path)
    stored = matfile.read(path, ("net", "state", "stats", "epoch"))
    try:
        return _parse(stored, path)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _parse(stored: Mapping[str, Any], path: pathlib.Path) -> Checkpoint:
    net = stored.get("net")
    if not isinstance(net, dict):
        raise CheckpointError("the file has no struct 'net', so it is not a checkpoint of MatConvNet")
    structs = _structs(net, "params", "net")
    params = {_text(p, "name", "net.params"): _field(p, "value", "net.params") for p in structs}
    if len(params) != len(structs):
        raise CheckpointError("two parameters in net.params have the same name")
    for name, value in params.items():
        if not isinstance(value, np.ndarray) or value.dtype not in (np.float32, np.float64):
            raise CheckpointError(f"parameter {name!r} is not an array of type single or double")
    layers = _layers(net)
    config, variables = _network(params, layers)
    config.pixel_scale = _pixel_scale(structs)
    meta, stats = net.get("meta"), stored.get("stats")
    stats = stats if isinstance(stats, dict) else {}
    return Checkpoint(
        config,
        variables,
        _momentum(config, params, stored.get("state")),
        _epoch(stored.get("epoch"), stats, path),
        layer_checks.balance_weight(layers),
        meta if isinstance(meta, dict) else {},
        stats,
    )


def _network(params: Mapping[str, Any], layers: Mapping[str, dag.Layer]) -> tuple[ConfigDict, Tree]:
    try:
        config = parameters.infer_model(params, layer_checks.number_selected(layers))
        layer_checks.read_hyperparameters(config, layers)
        layer_checks.check(config, layers)
        return config, parameters.to_variables(config, params)
    except CheckpointError as error:  # one wrong shape makes others look wrong
        raise CheckpointError(layer_checks.size_mismatch(layers, params) or str(error)) from None


def _layers(net: Mapping[str, Any]) -> dict[str, dag.Layer]:
    layers = {}
    for struct in _structs(net, "layers", "net"):
        name = _text(struct, "name", "net.layers")
        where = f"layer {name!r}"
        if name in layers:
            raise CheckpointError(f"there are two layers {name!r}")
        block = _field(struct, "block", where)
        layers[name] = dag.Layer(
            name,
            _text(struct, "type", where),
            _texts(_field(struct, "inputs", where), f"{where}: inputs"),
            _texts(_field(struct, "outputs", where), f"{where}: outputs"),
            _texts(_field(struct, "params", where), f"{where}: params"),
            block if isinstance(block, dict) else {},
        )
    return layers


def _pixel_scale(structs: list[dict[str, Any]]) -> float:
    """Derives `pixel_scale` from the learning rate of the stem's kernel, which is 1/pixel_scale² times the others'."""
    stem = next(p for p in structs if p["name"] == "conv1_f")
    rate = np.asarray(stem.get("learningRate", 1 / 3600))
    if rate.dtype.kind != "f" or rate.size != 1 or not 0 < rate.item() < np.inf:
        raise CheckpointError(f"parameter 'conv1_f': learningRate is {rate!r}; it must be a positive number")
    return round(float(rate.item() ** -0.5), 6)


def _momentum(config: ConfigDict, params: Mapping[str, Any], state: Any) -> Tree | None:
    state = state[0] if isinstance(state, list) and state else state
    if not isinstance(state, dict):
        return None
    cells = state.get("momentum", state.get("solverState"))  # `solverState` in later versions of MatConvNet
    if not isinstance(cells, np.ndarray) or cells.dtype != object or cells.size != len(params):
        raise CheckpointError(f"state.momentum is not a cell array of {len(params)} arrays")
    values = {}
    for (name, value), cell in zip(params.items(), cells.ravel(), strict=True):
        if not isinstance(cell, np.ndarray) or cell.dtype.kind != "f":
            raise CheckpointError(f"state.momentum of parameter {name!r} is not an array of numbers")
        # momentum that was never updated is the scalar 0
        values[name] = np.zeros_like(value) if cell.size == 1 and not cell.any() else -cell
    trained = {p.name: values[p.name] for p in dag.parameters(config) if p.trained}
    try:
        return parameters.to_variables(config, trained, trained_only=True)["params"]
    except CheckpointError as error:
        raise CheckpointError(f"state.momentum: {error}") from None


def _epoch(stored: Any, stats: Mapping[str, Any], path: pathlib.Path) -> int:
    """Returns the number of trained epochs, from what `save` stored, the statistics, or the name of the file."""
    if isinstance(stored, np.ndarray) and stored.dtype.kind == "f" and stored.size == 1:
        if not 0 <= stored.item() < 2**31:
            raise CheckpointError(f"epoch is {stored.item()}; it must be 0 or more")
        return int(stored.item())
    train = stats.get("train")
    if isinstance(train, list | dict) and train:
        return len(train) if isinstance(train, list) else 1
    match = re.search(r"epoch-(\d{1,9})", path.name)
    return int(match[1]) if match else 0


def _structs(parent: Mapping[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    value = _field(parent, name, where)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise CheckpointError(f"{where}.{name} is not a struct array")
    return value


def _field(struct: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in struct:
        raise CheckpointError(f"{where} has no field {name!r}")
    return struct[name]


def _text(struct: Mapping[str, Any], name: str, where: str) -> str:
    value = _field(struct, name, where)
    if not isinstance(value, str) or not value:
        raise CheckpointError(f"{where}: field {name!r} is not text")
    return value


def _texts(value: Any, where: str) -> list[str]:
    items = [value] if isinstance(value, str) else list(np.ravel(value))
    if not all(isinstance(item, str) for item in items):
        raise CheckpointError(f"{where} is not a cell array of text")
    return items


def save(
    path: str | pathlib.Path,
    model_config: ConfigDict,
    variables: Mapping[str, Any],
    *,
    momentum: Mapping[str, Any] | None = None,
    epoch: int = 0,
    balance_weight: float = 100.0,
    meta: Mapping[str, Any] | None = None,
    stats: Mapping[str, Any] | None = None,
    v73: bool = False,
) -> None:
    """Writes a checkpoint that MatConvNet can load with the authors' layers, and that `load` reads back bit for bit.

    Args:
      path: the file, which is overwritten if it exists; the authors' script looks for `net-epoch-N.mat`.
      model_config: `config.model`, with num_classes set.
      variables: `params` and `batch_stats`, float32 or float64.
      momentum: see `Checkpoint`; None stores zeros.
      epoch, balance_weight, stats: see `Checkpoint`.
      meta: see `Checkpoint`; None stores an image size of 64×64 and a mean colour of 0.
      v73: whether to write MATLAB's HDF5 format, which is required for arrays of more than 2 GB.

    Raises:
      CheckpointError: if leaves of the variables or the momentum don't fit the model.
    """
    arrays = parameters.to_params(model_config, variables)
    meta = meta or _default_meta()
    layers = dag.network(model_config, balance_weight=balance_weight, image_side=_image_side(meta))
    stats = dict(stats or {"train": [], "val": []})
    last = {part: rows[-1] for part, rows in stats.items() if isinstance(rows, list) and rows}
    contents = {
        "net": {
            "vars": _vars(layers),
            "params": _save_params(model_config, arrays),
            "layers": [_save_layer(layer) for layer in layers],
            "meta": dict(meta),
        },
        "state": {"momentum": _save_momentum(model_config, list(arrays), momentum), "stats": last},
        "stats": stats,
        "epoch": np.array([[float(epoch)]]),
    }
    matfile.write(path, contents, v73=v73)


def _default_meta() -> dict[str, Any]:
    return {
        "normalization": {"imageSize": np.array([[64.0, 64.0, 3.0]]), "averageImage": np.zeros((1, 3))},
        "inputSize": _matlab(["input", [64, 64, 3, 32]]),
    }


def _image_side(meta: Mapping[str, Any]) -> int:
    normalization = meta.get("normalization")
    size = normalization.get("imageSize") if isinstance(normalization, dict) else None
    return int(np.ravel(size)[0]) if size is not None and np.size(size) else 64


def _save_params(config: ConfigDict, arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    rates = {p.name: 1.0 if p.trained else 0.3 for p in dag.parameters(config)}
    rates["conv1_f"] = config.pixel_scale**-2
    return [
        {
            "name": name,
            "value": _column(value),
            "learningRate": np.array([[rates[name]]]),
            "weightDecay": np.array([[1.0]]),
        }
        for name, value in arrays.items()
    ]


def _column(value: np.ndarray) -> np.ndarray:
    return value[:, None] if value.ndim == 1 else value


def _save_momentum(config: ConfigDict, names: list[str], momentum: Any) -> np.ndarray:
    values = {} if momentum is None else parameters.to_trained(config, momentum)
    cells = np.empty((1, len(names)), object)
    for i, name in enumerate(names):
        cells[0, i] = -_column(values[name]) if name in values else np.zeros((1, 1))
    return cells


def _save_layer(layer: dag.Layer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "type": layer.type,
        "inputs": _cells(layer.inputs),
        "outputs": _cells(layer.outputs),
        "params": _cells(layer.params),
        "block": {key: _matlab(value) for key, value in layer.block.items()},
    }


def _vars(layers: list[dag.Layer]) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for layer in layers for name in (*layer.inputs, *layer.outputs))
    return [{"name": n, "precious": np.array([[n in ("gating", "Balance_loss")]])} for n in names]


def _matlab(value: Any) -> Any:
    """Converts a hyperparameter to MATLAB's types: text, numbers, or cells for an empty list or a list of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and (not value or isinstance(value[0], str)):
        return _cells([_matlab(item) for item in value])
    numbers = np.atleast_2d(value)
    return numbers if numbers.dtype == bool else numbers.astype(np.float64)


def _cells(items: Any) -> np.ndarray:
    cells = np.empty((1, len(items)) if items else (0, 0), object)
    if items:
        cells[0] = list(items)
    return cells
