"""Converts between the authors' parameters, with their names and MATLAB's axis order, and variables of a model.

Axes: filters are HWIO in both. The 1×1 filters of gate, candidates and classifier are [1, 1, in, out] in MATLAB and
[in, out] here, where the N candidates are stacked. Batch norm's moments are one array [c, 2] in MATLAB, and `mean`
and `sigma` here. Arrays indexed by the entries of a second-order vector (rows of the classifier and of the gate's
matrices, the batch norm before the classifier) are permuted, because MATLAB orders the triangle by columns.
"""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gmsop_jax.config import ConfigDict, model_defaults
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop.layers import Parameter, Path, parameters

Tree = dict[str, Any]


def from_params(params: Mapping[str, Any], num_selected: int = 8) -> tuple[ConfigDict, Tree]:
    """Converts the authors' parameters to a model's configuration and variables.

    Blocks, widths, candidates, classes and the order of the pooling are inferred from names and shapes. Whatever the
    shapes don't determine is set as published: strides (1, 2, 2, and 2 for first-order or 1 for second-order
    pooling), three Newton–Schulz iterations, dropout 0.2 and `gate_gradient="masked"`.

    Args:
      params: the authors' name → array, float32 or float64: filters [h, w, in, out], `gating_w` and
        `gating_noise_w` [in, N], vectors [c] or [c, 1], moments `*_bn_m` [c, 2] = [mean, sigma].
      num_selected: K; ignored for networks without a gate.

    Returns: (`config.model`, variables with `params` and `batch_stats` as NumPy arrays of the same dtype).

    Raises:
      CheckpointError: if parameters are missing, unknown, or of a wrong shape or dtype, if they contain NaN, infinite
        values or standard deviations below 0, or if `num_selected` is not between 1 and N.
    """
    config = infer_model(params, num_selected)
    return config, to_variables(config, params)


def to_params(model_config: ConfigDict, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a model's variables to the authors' parameters, in the order of their network; inverts `from_params`.

    Returns: name → NumPy array, in the shapes that `from_params` describes; vectors are [c].

    Raises:
      CheckpointError: if leaves are missing, unknown or of a wrong shape, or if the authors' code has no layer for a
        part of the network.
    """
    _check_has_layers(model_config)
    return _join(parameters(model_config), variables)


def _check_has_layers(m: ConfigDict) -> None:
    supported = {
        "backbone": ("narrow",),
        "head": ("gap", "srsop", "gmgap", "gmsop"),
        "projection_widths": ((),),
        "gate_noise": ("image",),
        "gate_softmax": ("selected",),
        "coefficients": ("newton_schulz",),
        "gate_order": (0, 2 if m.head == "gmsop" else 1),
    }
    for name, values in supported.items():
        value = m[name]
        if value not in values:
            raise CheckpointError(
                f"config.model.{name} = {value!r} has no layer in the authors' code, which supports only"
                f" {' and '.join(map(repr, values))}; `gmsop export` writes any network as safetensors"
            )


def infer_model(params: Mapping[str, Any], num_selected: int) -> ConfigDict:
    """Infers the configuration from names and shapes; see `from_params`."""
    config = model_defaults()
    stages = _largest(params, r"conv(\d+)_1a_f") - 1
    if stages < 1:
        raise CheckpointError(
            "no parameter is named conv2_1a_f; these are not the parameters of one of the authors' networks"
        )
    config.blocks_per_stage = _largest(params, r"conv2_(\d+)a_f")
    widths = [_shape(params, f"conv{s + 2}_1a_f", 4)[3] for s in range(stages)]
    config.stem_width = _shape(params, "conv1_f", 4)[3]
    config.width_factor, config.stage_widths = _factor(widths)
    gated = "gating_w" in params
    if gated:
        _infer_mixture(config, params, num_selected)
    config.num_classes = _shape(params, "prediction_f", 4)[3]
    pooled = {"prediction_f": config.candidate_widths[-1] if gated else widths[-1]}
    if gated:
        pooled["gating_w"] = config.gate_widths[-1]
    first_order = _infer_order(params, pooled) == 1
    heads = ("gmgap", "gmsop") if gated else ("gap", "srsop")
    config.head = heads[0] if first_order else heads[1]
    strides = [1] + [2] * (stages - 1)
    if stages > 1 and not first_order:
        strides[-1] = 1
    config.stage_strides = tuple(strides)
    config.gate_gradient = "masked"
    return config


def _infer_mixture(config: ConfigDict, params: Mapping[str, Any], num_selected: int) -> None:
    n = config.num_candidates = _shape(params, "gating_w", 2)[1]
    if not 1 <= num_selected <= n:
        raise CheckpointError(
            f"num_selected (K = {num_selected}) must be between 1 and the {n} candidates of"
            " 'gating_w'; give the network's K"
        )
    config.num_selected = num_selected
    depth = max(_largest(params, r"gating(\d+)_f"), 1)
    config.gate_widths = tuple(_shape(params, f"gating{i + 1}_f", 4)[3] for i in range(depth))
    layers = [name for name in map(_candidate_layer, range(26)) if name.format(1) in params]
    layers = layers or [_candidate_layer(0)]
    config.candidate_widths = tuple(_shape(params, name.format(1), 4)[3] for name in layers)


def _infer_order(params: Mapping[str, Any], pooled: Mapping[str, int]) -> int:
    """Infers the order of the pooling, 1 or 2, from its number of channels and the rows of the matrices after it."""
    orders = {1, 2}
    for name, width in pooled.items():
        rows = _shape(params, name, 4 if name == "prediction_f" else 2)[-2]
        sizes = {1: width, 2: width * (width + 1) // 2}
        orders &= {order for order, size in sizes.items() if size == rows}
        if not orders:
            raise CheckpointError(
                f"parameter {name!r} has {rows} rows, but {width} channels give {sizes[1]} by average pooling and"
                f" {sizes[2]} by covariance pooling; gate and candidates must use the same pooling"
            )
    return min(orders)


def _candidate_layer(i: int) -> str:
    return f"CM_{{}}_{chr(ord('a') + i)}_f"


def _largest(params: Mapping[str, Any], pattern: str) -> int:
    """Returns the largest number in the names that match, at most the number of names; 0 if no name matches."""
    matches = [re.fullmatch(pattern, name) for name in params]
    return min(max((int(m[1]) for m in matches if m), default=0), len(params))


def _factor(widths: list[int]) -> tuple[int, tuple[int, ...]]:
    """Expresses stage widths as a multiple of the authors' 16, 32, 64, 128 if possible, and otherwise with factor 1."""
    base = model_defaults().stage_widths
    factor = widths[0] // base[0]
    if factor > 0 and widths == [factor * w for w in base]:
        return factor, base
    return 1, tuple(widths)


def _shape(params: Mapping[str, Any], name: str, rank: int) -> tuple[int, ...]:
    if name not in params:
        raise CheckpointError(f"parameter {name!r} is missing")
    shape = np.shape(params[name])
    if len(shape) > rank or 0 in shape:
        raise CheckpointError(f"parameter {name!r} has shape {shape}; it should have {rank} axes")
    return shape + (1,) * (rank - len(shape))  # MATLAB drops trailing axes of length 1


def to_variables(config: ConfigDict, params: Mapping[str, Any], trained_only: bool = False) -> Tree:
    """Converts the authors' arrays to variables; with `trained_only`, to the tree `params` only."""
    table = [p for p in parameters(config) if p.trained or not trained_only]
    compare_names("parameter", [p.name for p in table], params)
    leaves: dict[Path, Any] = {}
    for p in table:
        value = np.asarray(params[p.name])
        if not p.trained and value.ndim == 2 and (wrong := np.count_nonzero(value[:, 1:] < 0)):
            raise CheckpointError(f"{p.name!r} has {wrong} of {len(value)} standard deviations below 0; it is damaged")
        for path, leaf in zip(p.paths, p.split(check_array(p.name, value, p.shape)), strict=True):
            if p.candidate is None:
                leaves[path] = leaf
            else:
                leaves.setdefault(path, []).append(leaf)
    return unflatten_dict({path: np.stack(leaf) if isinstance(leaf, list) else leaf for path, leaf in leaves.items()})


def to_trained(config: ConfigDict, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Inverts `to_variables(…, trained_only=True)`, for a tree like the model's `params`."""
    return _join([p for p in parameters(config) if p.trained], {"params": tree})


def _join(table: list[Parameter], tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}
    rows = collections.Counter("/".join(path) for p in table for path in p.paths)
    compare_names("variable", rows, arrays)

    def leaf(p: Parameter, name: str) -> np.ndarray:
        shape = p.leaf_shape if p.candidate is None else (rows[name], *p.leaf_shape)
        array = check_array(name, arrays[name], shape, finite=False)
        return array if p.candidate is None else array[p.candidate]

    return {p.name: p.join([leaf(p, "/".join(path)) for path in p.paths]) for p in table}


def check_array(name: str, value: np.ndarray, shape: tuple[int, ...], *, finite: bool = True) -> np.ndarray:
    """Returns an array in the expected shape; axes of length 1 may be missing or added.

    Raises:
      CheckpointError: if the shape or the dtype is wrong, or, with `finite`, if values are NaN, infinite, or too large
        for float32, which a working directory stores.
    """
    if value.dtype not in (np.float32, np.float64):
        raise CheckpointError(f"{name!r} is of type {value.dtype}; float32 or float64 is required")
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise CheckpointError(f"{name!r} has shape {value.shape}; the shapes of the other arrays require {shape}")
    if finite and (wrong := np.count_nonzero(~(np.abs(value) <= np.finfo(np.float32).max))):  # also counts NaN
        raise CheckpointError(
            f"{name!r} has {wrong} of {value.size} values that are NaN, infinite or too large for float32"
        )
    return value.reshape(shape)


def compare_names(kind: str, expected: Iterable[str], given: Iterable[str]) -> None:
    """Raises CheckpointError for missing or unexpected names of things of a `kind`, such as "parameter"."""
    expected, given = list(expected), list(given)
    missing = [name for name in expected if name not in set(given)]
    unknown = [name for name in given if name not in set(expected)]
    faults = [f"{_list(kind, missing)} missing"] if missing else []
    faults += [f"{_list(kind, unknown)} not part of this network"] if unknown else []
    if faults:
        raise CheckpointError("; ".join([*faults, "give the weights of one whole network"]))


def _list(kind: str, names: list[str]) -> str:
    if len(names) == 1:
        return f"{kind} {names[0]!r} is"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{kind}s {', '.join(map(repr, names[:5]))}{more} are"
