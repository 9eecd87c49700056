"""Converts the weights of PyTorch ResNets: torchvision's, and those of the authors of iSQRT-COV and DropCov.

    model_config, variables = from_torch(read_state("resnet50.safetensors"))
    logits, aux = create_model(model_config).apply(variables, images)

`images` are pixels of 0–255 with `MEAN_RGB` subtracted. These networks were trained on (x/255 − mean)/std. The
division is folded into the kernel of the first convolution, w/(255 · std), so the logits are the same.

Axes: filters are OIHW in PyTorch and HWIO here, matrices are [out, in] in PyTorch and [in, out] here. Instead of
the running variance, batch norm stores σ = √(var + ε) here.
"""

import argparse
import contextlib
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from gmsop_jax.config import ConfigDict, model_defaults
from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop.layers import Path, triangle_order
from gmsop_jax.interop.parameters import Tree, check_array, compare_names
from gmsop_jax.models import create_model
from gmsop_jax.models.network import BACKBONES

MEAN_RGB = (255 * 0.485, 255 * 0.456, 255 * 0.406)  # torchvision's normalisation of ImageNet
STD_RGB = (255 * 0.229, 255 * 0.224, 255 * 0.225)
IMAGE_SIZE = 224
_EPSILON = 1e-5  # of PyTorch's batch norm
_WRAPPERS = ("state_dict", "model")  # under which training scripts keep the weights
_PREFIXES = re.compile(r"^(module\.|model\.)+")  # of DataParallel, AveragedModel and Lightning
_COUNTERS = ("num_batches_tracked", "n_averaged")

_MODULES = {
    "stem": "conv1",
    "stem_bn": "bn1",
    "shortcut": "downsample.0",
    "shortcut_bn": "downsample.1",
    "projection1": "layer_reduce",
    "projection1_bn": "layer_reduce_bn",
    "classifier": "fc",
}
_ATTENTION = "eca_layer.conv.weight"  # of DropCov's channel attention
_LEAVES = {
    "attention": _ATTENTION,
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "sigma": "running_var",
}


def read_state(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays in a file of weights. No code in the file is executed.

    Args:
      path: a `.safetensors` file, read with the package `safetensors`, or, with any other extension, a file written by
        `torch.save`, read with `torch.load(…, weights_only=True)`. If the file contains a dictionary `state_dict` or
        `model`, its arrays are returned. `argparse.Namespace` objects beside the weights are ignored.

    Returns: name → array. Floating-point types of less than 32 bits are converted to float32.

    Raises:
      CheckpointError: if the file is missing, is damaged or contains anything but dense arrays, or if the package that
        reads it is not installed.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    state = _unwrap(_read_torch(path))
    if not isinstance(state, Mapping) or not state:
        raise CheckpointError(f"{path} does not map names to arrays; save the network's state_dict()")
    return {str(name): _to_numpy(f"{path}: {str(name)!r}", value) for name, value in state.items()}


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise CheckpointError(f"reading {path} needs safetensors: pip install safetensors") from error
    try:
        arrays = load_file(path)
    except AttributeError as error:  # the package looks the type up in NumPy, which has no fp8
        raise CheckpointError(f"{path}: NumPy lacks the type of an array ({error}); save it as float32") from error
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} can't be read as safetensors ({error}); copy or download it again") from error
    half = ("float16", "bfloat16")
    return {name: array.astype(np.float32) if array.dtype.name in half else array for name, array in arrays.items()}


def _read_torch(path: pathlib.Path) -> Any:
    _check_crcs(path)
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"reading {path} needs PyTorch: pip install torch, or save the weights as .safetensors with PyTorch"
        ) from error
    try:
        # A Namespace only stores attributes, so creating one executes no code from the file.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about formats that raise an error later
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises exceptions of many types on damaged files
        # PyTorch's own message is long and recommends executing the code in the file, so it is not repeated.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"contains an object of type {found[1]}" if found else "is damaged or contains more than arrays"
        raise CheckpointError(
            f"{path} {reason}. Save the network's state_dict() alone, with torch.save or as .safetensors"
        ) from error


def _check_crcs(path: pathlib.Path) -> None:
    """Raises CheckpointError if the CRC of an array is wrong, which PyTorch does not notice."""
    damaged = None
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:  # old files are not zip archives
        damaged = archive.testzip()
    if damaged:
        raise CheckpointError(f"{path} is damaged (the CRC of {damaged} is wrong); download it again")


def _to_numpy(name: str, tensor: Any) -> np.ndarray:
    if not hasattr(tensor, "is_floating_point"):
        raise CheckpointError(f"{name} is not an array; save the network's state_dict()")
    kind = str(tensor.dtype).removeprefix("torch.")
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on PyTorch's meta device and has no values; save the loaded network")
    if tensor.is_quantized:
        raise CheckpointError(f"{name} is quantised ({kind}); call dequantize() before saving it")
    if str(tensor.layout) != "torch.strided":
        raise CheckpointError(f"{name} is sparse ({tensor.layout}); call to_dense() before saving it")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} repeats its values by a stride of 0; call contiguous() before saving it")
    try:
        narrow = tensor.is_floating_point() and tensor.itemsize < 4
        return (tensor.float() if narrow else tensor).numpy(force=True)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise CheckpointError(f"{name} is of type {kind}, which NumPy lacks; save it as float32") from error


def _unwrap(state: Any) -> Any:
    for name in _WRAPPERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            return state[name]
    return state


def _plain_names(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Removes the prefixes of wrapper modules, and the counters of updates.

    Raises:
      CheckpointError: if two arrays then have the same name.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, value in state.items():
        plain = _PREFIXES.sub("", str(name).replace("_orig_mod.", ""))
        if plain in arrays:
            raise CheckpointError(
                f"two arrays are named {plain!r} after removing prefixes such as 'module.'; save only one of them"
            )
        if plain.rpartition(".")[2] not in _COUNTERS:
            arrays[plain] = np.asarray(value)
    return arrays


def from_torch(state: Mapping[str, Any], *, triangle: Literal["row", "column"] = "row") -> tuple[ConfigDict, Tree]:
    """Converts a `state_dict` to a model's configuration and variables.

    Blocks, groups, widths, classes and the head are inferred from names and shapes. With a `layer_reduce`, the head is
    that of DropCov if there is an `eca_layer`, and that of iSQRT-COV if not; otherwise, it is average pooling. Whatever
    the shapes don't determine is set as published: the strides (1, 2, 2, and 2 for average or 1 for second-order
    pooling) and five Newton–Schulz iterations. The prefixes `module.`, `model.` and `_orig_mod.` are removed, and
    counters of batches are ignored.

    Args:
      state: PyTorch's name → array, float32 or float64.
      triangle: the order of the classifier's columns in a second-order network: the upper triangle row by row, as in
        fast-MPN-COV, or column by column, as in the MATLAB code and other PyTorch versions.

    Returns: (`config.model`, variables with `params` and `batch_stats` as NumPy arrays of the same dtype).

    Raises:
      CheckpointError: if the network is not one of the ResNets in `models.network.BACKBONES`, if arrays are missing,
        unknown, or of a wrong shape or dtype, or if they contain NaN, infinite values or variances below 0.
      ValueError: if `triangle` is neither of the two.
    """
    if triangle not in ("row", "column"):
        raise ValueError(f"triangle must be 'row' or 'column', got {triangle!r}")
    arrays = _plain_names(_unwrap(state))
    config = infer_model(arrays)
    shapes = array_shapes(config)
    names = {path: _torch_name(path) for path in shapes}
    compare_names("array", names.values(), arrays)
    taken = {path: _convert(path, name, arrays[name], shapes[path]) for path, name in names.items()}
    if config.head in ("srsop", "dropcov") and triangle == "column":
        kernel = ("params", "head", "classifier", "kernel")
        taken[kernel] = taken[kernel][triangle_order(len(taken[kernel]))]
    return config, unflatten_dict(taken)


def infer_model(arrays: Mapping[str, np.ndarray]) -> ConfigDict:
    """Infers the configuration from names and shapes; see `from_torch`."""
    config = model_defaults()
    config.backbone = _backbone(arrays)
    config.stem = "large"
    config.batch_norm_rate = 0.1  # PyTorch's momentum
    config.num_classes = _shape(arrays, "fc.weight", 2)[0]
    second = "layer_reduce.weight" in arrays
    config.stage_strides = (1, 2, 2, 1) if second else (1, 2, 2, 2)
    config.head = "gap" if not second else "dropcov" if _ATTENTION in arrays else "srsop"
    if second:
        config.projection_widths = (_shape(arrays, "layer_reduce.weight", 4)[0],)
        config.projection_batch_norm = True
    if config.head == "srsop":
        config.num_iters = 5
    return config


def _backbone(arrays: Mapping[str, np.ndarray]) -> str:
    matches = [match for match in (re.match(r"layer(\d+)\.(\d{1,4})\.", name) for name in arrays) if match]
    if not matches:
        raise CheckpointError("no array is named layer1.0.conv1.weight; these are not a ResNet's weights")
    last = {match[1]: 0 for match in matches}  # stage → its last block
    for match in matches:
        last[match[1]] = max(last[match[1]], int(match[2]))
    convolutions = 3 if any(name.endswith(".conv3.weight") for name in arrays) else 2  # in each block
    depth = convolutions * sum(number + 1 for number in last.values()) + 2
    width, group_width = _shape(arrays, "layer1.0.conv2.weight", 4)[:2]
    groups = width // group_width
    name = f"resnet{depth}" if (groups, group_width) == (1, 64) else f"resnext{depth}_{groups}x{group_width}d"
    if name not in BACKBONES[1:]:
        raise CheckpointError(f"these are weights of {name}, which is not one of {', '.join(BACKBONES[1:])}")
    return name


def array_shapes(config: ConfigDict) -> dict[Path, tuple[int, ...]]:
    """Path → shape of every array in the model's variables."""
    images = jax.ShapeDtypeStruct((1, IMAGE_SIZE, IMAGE_SIZE, 3), jnp.float32)
    variables: Any = jax.eval_shape(create_model(config).init, jax.random.key(0), images)
    leaves: dict[Path, Any] = dict(flatten_dict(variables))
    return {path: leaf.shape for path, leaf in leaves.items()}


def _torch_name(path: Path) -> str:
    """Returns PyTorch's name of a leaf, such as ('params', 'backbone', 'stage1_block2', 'conv3_bn', 'scale')."""
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
    return (1, 1, *shape) if path[-1] == "attention" else shape


def _convert(path: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Checks PyTorch's array and converts it to the value of a leaf, computed in double precision."""
    array = check_array(name, array, _torch_shape(path, shape))
    if path[-1] == "sigma":
        if wrong := np.count_nonzero(array < 0):
            raise CheckpointError(f"{name!r} has {wrong} of {array.size} variances below 0; the file is damaged")
        return np.sqrt(array.astype(np.float64) + _EPSILON).astype(array.dtype)
    if path[-1] != "kernel":
        return array.reshape(shape)
    if path[1] == "head":
        return array.reshape(array.shape[:2]).T
    if path[2] == "stem":
        array = (array / np.reshape(STD_RGB, (1, 3, 1, 1))).astype(array.dtype)
    return array.transpose(2, 3, 1, 0)


def _shape(arrays: Mapping[str, np.ndarray], name: str, rank: int) -> tuple[int, ...]:
    if name not in arrays:
        raise CheckpointError(f"array {name!r} is missing; give the weights of one whole network")
    shape = arrays[name].shape
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"array {name!r} has shape {shape}; it should have {rank} axes")
    return shape
