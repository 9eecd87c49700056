"""Weights of PyTorch's bottleneck ResNets: torchvision's, and those of iSQRT-COV's authors.

    model_config, variables = from_torch(read_state("resnet50.safetensors"))
    logits, aux = create_model(model_config).apply(variables, images)

`images` are pixels of 0–255 with `MEAN_RGB` subtracted. These networks were trained on (x/255 − mean)/std;
the division is in the first convolution's kernel here, w/(255 · std), so that the logits are the same.

Axes: filters are OIHW there and HWIO here, matrices [out, in] there and [in, out] here. Batch norm's
running variance there is σ = √(var + ε) here.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gmsop_jax.config import ConfigDict, model_defaults
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop.parameters import Path, Tree, compare_names, triangle_order
from gmsop_jax.models import create_model
from gmsop_jax.models.network import BACKBONES

MEAN_RGB = (255 * 0.485, 255 * 0.456, 255 * 0.406)  # what ImageNet's pixels are normalised with there
STD_RGB = (255 * 0.229, 255 * 0.224, 255 * 0.225)
IMAGE_SIZE = 224
_EPSILON = 1e-5  # of PyTorch's batch norm
_WRAPPERS = ("state_dict", "model")  # under which training scripts keep the weights

_MODULES = {
    "stem": "conv1",
    "stem_bn": "bn1",
    "shortcut": "downsample.0",
    "shortcut_bn": "downsample.1",
    "projection1": "layer_reduce",
    "projection1_bn": "layer_reduce_bn",
    "classifier": "fc",
}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "sigma": "running_var"}


def read_state(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays in a file of weights, by name; nothing in the file is executed.

    Args:
      path: `.safetensors`, read with the package of that name; any other ending is a file that
        `torch.save` wrote, read with `torch.load(…, weights_only=True)`. A dictionary `state_dict` or
        `model` in it is taken alone.

    Returns: arrays; half precision comes as float32.

    Raises:
      CheckpointError: if the file is missing, damaged or holds anything but arrays, or the package that
        reads it is not installed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = _unwrap(_read_torch(path))
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} holds no arrays by name; save what the network's state_dict() gives")
    return {str(name): _tensor(path, name, value) for name, value in state.items()}


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        return {name: _widen(array) for name, array in load_file(path).items()}
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors ({error}); copy or download it again") from error


def _read_torch(path: pathlib.Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"reading {path} needs PyTorch: pip install torch, or save the weights as .safetensors where PyTorch is"
        ) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and foreign pickles raise whatever their bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} is damaged or holds more than arrays ({reason}); more would mean to run code from the file, which"
            " is not done. Save what the network's state_dict() gives, with torch.save or as .safetensors"
        ) from error


def _tensor(path: pathlib.Path, name: Any, value: Any) -> np.ndarray:
    if not hasattr(value, "is_floating_point"):
        raise CheckpointError(f"{path}: {name!r} is no array; save what the network's state_dict() gives")
    value = value.detach()
    return (value.float() if value.is_floating_point() and value.itemsize < 4 else value).numpy()


def _widen(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.itemsize == 2 and array.dtype.kind in "fV" else array


def _unwrap(state: Any) -> Any:
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            return state[name]
    return state


def from_torch(state: Mapping[str, Any], *, triangle: Literal["row", "column"] = "row") -> tuple[ConfigDict, Tree]:
    """A model's configuration and variables from a `state_dict`.

    Blocks, groups, widths, classes and the head are read off names and shapes: average pooling, as in
    torchvision, or iSQRT-COV's head where there is a `layer_reduce`. What shapes don't tell is as
    published: strides (1, 2, 2, and 2 for average or 1 for second-order pooling), five Newton–Schulz
    steps. A prefix `module.` and what counts batches are ignored.

    Args:
      state: arrays, float32 or float64, by PyTorch's names.
      triangle: order of the classifier's columns in a second-order network: the upper triangle row by
        row, as fast-MPN-COV, or column by column, as MATLAB's code and other versions in PyTorch.

    Returns: (`config.model`, variables with `params` and `batch_stats` as NumPy arrays of the dtype
      that came in).

    Raises:
      CheckpointError: if the network is none of `config.model.backbone`; naming the arrays that are
        missing, unknown or of another shape or dtype.
      ValueError: if `triangle` is something else.
    """
    if triangle not in ("row", "column"):
        raise ValueError(f"triangle must be 'row' or 'column', got {triangle!r}")
    # DataParallel puts a prefix before every name
    arrays = {str(name).removeprefix("module."): np.asarray(value) for name, value in _unwrap(state).items()}
    arrays = {name: array for name, array in arrays.items() if not name.endswith("num_batches_tracked")}
    config = infer_model(arrays)
    shapes = array_shapes(config)
    names = {path: _torch_name(path) for path in shapes}
    compare_names("array", names.values(), arrays)
    _check(arrays, {name: _torch_shape(path, shapes[path]) for path, name in names.items()})
    taken = {path: _convert(path, arrays[name]) for path, name in names.items()}
    if config.head == "srsop" and triangle == "column":
        kernel = ("params", "head", "classifier", "kernel")
        taken[kernel] = taken[kernel][triangle_order(len(taken[kernel]))]
    return config, unflatten_dict(taken)


def infer_model(arrays: Mapping[str, np.ndarray]) -> ConfigDict:
    """The configuration that names and shapes tell; see `from_torch`."""
    config = model_defaults()
    config.backbone = _backbone(arrays)
    config.stem = "large"
    config.batch_norm_rate = 0.1  # PyTorch's momentum
    config.num_classes = _shape(arrays, "fc.weight", 2)[0]
    second = "layer_reduce.weight" in arrays
    config.stage_strides = (1, 2, 2, 1) if second else (1, 2, 2, 2)
    config.head = "srsop" if second else "gap"
    if second:
        config.projection_widths = (_shape(arrays, "layer_reduce.weight", 4)[0],)
        config.projection_batch_norm = True
        config.num_iters = 5
    return config


def _backbone(arrays: Mapping[str, np.ndarray]) -> str:
    matches = [match for match in (re.match(r"layer(\d+)\.(\d{1,4})\.", name) for name in arrays) if match]
    if not matches:
        raise CheckpointError("no array is named layer1.0.conv1.weight; these are not a ResNet's weights")
    if "layer1.0.conv3.weight" not in arrays:
        raise CheckpointError("array 'layer1.0.conv3.weight' is missing; blocks of two convolutions are not imported")
    last = {match[1]: 0 for match in matches}  # stage → its last block
    for match in matches:
        last[match[1]] = max(last[match[1]], int(match[2]))
    depth = 3 * sum(number + 1 for number in last.values()) + 2
    width, group_width = _shape(arrays, "layer1.0.conv2.weight", 4)[:2]
    groups = width // group_width
    name = f"resnet{depth}" if (groups, group_width) == (1, 64) else f"resnext{depth}_{groups}x{group_width}d"
    if name not in BACKBONES[1:]:
        raise CheckpointError(
            f"a ResNet of {depth} layers with {groups} groups of {group_width} channels is none of"
            f" {', '.join(BACKBONES[1:])}"
        )
    return name


def array_shapes(config: ConfigDict) -> dict[Path, tuple[int, ...]]:
    """Path → shape of every array in the model's variables."""
    images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    variables: Any = jax.eval_shape(create_model(config).init, jax.random.key(0), images)
    leaves: dict[Path, Any] = dict(flatten_dict(variables))
    return {path: leaf.shape for path, leaf in leaves.items()}


def _torch_name(path: Path) -> str:
    """The name of a leaf, as of ('params', 'backbone', 'stage1_block2', 'conv3_bn', 'scale')."""
    *modules, leaf = path[2:]
    return ".".join([*map(_module, modules), _LEAVES[leaf]])


def _module(name: str) -> str:
    if match := re.fullmatch(r"stage(\d+)_block(\d+)", name):
        return f"layer{match[1]}.{int(match[2]) - 1}"
    if match := re.fullmatch(r"conv(\d+)_bn", name):
        return f"bn{match[1]}"
    return _MODULES.get(name, name)


def _torch_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        height, width, rows, columns = shape
        return columns, rows, height, width
    if len(shape) == 2:
        return (*shape[::-1], 1, 1) if path[2].startswith("projection") else shape[::-1]
    return shape


def _convert(path: Path, array: np.ndarray) -> np.ndarray:
    """The leaf's value; what is computed is computed in double precision."""
    if path[-1] == "sigma":
        return np.sqrt(array.astype(np.float64) + _EPSILON).astype(array.dtype)
    if path[-1] != "kernel":
        return array
    if path[1] == "head":
        return array.reshape(array.shape[:2]).T
    if path[2] == "stem":
        array = (array / np.reshape(STD_RGB, (1, 3, 1, 1))).astype(array.dtype)
    return array.transpose(2, 3, 1, 0)


def _shape(arrays: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    if name not in arrays:
        raise CheckpointError(f"array {name!r} is missing")
    shape = arrays[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"array {name!r} has shape {shape}; it should have {rank} axes")
    return shape


def _check(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError for the first array of another shape or dtype, with the number of them."""
    faults = []
    for name, shape in shapes.items():
        array = arrays[name]
        if array.shape != shape:
            faults.append(f"array {name!r} has shape {array.shape}; the others' shapes need {shape}")
        elif array.dtype not in (np.float32, np.float64):
            faults.append(f"array {name!r} is of type {array.dtype}; float32 or float64 is needed")
    if faults:
        raise CheckpointError(faults[0] + (f" (and {len(faults) - 1} more like it)" if faults[1:] else ""))
