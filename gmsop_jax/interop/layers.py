"""The layers of the authors' networks, as MatConvNet's DagNN stores them in a checkpoint.

`network` lists the layers of a configuration. The layers of a checkpoint are compared with that list, so that a
network that computes something else is refused with the name of the layer.
"""

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop.parameters import shortcut_stages

_EPSILON = 1e-5  # of batch norm
_CUDNN = {"opts": ["cuDNN"], "cudnn": ["CuDNN"]}


@dataclass(frozen=True)
class Layer:
    """One layer of a DagNN; `block` holds its hyperparameters in Python's types."""

    name: str
    type: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    params: Sequence[str] = ()
    block: Mapping[str, Any] = field(default_factory=dict)


def _layer(name: str, kind: str, source: str, params: Sequence[str] = (), **block: Any) -> Layer:
    return Layer(name, f"dagnn.{kind}", [source], [name], params, block)


def _convolution(name: str, source: str, shape: Sequence[int], stride: int = 1) -> Layer:
    pad = (shape[0] - 1) // 2
    prediction = name == "prediction"
    bias = prediction or name == "conv1"
    return _layer(
        name if prediction else f"{name}_conv",
        "Conv",
        source,
        [f"{name}_f", f"{name}_b"] if bias else [f"{name}_f"],
        size=shape,
        hasBias=bias,
        opts=["cuDNN"] if prediction else ["cudnnworkspacelimit", 1262485504.0],
        pad=[pad] * 4,
        stride=[stride] * 2,
        dilate=[1, 1],
    )


def _batch_norm(name: str, source: str, channels: int) -> Layer:
    layer = name if name == "fusion_bn" else f"{name}_bn"
    params = [f"{name}_bn_{letter}" for letter in "wbm"]
    return _layer(layer, "BatchNorm", source, params, numChannels=channels, epsilon=_EPSILON, opts=["NoCuDNN"])


def _relu(name: str, source: str, output: str = "") -> Layer:
    block = {"useShortCircuit": True, "leak": 0, "opts": []}
    return Layer(f"{name}_relu", "dagnn.ReLU", [source], [output or f"{name}_relu"], (), block)


def network(config: ConfigDict, *, balance_weight: float = 100.0, image_side: int = 64) -> list[Layer]:
    """Lists the layers of `config.model` in the authors' order.

    Args:
      config: `config.model`, with num_classes set.
      balance_weight: α, which is stored in the layer `Balance_loss`.
      image_side: the height and width of the images, which average pooling stores.
    """
    layers = list(_backbone(config))
    gated = config.head in ("gmgap", "gmsop")
    features = layers[-1].outputs[0]
    side = image_side // math.prod(config.stage_strides)
    if gated:
        layers += _mixture(config, features, balance_weight, side)
    else:
        layers += _pool(config, "", features, side)
    width = (config.candidate_widths if gated else _stage_widths(config))[-1]
    shape = [1, 1, _pooled(config, width), config.num_classes]
    layers.append(_convolution("prediction", layers[-1].outputs[0], shape))
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


def _pooled(config: ConfigDict, width: int) -> int:
    return width * (width + 1) // 2 if config.head in ("srsop", "gmsop") else width


def _backbone(config: ConfigDict) -> Iterator[Layer]:
    c = config.stem_width
    yield _convolution("conv1", "input", [3, 3, 3, c])
    yield _batch_norm("conv1", "conv1_conv", c)
    yield _relu("conv1", "conv1_bn")
    last = "conv1_relu"
    stages = zip(_stage_widths(config), config.stage_strides, shortcut_stages(config), strict=True)
    for stage, (width, first_stride, has_shortcut) in enumerate(stages, 2):
        for block in range(1, config.blocks_per_stage + 1):
            name = f"conv{stage}_{block}"
            stride = first_stride if block == 1 else 1
            shortcut = last
            if block == 1 and has_shortcut:
                shortcut = f"{name}_adapt_conv_bn"
                yield _convolution(f"{name}_adapt_conv", last, [1, 1, c, width], stride)
                yield _batch_norm(f"{name}_adapt_conv", f"{name}_adapt_conv_conv", width)
            yield _convolution(f"{name}a", last, [3, 3, c, width], stride)
            yield _batch_norm(f"{name}a", f"{name}a_conv", width)
            yield _relu(f"{name}a", f"{name}a_bn")
            yield _convolution(f"{name}b", f"{name}a_relu", [3, 3, width, width])
            yield _batch_norm(f"{name}b", f"{name}b_conv", width)
            both = [shortcut, f"{name}b_bn"]
            yield Layer(f"{name}_sum", "dagnn.Sum", both, [f"{name}_sum"])
            yield _relu(name, f"{name}_sum", output=name)
            last, c = name, width


def _pool(config: ConfigDict, prefix: str, source: str, side: int) -> Iterator[Layer]:
    """Average pooling, or the four layers of square-root-normalised covariance pooling."""
    if config.head in ("gap", "gmgap"):
        block = {"method": "avg", "poolSize": [side] * 2, "opts": ["cuDNN"]}
        block |= {"pad": [0] * 4, "stride": [1, 1], "dilate": [1, 1]}
        yield _layer(f"{prefix}GAP", "Pooling", source, **block)
        return
    pool, trace, root = (f"{prefix}{x}" for x in ("cov_pool", "cov_trace_norm", "Cov_Sqrtm"))
    yield _layer(pool, "OBJ_ConvNet_COV_Pool", source, **_CUDNN)
    outputs = [trace, f"{trace}_tr"]
    yield Layer(trace, "dagnn.OBJ_ConvNet_Cov_TraceNorm", [pool], outputs, (), _CUDNN)
    block = {**_CUDNN, "coef": 1, "iterNum": config.num_iters}
    outputs = [root, f"{root}_Y", f"{root}_Z"]
    yield Layer(root, "dagnn.OBJ_ConvNet_Cov_Sqrtm", [trace], outputs, (), block)
    scale = f"{prefix}Cov_ScaleTr"
    inputs = [root, f"{trace}_tr"]
    yield Layer(scale, "dagnn.OBJ_ConvNet_COV_ScaleTr", inputs, [scale], (), _CUDNN)


def _mixture(config: ConfigDict, features: str, balance_weight: float, side: int) -> Iterator[Layer]:
    n, k, channels = config.num_candidates, config.num_selected, _stage_widths(config)[-1]
    last, c = features, channels
    for i, width in enumerate(config.gate_widths, 1):
        name = f"gating{i}"
        yield _convolution(name, last, [1, 1, c, width])
        yield _batch_norm(name, f"{name}_conv", width)
        yield _relu(name, f"{name}_bn")
        last, c = f"{name}_relu", width
    pooling = list(_pool(config, "gating_", last, side))
    yield from pooling
    rows = _pooled(config, c)
    block = {"size": [rows, n], "hasBias": False, "topk": k, "CM_num": n}
    params = ["gating_w", "gating_noise_w"]
    yield _layer("H_x", "H_x", pooling[-1].name, params, **block, f_size=[1, 1], dim_in=rows)
    yield _layer("gating", "gating", "H_x", **block, f_size=[8, 8])
    yield _layer("Balance_loss", "Balance_loss", "gating", loss_weight=balance_weight, CM_num=n)
    pooled = []
    for i in range(1, n + 1):
        last, c = features, channels
        for letter, width in zip(string.ascii_lowercase, config.candidate_widths, strict=False):
            name = f"CM_{i}_{letter}"
            yield _convolution(name, last, [1, 1, c, width])
            yield _relu(name, f"{name}_conv")
            last, c = f"{name}_relu", width
        pooling = list(_pool(config, f"CM_{i}_", last, side))
        yield from pooling
        pooled.append(pooling[-1].name)
    rows = _pooled(config, config.candidate_widths[-1])
    block = {"CM_num": n, "topk": k, "hdim": rows}
    yield Layer("Fusion_out", "dagnn.CM_out", ["gating", *pooled], ["Fusion_out"], (), block)
    yield _batch_norm("fusion_bn", "Fusion_out", rows)
    if config.dropout_rate:
        rate = config.dropout_rate
        yield _layer("dropout", "DropOut", "fusion_bn", rate=rate, frozen=False)


def read_hyperparameters(config: ConfigDict, layers: Mapping[str, Layer]) -> None:
    """Sets what parameters alone don't tell: strides, Newton–Schulz steps, dropout.

    Raises:
      CheckpointError: naming the layer whose hyperparameter makes no sense.
    """
    stages = range(2, len(config.stage_widths) + 2)
    config.stage_strides = tuple(_integer(layers, f"conv{stage}_1a_conv", "stride") for stage in stages)
    roots = [n for n, layer in layers.items() if layer.type == "dagnn.OBJ_ConvNet_Cov_Sqrtm"]
    if roots:
        config.num_iters = _integer(layers, roots[0], "iterNum")
    if config.head in ("gmgap", "gmsop"):
        rate = _number(layers, "dropout", "rate") if "dropout" in layers else 0.0
        if not 0 <= rate < 1:
            raise CheckpointError(f"layer 'dropout': rate is {rate}; it must be in [0, 1)")
        config.dropout_rate = rate


def number_selected(layers: Mapping[str, Layer]) -> int:
    """K, as the layer `gating` says; 1 for a network without gate."""
    return _integer(layers, "gating", "topk") if "gating" in layers else 1


def balance_weight(layers: Mapping[str, Layer]) -> float:
    """α, as the layer `Balance_loss` says; 0 for a network without gate."""
    if "Balance_loss" not in layers:
        return 0.0
    return _number(layers, "Balance_loss", "loss_weight")


def _integer(layers: Mapping[str, Layer], name: str, key: str) -> int:
    value = _number(layers, name, key)
    if value != int(value) or not 1 <= value < 2**31:
        raise CheckpointError(f"layer {name!r}: {key} is {value}; it must be a positive integer")
    return int(value)


def _number(layers: Mapping[str, Layer], name: str, key: str) -> float:
    """The first number of a hyperparameter."""
    if name not in layers:
        raise CheckpointError(f"layer {name!r} is missing")
    if key not in layers[name].block:
        raise CheckpointError(f"layer {name!r} has no field {key!r} in its block")
    value = np.asarray(layers[name].block[key])
    if value.dtype.kind not in "biuf" or not value.size or not np.isfinite(value.flat[0]):
        raise CheckpointError(f"layer {name!r}: {key} is {value!r}, no number")
    return float(value.flat[0])


def size_mismatch(layers: Mapping[str, Layer], params: Mapping[str, np.ndarray]) -> str | None:
    """What a layer and one of its parameters say differently of their size; None if they agree."""
    for layer in layers.values():
        size = np.ravel(layer.block.get("size", layer.block.get("numChannels", []))).tolist()
        for name in (name for name in layer.params if size and name in params):
            shape = params[name].shape
            is_vector = layer.type == "dagnn.BatchNorm" or name.endswith("_b")
            due = size[-1:] if is_vector else size[: len(shape)]  # MATLAB drops axes of length 1
            if list(shape[: len(due)]) != due:
                due = tuple(int(n) for n in due)
                return f"layer {layer.name!r}: parameter {name!r} has shape {shape}, but its size is {due}"
    return None


def check(config: ConfigDict, layers: Mapping[str, Layer]) -> None:
    """Holds a checkpoint's layers against the network that the configuration computes.

    Raises:
      CheckpointError: naming the layer that is missing, unknown, joined to others or of other
        hyperparameters.
    """
    expected = {layer.name: layer for layer in network(config)}
    types = sorted({layer.type for layer in expected.values()})
    for layer in layers.values():
        if layer.type not in types:
            raise CheckpointError(
                f"layer {layer.name!r} is of type {layer.type!r}, which such a network hasn't; it"
                f" has {', '.join(types)}"
            )
        if layer.name not in expected and layer.type != "dagnn.Loss":
            raise CheckpointError(f"layer {layer.name!r} ({layer.type}) has no place in the network")
    ours, theirs = _producers(expected), _producers(layers)
    for name, layer in expected.items():
        if layer.type == "dagnn.Loss":
            continue
        if name not in layers:
            raise CheckpointError(f"layer {name!r} ({layer.type}) is missing")
        given = layers[name]
        for what, a, b in (
            ("type", given.type, layer.type),
            ("params", list(given.params), list(layer.params)),
            ("inputs", theirs(given.inputs), ours(layer.inputs)),
        ):
            if a != b:
                raise CheckpointError(f"layer {name!r}: {what} is {a}; the network needs {b}")
        _check_block(given, layer)


def _producers(layers: Mapping[str, Layer]) -> Any:
    """A function from a layer's inputs to the outputs of layers that they are, whatever their names."""
    source = {output: f"{layer.name}[{i}]" for layer in layers.values() for i, output in enumerate(layer.outputs)}
    return lambda inputs: [source.get(name, "the images") for name in inputs]


# hyperparameters that what is computed hangs on; sizes are those of the parameters
_DECISIVE = ("hasBias", "pad", "stride", "dilate", "epsilon", "leak", "method", "coef", "iterNum", "topk", "CM_num")


def _check_block(given: Layer, expected: Layer) -> None:
    for key in _DECISIVE:
        if key not in given.block or key not in expected.block:
            continue
        a, b = given.block[key], expected.block[key]
        values = [a] if isinstance(a, str) else np.asarray(a).ravel().tolist()
        due = b if isinstance(b, list) else [b]
        if not values or any(value not in due for value in values):
            raise CheckpointError(f"layer {given.name!r}: {key} is {a}; {b} is what gmsop_jax computes there")
