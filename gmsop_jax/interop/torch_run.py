"""Creates a working directory from PyTorch weights, for evaluation, prediction and fine-tuning."""

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flax.traverse_util import flatten_dict

from gmsop_jax import config as configs
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import CheckpointError, ConfigError
from gmsop_jax.interop.imported_run import initial_state, without_checkpoints, write_workdir
from gmsop_jax.interop.torch_weights import IMAGE_SIZE, MEAN_RGB, array_shapes, from_torch, read_state
from gmsop_jax.models import count_parameters
from gmsop_jax.training.inputs import Inputs

_RESIZE = 256  # length of the shorter side before the centre crop, as in PyTorch's evaluation of these networks


@dataclass(frozen=True)
class ImportedWeights:
    """The result of an import: the configuration of the run, and the number of trained parameters."""

    config: ConfigDict
    num_parameters: int


def import_weights(
    path: str | pathlib.Path,
    output: str | pathlib.Path,
    overrides: Sequence[str] = (),
    *,
    classes: str | pathlib.Path | None = None,
    triangle: Literal["row", "column"] = "row",
) -> ImportedWeights:
    """Creates a working directory for `gmsop evaluate`, `gmsop predict` and `config.train.init_from`.

    The run is at step 0 and has the default training recipe. For evaluation, the shorter side of an image is resized to
    256 pixels, and the centre is cropped to 224×224. Batch norm's running statistics are updated at a rate of 0.1 per
    step. Arrays are converted to float32.

    Args:
      path: a file of weights; see `torch_weights.read_state`.
      output: a folder without checkpoints, created if missing. It receives `config.json`, `config.py` (for
        `--config`), `inputs.json` and one checkpoint.
      overrides: `field=value` settings of the configuration, such as `data.dir=data/imagenet`.
      classes: a text file with the name of one class on each line, in the order of the logits; by default the
        classes are named 0, 1, ….
      triangle: the order of a second-order classifier's columns; see `torch_weights.from_torch`.

    Raises:
      CheckpointError: if the weights can't be imported (see `read_state` and `from_torch`), `output` has
        checkpoints, or `classes` is missing or has a wrong number of names.
      ConfigError: if an override is not valid, or changes the shape of an array of the network.
    """
    output = without_checkpoints(output)
    state = read_state(path)
    try:
        model_config, variables = from_torch(state, triangle=triangle)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    names = _class_names(classes, model_config.num_classes)
    config = run_config(model_config)
    configs.apply_overrides(config, overrides)
    _check_network(config, variables)
    side = config.data.image_size or IMAGE_SIZE
    inputs = Inputs("unknown", names, MEAN_RGB, (side, side))
    write_workdir(output, config, initial_state(config, variables), inputs, epoch=0)
    return ImportedWeights(config, count_parameters(variables["params"]))


def run_config(model_config: ConfigDict) -> ConfigDict:
    """Returns the configuration of a run with an imported network."""
    config = configs.default_config()
    config.model.update(model_config)
    config.data.image_size, config.eval.resize = IMAGE_SIZE, _RESIZE
    return config


def _class_names(file: str | pathlib.Path | None, number: int) -> tuple[str, ...]:
    if file is None:
        return tuple(map(str, range(number)))
    try:
        names = pathlib.Path(file).read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the names of the classes can't be read from {file} ({error})") from error
    names = tuple(name.strip() for name in names if name.strip())
    if len(names) != number:
        raise CheckpointError(f"{file} lists {len(names)} classes, but the network has {number}")
    return names


def _check_network(config: ConfigDict, variables: Mapping[str, Any]) -> None:
    """Raises ConfigError if overrides changed an array's shape; strides, iterations and precision may change."""
    leaves: dict[Any, Any] = dict(flatten_dict(variables))
    if array_shapes(config.model) != {path: leaf.shape for path, leaf in leaves.items()}:
        raise ConfigError(
            "an override of config.model changes the shapes of the network in the file. Import the file without it, and"
            " start a run of the changed network with --config.train.init_from"
        )
