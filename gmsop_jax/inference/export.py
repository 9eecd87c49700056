"""Exports trained networks to StableHLO and ONNX, which run without this package, and to a folder for model hubs.

After writing, each artefact is read back and compared with the original on random images.
"""

import dataclasses
import json
import logging
import os
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

import gmsop_jax
from gmsop_jax import config as configs
from gmsop_jax.errors import UserError, reason
from gmsop_jax.files import read_bytes, write_atomic
from gmsop_jax.inference.model_card import model_card
from gmsop_jax.inference.predict import make_predict_step
from gmsop_jax.models import Network, count_parameters, create_model
from gmsop_jax.training import exported
from gmsop_jax.training.layout import DIRECTORY
from gmsop_jax.training.restore import Info

PLATFORMS = ("cpu", "cuda", "tpu")
STABLEHLO_FILE, ONNX_FILE, JSON_FILE = "model.stablehlo", "model.onnx", "model.json"
OUTPUTS = ("logits", "probabilities", "gate_weights", "features")
_BATCHES = (1, 3)  # sizes of the random batches that are compared
_TOLERANCE = 1e-3  # relative to the largest output; compilers order sums differently

Outputs = Mapping[str, jax.Array]


class ExportError(UserError):
    """An artefact can't be written, or its outputs differ from those of the original."""


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
      path: a trained network, as in `gmsop_jax.load`.
      output: a folder, created if missing.

    Raises:
      CheckpointError, ConfigError: if the network can't be loaded, as in `gmsop_jax.load`.
      ExportError: if a package is missing, if the folder can't be written or is a working directory, or if the outputs
        of the artefact differ.
    """
    _need("flatbuffers")
    model, variables, info = gmsop_jax.load(path)
    # The best way to compute the candidates depends on the platform on which the artefact will run.
    on_cpu, elsewhere = (_make_step(_with_dispatch(info, dispatch), info) for dispatch in ("loop", "gather"))

    def predict(images: jax.Array) -> dict[str, jax.Array]:
        return jax.lax.platform_dependent(variables, images, cpu=on_cpu, default=elsewhere)

    artefact = jax.export.export(jax.jit(predict), platforms=PLATFORMS)(_any_images(info))
    description = _describe(info, variables) | {"platforms": list(PLATFORMS)}
    files = _write(output, {STABLEHLO_FILE: artefact.serialize(), JSON_FILE: _json(description)})
    restored: Any = jax.export.deserialize(bytearray(read_bytes(files[0])))
    return Exported(files, _compare(_run(model, variables, info), restored.call, info))


def export_onnx(path: str | os.PathLike[str], output: str | os.PathLike[str]) -> Exported:
    """Writes `model.onnx`, with the weights and the preprocessing, and `model.json`.

    The input `images` and the outputs are those of `export_stablehlo`. The comparison runs in ONNX Runtime.

    Args: as in `export_stablehlo`.

    Raises: as `export_stablehlo`, and
      ExportError: if jax2onnx can't convert the network, for example one with the head `mpncov`, because ONNX has no
        eigendecomposition.
    """
    _need("jax2onnx", "pip install 'gmsop-jax[onnx]' and pip install --no-deps jax2onnx")
    _need("onnxruntime", "pip install 'gmsop-jax[onnx]'")
    import onnxruntime  # pyright: ignore[reportMissingImports]
    from jax2onnx import to_onnx  # pyright: ignore[reportMissingImports]

    model, variables, info = gmsop_jax.load(path)
    step = _make_step(_with_dispatch(info, "gather"), info)

    def predict(images: jax.Array) -> tuple[jax.Array, ...]:
        outputs = step(variables, images)
        return tuple(outputs[name] for name in OUTPUTS)

    logger = logging.getLogger("onnx_ir")  # its warnings and those of jax2onnx are not about the network
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            proto = to_onnx(predict, [_any_images(info)], input_names=["images"], output_names=list(OUTPUTS))
    except Exception as error:  # jax2onnx has no error class of its own
        first_line, *_ = str(error).splitlines() or [""]
        raise ExportError(
            f"jax2onnx can't convert this network with the head {info.config.model.head!r}"
            f" ({type(error).__name__}: {first_line}); use --format stablehlo"
        ) from error
    finally:
        logger.setLevel(level)
    files = _write(output, {ONNX_FILE: proto.SerializeToString(), JSON_FILE: _json(_describe(info, variables))})
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # errors; the warnings are about constants that the converter leaves behind
    session = onnxruntime.InferenceSession(str(files[0]), quiet, providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> Outputs:
        return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"images": images}), strict=True))

    return Exported(files, _compare(_run(model, variables, info), run, info))


def export_safetensors(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, license_name: str = "unknown"
) -> Exported:
    """Writes a folder in the layout of model hubs, which `gmsop_jax.load` can load like a run.

    `model.safetensors` contains the parameters and batch statistics, named by their paths in the tree of variables,
    joined by dots: `params.backbone.stem.kernel`. `config.json` contains the configuration of the run, its classes,
    mean colour, image size and metrics, and `README.md` is the model card.

    Args:
      path, output: as in `export_stablehlo`.
      license_name: the licence of the weights, for the model card, as the hub names it (`mit`, `cc-by-4.0`, …).

    Raises: as `export_stablehlo`.
    """
    _need("safetensors")
    from safetensors.flax import save

    model, variables, info = gmsop_jax.load(path)
    arrays = exported.flatten(variables)
    number = count_parameters(variables["params"])
    files = _write(
        output,
        {
            exported.WEIGHTS: save(arrays, metadata={"format": "flax", "gmsop_jax": gmsop_jax.__version__}),
            exported.DESCRIPTION: _json(exported.describe(info.config, info.inputs, info.step, info.metrics)),
            exported.CARD: model_card(info, number, license_name=license_name).encode(),
        },
    )
    return Exported(files, _compare(_run(model, variables, info), _run(*load_safetensors(output), info), info))


def load_safetensors(folder: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Returns `(model, variables)` of a network that `export_safetensors` wrote; raises as `gmsop_jax.load`."""
    model, variables, _ = gmsop_jax.load(folder)
    return model, variables


def _describe(info: Info, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `model.json`."""
    return {
        "made_by": f"gmsop_jax {gmsop_jax.__version__}",
        "step": info.step,
        "metrics": info.metrics,
        **dataclasses.asdict(info.inputs),
        "model": info.config.model.to_dict(),
        "shapes": {name: list(leaf.shape) for name, leaf in exported.flatten(variables).items()},
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _write(output: str | os.PathLike[str], contents: Mapping[str, bytes | bytearray]) -> tuple[pathlib.Path, ...]:
    folder = pathlib.Path(output)
    if (folder / DIRECTORY).exists():
        raise ExportError(f"{folder} is the working directory of a run; give another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            write_atomic(folder / name, bytes(data))
    except OSError as error:
        raise ExportError(f"can't write to {folder} ({reason(error)}); give another --output") from error
    return tuple(folder / name for name in contents)


def _any_images(info: Info) -> jax.ShapeDtypeStruct:
    """A batch of any number of images."""
    return jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), *info.inputs.image_size, 3), jnp.uint8)


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
    """Returns the largest difference of each output on random images. Raises ExportError if one is too large."""
    rng = np.random.default_rng(0)
    differences: dict[str, float] = {}
    for size in _BATCHES:
        images = rng.integers(0, 256, (size, *info.inputs.image_size, 3), np.uint8)
        ours, theirs = jax.device_get((dict(original(images)), dict(copy(images))))
        for name, value in ours.items():
            difference = float(np.abs(value - theirs[name]).max())
            if not difference <= _TOLERANCE * max(float(np.abs(value).max()), 1e-6):
                raise ExportError(
                    f"the {name} of the exported network differ by {difference:.3g} from the original; don't use it"
                )
            differences[name] = max(difference, differences.get(name, 0.0))
    return differences


def _need(package: str, remedy: str = "pip install 'gmsop-jax[export]'") -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise ExportError(f"this export needs {package}: {remedy}") from error
