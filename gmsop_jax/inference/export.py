"""Exports trained networks: StableHLO that runs without this package, and safetensors.

After writing, each artefact is read back and compared with the original on random images.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

import gmsop_jax
from gmsop_jax import config as configs
from gmsop_jax.errors import CheckpointError, UserError
from gmsop_jax.files import write_atomic, write_json
from gmsop_jax.inference.predict import make_predict_step
from gmsop_jax.models import Network, create_model
from gmsop_jax.training.restore import Info

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO_FILE, SAFETENSORS_FILE, JSON_FILE = "model.stablehlo", "model.safetensors", "model.json"
_BATCHES = (1, 3)  # sizes of the random batches for the comparison
_TOLERANCE = 1e-3  # relative to the largest output; compilers order sums differently

Outputs = Mapping[str, jax.Array]


class ExportError(UserError):
    """An artefact can't be written, or its outputs differ from the original's."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
      files: the paths of the files that were written.
      differences: for each output (`logits`, `probabilities`, `gate_weights`, `features`), the largest
        absolute difference from the original on random images.
    """

    files: tuple[pathlib.Path, ...]
    differences: Mapping[str, float]


def export_stablehlo(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Exported:
    """Writes `model.stablehlo`, a serialised `jax.export` artefact, and `model.json`.

    The artefact contains the weights and the preprocessing. It takes images, uint8 [b, h, w, 3] (RGB, of the size
    used in training, with any b), and returns a dictionary of `logits` and `probabilities` [b, classes],
    `gate_weights` [b, n] and `features` [b, f], on CPU, CUDA and TPU. `docs/export.md` shows how to run it with JAX
    alone.

    Args:
      path: a working directory, or the folder of one step in it.
      output: a folder, created if missing.

    Raises:
      CheckpointError: if there is no such checkpoint.
      ExportError: if the folder can't be written, or the outputs of the artefact differ.
    """
    _need("flatbuffers")
    model, variables, info = gmsop_jax.load(path)
    # The best way to compute the candidates depends on the platform on which the artefact will run.
    on_cpu, elsewhere = (_make_step(_with_dispatch(info, dispatch), info) for dispatch in ("loop", "gather"))

    def predict(images: jax.Array) -> dict[str, jax.Array]:
        return jax.lax.platform_dependent(variables, images, cpu=on_cpu, default=elsewhere)

    batch = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((*batch, *info.inputs.image_size, 3), jnp.uint8)
    artefact = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(images)
    description = _describe(info, variables) | {"platforms": list(PLATFORMS)}
    files = _write(output, description, STABLEHLO_FILE, artefact.serialize())
    restored: Any = jax.export.deserialize(bytearray(files[0].read_bytes()))
    return Exported(files, _compare(_run(model, variables, info), restored.call, info))


def export_safetensors(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Exported:
    """Writes `model.safetensors`, with parameters and moments, and `model.json`, with the architecture.

    Arrays are named by their paths in the tree of variables, joined by dots: `params.backbone.stem.kernel`.

    Args, Raises: as in `export_stablehlo`.
    """
    _need("safetensors")
    from safetensors.flax import save

    model, variables, info = gmsop_jax.load(path)
    data = save(_flatten(variables), metadata={"format": "flax", "gmsop_jax": gmsop_jax.__version__})
    files = _write(output, _describe(info, variables), SAFETENSORS_FILE, data)
    return Exported(files, _compare(_run(model, variables, info), _run(*load_safetensors(output), info), info))


def load_safetensors(folder: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Loads a network that `export_safetensors` wrote.

    Returns: `(model, variables)`.

    Raises:
      CheckpointError: if a file is missing or damaged, or the two don't match.
    """
    _need("safetensors")
    from safetensors.flax import load_file

    folder = pathlib.Path(folder)
    try:
        description = json.loads((folder / JSON_FILE).read_text("utf-8"))
        model = description["model"]
        config = configs.from_json(json.dumps({"model": model, "compute_dtype": model["compute_dtype"]}))
        shapes = {name: tuple(shape) for name, shape in description["shapes"].items()}
        arrays = load_file(folder / SAFETENSORS_FILE)
    except Exception as error:  # safetensors has an error class of its own, of no common base
        raise CheckpointError(f"{folder} holds no readable {JSON_FILE} and {SAFETENSORS_FILE} ({error})") from error
    if {name: array.shape for name, array in arrays.items()} != shapes:
        raise CheckpointError(
            f"{folder}: {SAFETENSORS_FILE} and {JSON_FILE} list different arrays; export the network again"
        )
    return create_model(config.model), {"batch_stats": {}, **unflatten_dict(arrays, sep=".")}


def _flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(dict(variables), sep=".")  # pyright: ignore[reportReturnType]  # never keyed by tuples


def _describe(info: Info, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `model.json`."""
    return {
        "made_by": f"gmsop_jax {gmsop_jax.__version__}",
        "step": info.step,
        "metrics": info.metrics,
        **dataclasses.asdict(info.inputs),
        "model": info.config.model.to_dict(),
        "shapes": {name: list(leaf.shape) for name, leaf in _flatten(variables).items()},
    }


def _write(
    output: str | os.PathLike[str], description: Mapping[str, Any], name: str, data: bytes | bytearray
) -> tuple[pathlib.Path, pathlib.Path]:
    folder = pathlib.Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / name, bytes(data))
        write_json(folder / JSON_FILE, description)
    except OSError as error:
        raise ExportError(f"can't write to {folder} ({error.strerror or error}); name another --output") from error
    return folder / name, folder / JSON_FILE


def _with_dispatch(info: Info, dispatch: str) -> Network:
    model = configs.ConfigDict(info.config.model.to_dict())
    model.dispatch = dispatch
    return create_model(model)


def _make_step(model: Network, info: Info) -> Callable[..., dict[str, jax.Array]]:
    return make_predict_step(model, mean_rgb=info.inputs.mean_rgb, flip_average=info.config.eval.flip_average)


def _run(model: Network, variables: Mapping[str, Any], info: Info) -> Callable[[np.ndarray], Outputs]:
    step = jax.jit(_make_step(model, info))
    return lambda images: step(variables, images)


def _compare(
    original: Callable[[np.ndarray], Outputs], copy: Callable[[np.ndarray], Outputs], info: Info
) -> dict[str, float]:
    """Returns the largest difference of each output on random images; ExportError if one is too large."""
    rng = np.random.default_rng(0)
    differences: dict[str, float] = {}
    for size in _BATCHES:
        images = rng.integers(0, 256, (size, *info.inputs.image_size, 3), np.uint8)
        ours, theirs = jax.device_get((dict(original(images)), dict(copy(images))))
        for name, value in ours.items():
            difference = float(np.abs(value - theirs[name]).max())
            if not difference <= _TOLERANCE * max(float(np.abs(value).max()), 1e-6):
                raise ExportError(f"the copy's {name} differ by {difference:.3g} from the original's; don't use it")
            differences[name] = max(difference, differences.get(name, 0.0))
    return differences


def _need(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ExportError(f"this export needs {package}: pip install 'gmsop-jax[export]'") from error
