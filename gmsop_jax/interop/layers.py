"""The authors' networks as MatConvNet's DagNN stores them: layers, and the parameters of each layer.

`network` lists the layers of a configuration. It is the only description of the authors' networks: it gives the names
and shapes of their parameters and their paths in a model's variables. `layer_checks` compares the layers of a
checkpoint with it.
"""

import functools
import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gmsop_jax.config import ConfigDict
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
      candidate: the index of its candidate in a stacked leaf, from 0; None if the leaf is not stacked.
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
        """The shape of each leaf, or of a candidate's part of it; 1×1 filters of the head are stored as matrices."""
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
      image_side: the height and width of the images, from which the window of average pooling is computed.
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
