"""The authors' networks as MatConvNet's DagNN stores them: layers, and the parameters of each layer.

`network` lists the layers of a configuration. It is the only description of the authors' networks: it gives the names
and shapes of their parameters and their paths in a model's variables. The layers of a checkpoint are compared with it,
and a network that computes something else raises an error that names the layer.
"""

import functools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.models.network import GATED
from gmsop_jax.ops.triangle import triangle_side

Path = tuple[str, ...]

_EPSILON = 1e-5  # of batch norm
_CUDNN = {"opts": ["cuDNN"], "cudnn": ["CuDNN"]}
_BACKBONE, _GATE = ("backbone",), ("head", "mixture", "gate")


@dataclass(frozen=True)
class Parameter:
    """One array of the authors' network.

    Attributes:
      name: the authors' name, such as `CM_3_a_f`.
      shape: the authors' shape: filters [h, w, in, out], matrices [in, out], vectors [c], moments [c, 2].
      paths: the paths of its leaves in the variables; two (mean and sigma) for moments.
      candidate: its index in a stacked leaf, from 0; None if the leaf is not stacked.
      triangle: whether its rows correspond to the entries of an upper triangle.
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[Path, ...]
    candidate: int | None = None
    triangle: bool = False

    @property
    def trained(self) -> bool:
        """Whether it is trained by gradients, unlike batch norm's moments, which are running averages."""
        return len(self.paths) == 1

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """The shape of each leaf; 1×1 filters of the head are stored as matrices."""
        if len(self.shape) == 4 and self.paths[0][1] == "head":
            return self.shape[2:]
        return self.shape if self.trained else self.shape[:1]

    def split(self, value: np.ndarray) -> list[np.ndarray]:
        """Splits the authors' array into the values of the leaves."""
        leaves = [value] if self.trained else [value[:, 0].copy(), value[:, 1].copy()]
        leaves = [leaf.reshape(self.leaf_shape) for leaf in leaves]
        return [leaf[triangle_order(len(leaf))] for leaf in leaves] if self.triangle else leaves

    def join(self, leaves: list[np.ndarray]) -> np.ndarray:
        """Inverts `split`."""
        value = leaves[0] if self.trained else np.stack(leaves, axis=1)
        if self.triangle:
            value = value[np.argsort(triangle_order(len(value)))]
        return np.ascontiguousarray(value.reshape(self.shape))


@functools.cache
def triangle_order(size: int) -> np.ndarray:
    """The index in MATLAB's column order of each entry of `numpy.triu_indices`."""
    rows, columns = np.triu_indices(triangle_side(size))
    return columns * (columns + 1) // 2 + rows


@dataclass(frozen=True)
class Layer:
    """One layer of a DagNN.

    Attributes:
      name, type, inputs, outputs, params: the names in MatConvNet.
      block: the hyperparameters, in Python's types.
      parameters: the parameters that `params` names; empty for a layer that was read from a file.
    """

    name: str
    type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    params: Sequence[str] = ()
    block: Mapping[str, Any] = field(default_factory=dict)
    parameters: Sequence[Parameter] = ()


def parameters(config: ConfigDict) -> list[Parameter]:
    """Lists the parameters of a network in the authors' order."""
    return [parameter for layer in network(config) for parameter in layer.parameters]


def network(config: ConfigDict, *, balance_weight: float = 100.0, image_side: int = 64) -> list[Layer]:
    """Lists the layers of a network in the authors' order.

    Args:
      config: `config.model`, with num_classes set.
      balance_weight: α, which is stored in the layer `Balance_loss`.
      image_side: the height and width of the images, which average pooling stores.
    """
    layers = list(_backbone(config))
    features, width = layers[-1].outputs[0], _stage_widths(config)[-1]
    side = image_side // math.prod(config.stage_strides)
    if config.head in GATED:
        layers += _mixture(config, features, balance_weight, side)
        width = config.candidate_widths[-1]
    else:
        layers += _pool(config, "", features, side)
    shape = (1, 1, _pooled(config, width), config.num_classes)
    kernel = ("head", "classifier", "kernel")
    layers.append(_convolution("prediction", layers[-1].outputs[0], shape, kernel, triangle=_is_second_order(config)))
    for name, output, loss, opts in (
        ("loss", "objective", "softmaxlog", []),
        ("top1error", "top1error", "classerror", []),
        ("top5error", "top5error", "topkerror", ["topK", 5]),
    ):
        block = {"loss": loss, "ignoreAverage": False, "opts": opts}
        layers.append(Layer(name, "dagnn.Loss", ["prediction", "label"], [output], (), block))
    return layers


def _stage_widths(config: ConfigDict) -> list[int]:
    return [config.width_factor * w for w in config.stage_widths]


def _is_second_order(config: ConfigDict) -> bool:
    return config.head in ("srsop", "gmsop")


def _pooled(config: ConfigDict, width: int) -> int:
    return width * (width + 1) // 2 if _is_second_order(config) else width


def _layer(name: str, kind: str, source: str, parameters: Sequence[Parameter] = (), **block: Any) -> Layer:
    names = [parameter.name for parameter in parameters]
    return Layer(name, f"dagnn.{kind}", [source], [name], names, block, parameters)


def _convolution(
    name: str,
    source: str,
    shape: tuple[int, ...],
    kernel: Path,
    *,
    stride: int = 1,
    candidate: int | None = None,
    triangle: bool = False,
) -> Layer:
    arrays = [Parameter(f"{name}_f", shape, (("params", *kernel),), candidate, triangle)]
    prediction = name == "prediction"
    if bias := prediction or name == "conv1":
        arrays.append(Parameter(f"{name}_b", shape[3:], (("params", *kernel[:-1], "bias"),)))
    return _layer(
        name if prediction else f"{name}_conv",
        "Conv",
        source,
        arrays,
        size=list(shape),
        hasBias=bias,
        opts=["cuDNN"] if prediction else ["cudnnworkspacelimit", 1262485504.0],
        pad=[(shape[0] - 1) // 2] * 4,
        stride=[stride] * 2,
        dilate=[1, 1],
    )


def _batch_norm(name: str, source: str, channels: int, path: Path, triangle: bool = False) -> Layer:
    arrays = [
        Parameter(f"{name}_bn_w", (channels,), (("params", *path, "scale"),), triangle=triangle),
        Parameter(f"{name}_bn_b", (channels,), (("params", *path, "bias"),), triangle=triangle),
        Parameter(
            f"{name}_bn_m",
            (channels, 2),
            (("batch_stats", *path, "mean"), ("batch_stats", *path, "sigma")),
            triangle=triangle,
        ),
    ]
    layer = name if name == "fusion_bn" else f"{name}_bn"
    return _layer(layer, "BatchNorm", source, arrays, numChannels=channels, epsilon=_EPSILON, opts=["NoCuDNN"])


def _normalized_convolution(
    name: str, source: str, shape: tuple[int, ...], module: Path, stride: int = 1
) -> Iterator[Layer]:
    """A convolution, called `module` in the variables, and its batch norm."""
    yield _convolution(name, source, shape, (*module, "kernel"), stride=stride)
    yield _batch_norm(name, f"{name}_conv", shape[3], (*module[:-1], f"{module[-1]}_bn"))


def _relu(name: str, source: str, output: str = "") -> Layer:
    block = {"useShortCircuit": True, "leak": 0, "opts": []}
    return Layer(f"{name}_relu", "dagnn.ReLU", [source], [output or f"{name}_relu"], (), block)


def _shortcut_stages(config: ConfigDict) -> list[bool]:
    """Whether each stage's first block has a convolution in its shortcut."""
    widths = _stage_widths(config)
    before = [config.stem_width, *widths[:-1]]
    return [a != b or stride != 1 for a, b, stride in zip(before, widths, config.stage_strides, strict=True)]


def _backbone(config: ConfigDict) -> Iterator[Layer]:
    c = config.stem_width
    yield from _normalized_convolution("conv1", "input", (3, 3, 3, c), (*_BACKBONE, "stem"))
    yield _relu("conv1", "conv1_bn")
    last = "conv1_relu"
    stages = zip(_stage_widths(config), config.stage_strides, _shortcut_stages(config), strict=True)
    for stage, (width, first_stride, has_shortcut) in enumerate(stages, 1):
        for block in range(1, config.blocks_per_stage + 1):
            first = block == 1
            path = (*_BACKBONE, f"stage{stage}_block{block}")
            name = f"conv{stage + 1}_{block}"
            yield from _block(name, last, c, width, first_stride if first else 1, first and has_shortcut, path)
            last, c = name, width


def _block(
    name: str, source: str, channels: int, width: int, stride: int, has_shortcut: bool, path: Path
) -> Iterator[Layer]:
    shortcut = source
    if has_shortcut:
        shape = (1, 1, channels, width)
        yield from _normalized_convolution(f"{name}_adapt_conv", source, shape, (*path, "shortcut"), stride)
        shortcut = f"{name}_adapt_conv_bn"
    yield from _normalized_convolution(f"{name}a", source, (3, 3, channels, width), (*path, "conv1"), stride)
    yield _relu(f"{name}a", f"{name}a_bn")
    yield from _normalized_convolution(f"{name}b", f"{name}a_relu", (3, 3, width, width), (*path, "conv2"))
    yield Layer(f"{name}_sum", "dagnn.Sum", [shortcut, f"{name}b_bn"], [f"{name}_sum"])
    yield _relu(name, f"{name}_sum", output=name)


def _pool(config: ConfigDict, prefix: str, source: str, side: int) -> Iterator[Layer]:
    """Average pooling, or the four layers of square-root-normalised covariance pooling."""
    if not _is_second_order(config):
        block = {"method": "avg", "poolSize": [side] * 2, "opts": ["cuDNN"]}
        block |= {"pad": [0] * 4, "stride": [1, 1], "dilate": [1, 1]}
        yield _layer(f"{prefix}GAP", "Pooling", source, **block)
        return
    pool, trace, root = (f"{prefix}{x}" for x in ("cov_pool", "cov_trace_norm", "Cov_Sqrtm"))
    yield _layer(pool, "OBJ_ConvNet_COV_Pool", source, (), **_CUDNN)
    outputs = [trace, f"{trace}_tr"]
    yield Layer(trace, "dagnn.OBJ_ConvNet_Cov_TraceNorm", [pool], outputs, (), _CUDNN)
    block = {**_CUDNN, "coef": 1, "iterNum": config.num_iters}
    outputs = [root, f"{root}_Y", f"{root}_Z"]
    yield Layer(root, "dagnn.OBJ_ConvNet_Cov_Sqrtm", [trace], outputs, (), block)
    scale = f"{prefix}Cov_ScaleTr"
    inputs = [root, f"{trace}_tr"]
    yield Layer(scale, "dagnn.OBJ_ConvNet_COV_ScaleTr", inputs, [scale], (), _CUDNN)


def _mixture(config: ConfigDict, features: str, balance_weight: float, side: int) -> Iterator[Layer]:
    n, k, triangle = config.num_candidates, config.num_selected, _is_second_order(config)
    last, c = features, _stage_widths(config)[-1]
    for i, width in enumerate(config.gate_widths, 1):
        yield from _normalized_convolution(f"gating{i}", last, (1, 1, c, width), (*_GATE, f"conv{i}"))
        yield _relu(f"gating{i}", f"gating{i}_bn")
        last, c = f"gating{i}_relu", width
    pooling = list(_pool(config, "gating_", last, side))
    yield from pooling
    rows = _pooled(config, c)
    block = {"size": [rows, n], "hasBias": False, "topk": k, "CM_num": n}
    arrays = [
        Parameter(name, (rows, n), (("params", *_GATE, leaf),), triangle=triangle)
        for name, leaf in (("gating_w", "kernel"), ("gating_noise_w", "noise_kernel"))
    ]
    yield _layer("H_x", "H_x", pooling[-1].name, arrays, **block, f_size=[1, 1], dim_in=rows)
    yield _layer("gating", "gating", "H_x", **block, f_size=[8, 8])
    yield _layer("Balance_loss", "Balance_loss", "gating", loss_weight=balance_weight, CM_num=n)
    pooled = []
    for i in range(n):
        candidate = list(_candidate(config, i, features, side))
        yield from candidate
        pooled.append(candidate[-1].name)
    rows = _pooled(config, config.candidate_widths[-1])
    block = {"CM_num": n, "topk": k, "hdim": rows}
    yield Layer("Fusion_out", "dagnn.CM_out", ["gating", *pooled], ["Fusion_out"], (), block)
    yield _batch_norm("fusion_bn", "Fusion_out", rows, ("head", "bn"), triangle)
    if config.dropout_rate:
        yield _layer("dropout", "DropOut", "fusion_bn", rate=config.dropout_rate, frozen=False)


def _candidate(config: ConfigDict, number: int, features: str, side: int) -> Iterator[Layer]:
    last, c = features, _stage_widths(config)[-1]
    for i, (letter, width) in enumerate(zip(string.ascii_lowercase, config.candidate_widths, strict=False), 1):
        name = f"CM_{number + 1}_{letter}"
        yield _convolution(name, last, (1, 1, c, width), ("head", "mixture", f"candidates{i}"), candidate=number)
        yield _relu(name, f"{name}_conv")
        last, c = f"{name}_relu", width
    yield from _pool(config, f"CM_{number + 1}_", last, side)


def read_hyperparameters(config: ConfigDict, layers: Mapping[str, Layer]) -> None:
    """Sets what the parameters alone do not determine: strides, Newton–Schulz iterations and dropout.

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
    """Compares the layers of a checkpoint with the network that the configuration computes.

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
            raise CheckpointError(f"layer {layer.name!r} ({layer.type}) is not part of such a network")
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
            raise CheckpointError(f"layer {given.name!r}: {key} is {found}, but gmsop_jax computes {needed}")
