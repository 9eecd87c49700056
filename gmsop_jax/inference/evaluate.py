"""Evaluates a trained network on a whole split."""

import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from gmsop_jax.config import ConfigDict
from gmsop_jax.data.manifest import Manifest
from gmsop_jax.errors import DataError
from gmsop_jax.files import write_json
from gmsop_jax.models import create_model
from gmsop_jax.training import exported, parallel
from gmsop_jax.training.evaluation import COMPILING, create_evaluation, resolve, verify_shards
from gmsop_jax.training.inputs import Inputs, fingerprint
from gmsop_jax.training.metrics import error_text
from gmsop_jax.training.processes import check_same, ending_together
from gmsop_jax.training.restore import checksum, folder_of, load_variables, read_description
from gmsop_jax.training.workdir import check_same_config


def run(config: ConfigDict, path: str | pathlib.Path) -> None:
    """The command `gmsop evaluate`: prints the result, then writes `evaluation-<split>.json` beside the checkpoints.

    If that file can't be written, as in a read-only directory, a warning says so. The result for a network on the
    Hugging Face Hub is only printed.

    Args, Raises: as in `evaluate_checkpoint`.
    """
    result = evaluate_checkpoint(config, path)
    errors = error_text(result, result["num_classes"])
    print(f"step {result['step']}, {config.eval.split}: {errors}, loss {result['loss']:.4f}", flush=True)
    if jax.process_index() == 0:
        if exported.is_on_hub(path):
            where = f"{path} is a network on the Hugging Face Hub"
            print(f"{where}, so the result is not written to a file", file=sys.stderr)
            return
        file = folder_of(path) / f"evaluation-{config.eval.split}.json"
        try:
            write_json(file, result)
        except OSError as error:
            print(f"warning: the result can't be written to {file} ({error.strerror})", file=sys.stderr)


def _differences(inputs: Inputs, classes: Sequence[str], size: tuple[int, int]) -> Iterator[str]:
    """Yields warnings about differences from the images that the network was trained on."""
    unnamed = inputs.classes == tuple(map(str, range(len(classes))))  # as in imported weights
    pairs = zip(inputs.classes, classes, strict=True)
    other = [i for i, (trained, given) in enumerate(pairs) if trained != given and not unnamed]
    if other:
        i = other[0]
        yield (
            f"warning: class {i} of the data set is {classes[i]!r}, but class {i} of the network is"
            f" {inputs.classes[i]!r}; {len(other)} of {len(classes)} classes differ"
        )
    if inputs.splits and size != inputs.image_size:  # an imported network has no splits, and its image size is assumed
        given, trained = ("×".join(map(str, sides)) for sides in (size, inputs.image_size))
        yield f"warning: the images have {given} pixels, but those that the network was trained on have {trained}"


@ending_together()
def evaluate_checkpoint(config: ConfigDict, path: str | pathlib.Path) -> dict[str, Any]:
    """Evaluates a checkpoint on `config.eval.split`.

    The shards of the training split need not exist. The mean colour of the images that the network was trained on
    (`inputs.json`) is subtracted. A warning is printed if the classes or the size of the images differ from those in
    training. With `config.data.verify`, and unless damaged records are skipped, the checksums of the split's shards are
    verified first, as at the start of training: each process verifies a part. Several processes must evaluate the same
    network on the same data.

    Args:
      config: the configuration; its model must fit the checkpoint.
      path: a working directory, the folder of one step in it, or an exported network, as in `restore.load`. In a
        working directory, the last checkpoint is evaluated.

    Returns: `step`, `num_classes`, `loss` (nats), `top1_error`, `top5_error` (percent), and `candidate_use` (mean gate
      weights).

    Raises:
      CheckpointError: if there is no checkpoint, or it doesn't fit the model.
      DataError: if the data set is missing, is damaged, or has another number of classes.
      FileAccessError: if a file can't be read.
      ConfigError: if the processes have different networks, data sets or configurations, or if a batch doesn't split
        evenly over the devices.
    """
    check_same_config(config)
    _, inputs = read_description(path)
    checked = [config.eval.split] if config.data.on_corrupt == "stop" else []
    manifest = Manifest.load(config.data.dir, splits=checked)
    size = manifest.image_size(config.eval.split, config.data.image_size)
    data = Inputs(manifest.name, manifest.classes, inputs.mean_rgb, size, fingerprint(manifest))
    check_same(
        {
            "the network": checksum(path),
            **{f"the network's {name}": value for name, value in inputs.properties().items()},
            **{f"the data set's {name}": value for name, value in data.properties().items()},
        }
    )
    verify_shards(config.data, manifest, checked)
    if manifest.num_classes != len(inputs.classes):
        raise DataError(
            f"the network in {path} has {len(inputs.classes)} classes, but the data set {config.data.dir} has"
            f" {manifest.num_classes}; give a data set with the same classes"
        )
    config = resolve(config, manifest)
    mesh = parallel.create_mesh()
    evaluate = create_evaluation(config, manifest, inputs.mean_rgb, mesh)
    variables, step, _ = load_variables(create_model(config.model), (*size, 3), path, parallel.replicated(mesh))
    if jax.process_index() == 0:
        print(*_differences(inputs, manifest.classes, size), COMPILING, sep="\n", file=sys.stderr)
    return {"step": step, "num_classes": manifest.num_classes, **evaluate(variables)}
