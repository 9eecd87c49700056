"""Converts between the authors' parameters, with their names and MATLAB's axis order, and variables of a model.

Axes: filters are HWIO in both. The 1×1 filters of gate, candidates and classifier are [1, 1, in, out] in MATLAB and
[in, out] here, where the N candidates are stacked. Batch norm's moments are one array [c, 2] in MATLAB, and `mean`
and `sigma` here. Arrays indexed by the entries of a second-order vector (rows of the classifier and of the gate's
matrices, the batch norm before the classifier) are permuted, because MATLAB orders the triangle by columns.
"""

import collections
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gmsop_jax.config import ConfigDict, model_defaults
from gmsop_jax.errors import CheckpointError
from gmsop_jax.ops.triangle import triangle_side

Tree = dict[str, Any]
Path = tuple[str, ...]


@dataclass(frozen=True)
class Parameter:
    """One array of the authors' network.

    Attributes:
      name: the authors' name, such as `CM_3_a_f`.
      shape: the authors' shape: filters [h, w, in, out], matrices [in, out], vectors [c], moments [c, 2].
      paths: the paths of its leaves in the variables; two (mean and sigma) for moments.
      candidate: its row in a stacked leaf, from 0; None if the leaf is not stacked.
      triangle: whether its rows are the entries of a triangle.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[Path, ...]
    candidate: int | None = None
    triangle: bool = False

    @property
    def trained(self) -> bool:
        """Whether it is trained by gradients; batch norm's moments are running averages."""
        return len(self.paths) == 1

    @property
    def pointwise(self) -> bool:
        """Whether it is a 1×1 filter that is stored as a matrix here."""
        return len(self.shape) == 4 and self.paths[0][1] == "head"

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """Splits the authors' array into the values of the leaves."""
        value = value.reshape(self.shape)
        if self.pointwise:
            value = value[0, 0]
        if self.triangle:
            value = value[triangle_order(len(value))]
        return [value] if self.trained else [value[:, 0].copy(), value[:, 1].copy()]

    def join(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The inverse of `split`."""
        value = leaves[0] if self.trained else np.stack(leaves, axis=1)
        if self.triangle:
            value = value[np.argsort(triangle_order(len(value)))]
        return np.ascontiguousarray(value.reshape(self.shape))


@functools.cache
def triangle_order(size: int) -> np.ndarray:
    """Positions, in MATLAB's column order, of the entries of `numpy.triu_indices`."""
    rows, columns = np.triu_indices(triangle_side(size))
    return columns * (columns + 1) // 2 + rows


def from_params(params: Mapping[str, Any], num_selected: int = 8) -> tuple[ConfigDict, Tree]:
    """Converts the authors' parameters to a model's configuration and variables.

    Blocks, widths, candidates, classes and the order of the pooling are inferred from names and shapes. Whatever the
    shapes don't determine is set as published: strides (1, 2, 2, and 2 for first-order or 1 for second-order
    pooling), three Newton–Schulz iterations, dropout 0.2 and `gate_gradient="masked"`.

    Args:
      params: the authors' name → array, float32 or float64: filters [h, w, in, out], `gating_w` and
        `gating_noise_w` [in, N], vectors [c] or [c, 1], moments `*_bn_m` [c, 2] = [mean, sigma].
      num_selected: K; ignored for networks without gate.

    Returns: (`config.model`, variables with `params` and `batch_stats` as NumPy arrays of the same dtype).

    Raises:
      CheckpointError: if parameters are missing, unknown or of a wrong shape, or have values that are NaN or infinite
        or standard deviations below 0.
    """
    config = infer_model(params, num_selected)
    return config, to_variables(config, params)


def to_params(model_config: ConfigDict, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a model's variables to the authors' parameters, in the order of their network; inverts `from_params`.

    Args:
      model_config: `config.model`, with num_classes set.
      variables: `params` and `batch_stats` of that model.

    Returns: name → NumPy array, in the shapes that `from_params` describes; vectors are [c].

    Raises:
      CheckpointError: if leaves are missing, unknown or of a wrong shape, or if the authors' code has no layer for a
        part of the network.
    """
    _check_has_layers(model_config)
    return _join(parameters(model_config), dict(_leaves(variables)))


def _check_has_layers(m: ConfigDict) -> None:
    theirs = {
        "backbone": ("narrow",),
        "head": ("gap", "srsop", "gmgap", "gmsop"),
        "projection_widths": ((),),
        "gate_noise": ("image",),
        "gate_softmax": ("selected",),
        "gate_order": (0, 2 if m.head == "gmsop" else 1),
    }
    for name, values in theirs.items():
        value = m[name]
        if value not in values:
            raise CheckpointError(
                f"config.model.{name} = {value!r} has no layer in the authors' code, which knows"
                f" {' and '.join(map(repr, values))}; `gmsop export` writes any network as safetensors"
            )


def infer_model(params: Mapping[str, Any], num_selected: int) -> ConfigDict:
    """Infers the configuration from names and shapes; see `from_params`."""
    config = model_defaults()
    stages = _largest(params, r"conv(\d+)_1a_f") - 1
    if stages < 1:
        raise CheckpointError("no parameter is named conv2_1a_f; these are not the authors' networks")
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
    """Infers the order of the pooling, 1 or 2, from the numbers of channels and of rows of matrices after it."""
    orders = {1, 2}
    for name, width in pooled.items():
        rows = _shape(params, name, 4 if name == "prediction_f" else 2)[-2]
        sizes = {1: width, 2: width * (width + 1) // 2}
        orders &= {order for order, size in sizes.items() if size == rows}
        if not orders:
            raise CheckpointError(
                f"parameter {name!r} has {rows} rows; of {width} channels come {sizes[1]} by average or"
                f" {sizes[2]} by covariance pooling, the same for gate and candidates"
            )
    return min(orders)


def _candidate_layer(i: int) -> str:
    return f"CM_{{}}_{chr(ord('a') + i)}_f"


def _largest(params: Mapping[str, Any], pattern: str) -> int:
    """The largest number in the names that match, bounded by the number of names; 0 if none matches."""
    matches = [re.fullmatch(pattern, name) for name in params]
    return min(max((int(m[1]) for m in matches if m), default=0), len(params))


def _factor(widths: list[int]) -> tuple[int, tuple[int, ...]]:
    """Expresses stage widths as a factor times the authors' 16, 32, 64, 128 if possible, and else with factor 1."""
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


def parameters(config: ConfigDict) -> list[Parameter]:
    """All parameters of a network in the authors' order."""
    return [*_backbone(config), *_head(config)]


def shortcut_stages(config: ConfigDict) -> list[bool]:
    """Whether each stage's first block has a convolution in its shortcut."""
    widths = [config.width_factor * w for w in config.stage_widths]
    before = [config.stem_width, *widths[:-1]]
    return [a != b or stride != 1 for a, b, stride in zip(before, widths, config.stage_strides, strict=True)]


def _batch_norm(name: str, channels: int, path: Path, triangle: bool = False) -> Iterator[Parameter]:
    for leaf, letter in (("scale", "w"), ("bias", "b")):
        paths = (("params", *path, leaf),)
        yield Parameter(f"{name}_bn_{letter}", (channels,), paths, triangle=triangle)
    moments = (("batch_stats", *path, "mean"), ("batch_stats", *path, "sigma"))
    yield Parameter(f"{name}_bn_m", (channels, 2), moments, triangle=triangle)


def _convolution(name: str, shape: tuple[int, ...], path: Path) -> Iterator[Parameter]:
    """A filter without bias and its batch norm."""
    yield Parameter(f"{name}_f", shape, (("params", *path, "kernel"),))
    yield from _batch_norm(name, shape[3], (*path[:-1], f"{path[-1]}_bn"))


def _backbone(config: ConfigDict) -> Iterator[Parameter]:
    c = config.stem_width
    yield Parameter("conv1_f", (3, 3, 3, c), (("params", "backbone", "stem", "kernel"),))
    yield Parameter("conv1_b", (c,), (("params", "backbone", "stem", "bias"),))
    yield from _batch_norm("conv1", c, ("backbone", "stem_bn"))
    for stage, shortcut in enumerate(shortcut_stages(config), 1):
        width = config.stage_widths[stage - 1] * config.width_factor
        for block in range(1, config.blocks_per_stage + 1):
            name = f"conv{stage + 1}_{block}"
            path = ("backbone", f"stage{stage}_block{block}")
            if block == 1 and shortcut:
                projection = (1, 1, c, width)
                yield from _convolution(f"{name}_adapt_conv", projection, (*path, "shortcut"))
            yield from _convolution(f"{name}a", (3, 3, c, width), (*path, "conv1"))
            yield from _convolution(f"{name}b", (3, 3, width, width), (*path, "conv2"))
            c = width


def _head(config: ConfigDict) -> Iterator[Parameter]:
    second = config.head in ("srsop", "gmsop")

    def pooled(width: int) -> int:
        return width * (width + 1) // 2 if second else width

    c = config.stage_widths[-1] * config.width_factor
    if config.head in ("gmgap", "gmsop"):
        mixture = ("head", "mixture")
        gate_in = c
        for i, width in enumerate(config.gate_widths, 1):
            path = (*mixture, "gate", f"conv{i}")
            yield from _convolution(f"gating{i}", (1, 1, gate_in, width), path)
            gate_in = width
        for name, leaf in (("gating_w", "kernel"), ("gating_noise_w", "noise_kernel")):
            paths = (("params", *mixture, "gate", leaf),)
            shape = (pooled(gate_in), config.num_candidates)
            yield Parameter(name, shape, paths, triangle=second)
        for n in range(config.num_candidates):
            last = c
            for i, width in enumerate(config.candidate_widths):
                paths = (("params", *mixture, f"candidates{i + 1}"),)
                name = _candidate_layer(i).format(n + 1)
                yield Parameter(name, (1, 1, last, width), paths, candidate=n)
                last = width
        c = config.candidate_widths[-1]
        yield from _batch_norm("fusion_bn", pooled(c), ("head", "bn"), triangle=second)
    classifier = ("params", "head", "classifier")
    shape = (1, 1, pooled(c), config.num_classes)
    yield Parameter("prediction_f", shape, ((*classifier, "kernel"),), triangle=second)
    yield Parameter("prediction_b", (config.num_classes,), ((*classifier, "bias"),))


def to_variables(config: ConfigDict, params: Mapping[str, Any], trained_only: bool = False) -> Tree:
    """Converts the authors' arrays to variables; with `trained_only`, to the tree `params` only."""
    table = [p for p in parameters(config) if p.trained or not trained_only]
    compare_names("parameter", [p.name for p in table], params)
    leaves: dict[Path, Any] = {}
    for p in table:
        value = _checked(p.name, np.asarray(params[p.name]), p.shape)
        _check_values(p, value)
        for path, leaf in zip(p.paths, p.split(value), strict=True):
            if p.candidate is None:
                leaves[path] = leaf
            else:
                leaves.setdefault(path, []).append(leaf)
    tree: Tree = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.stack(leaf) if isinstance(leaf, list) else leaf
    return tree


def to_trained(config: ConfigDict, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The inverse of `to_variables(…, trained_only=True)`, for a tree like the model's `params`."""
    table = [p for p in parameters(config) if p.trained]
    return _join(table, dict(_leaves({"params": tree})))


def _join(table: list[Parameter], leaves: Mapping[Path, Any]) -> dict[str, np.ndarray]:
    arrays = {"/".join(path): np.asarray(leaf) for path, leaf in leaves.items()}
    rows = collections.Counter("/".join(path) for p in table for path in p.paths)
    compare_names("leaf", rows, arrays)

    def leaf(p: Parameter, name: str) -> np.ndarray:
        shape = p.shape[2:] if p.pointwise else p.shape if p.trained else p.shape[:1]
        if p.candidate is None:
            return _checked(name, arrays[name], shape)
        return _checked(name, arrays[name], (rows[name], *shape))[p.candidate]

    return {p.name: p.join([leaf(p, "/".join(path)) for path in p.paths]) for p in table}


def _checked(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the value in the expected shape; axes of length 1 may be missing or added."""
    if value.dtype not in (np.float32, np.float64):
        raise CheckpointError(f"{name!r} is of type {value.dtype}; float32 or float64 is needed")
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise CheckpointError(f"{name!r} has shape {value.shape}; the others' shapes need {shape}")
    return value.reshape(shape)


def _check_values(p: Parameter, value: np.ndarray) -> None:
    """Raises CheckpointError for values with which no network can compute; float32 is what a run stores."""
    if wrong := np.count_nonzero(~(np.abs(value) <= np.finfo(np.float32).max)):
        raise CheckpointError(f"{p.name!r} has {wrong} of {value.size} values that are NaN, infinite or too large")
    if not p.trained and (wrong := np.count_nonzero(value[:, 1] < 0)):
        raise CheckpointError(f"{p.name!r} has {wrong} of {len(value)} standard deviations below 0; it is damaged")


def compare_names(kind: str, expected: Iterable[str], given: Iterable[str]) -> None:
    """Raises CheckpointError for names that are missing or not expected; `kind` is a noun for what they name."""
    expected, given = list(expected), list(given)
    missing = [name for name in expected if name not in set(given)]
    unknown = [name for name in given if name not in set(expected)]
    faults = []
    if missing:
        faults.append(f"{kind} {_list(missing)} missing")
    if unknown:
        faults.append(f"{kind} {_list(unknown)} not part of such a network")
    if faults:
        raise CheckpointError("; ".join(faults))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    verb = " are" if len(names) > 1 else " is"
    return ", ".join(map(repr, names[:5])) + more + verb


def _leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree
