"""Predictions as text (table, JSON, CSV) and as arrays (npz), written while they come."""

import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from gmsop_jax.errors import ConfigError, DataError
from gmsop_jax.inference.predict import Prediction, Predictor, Unreadable, list_files
from gmsop_jax.training.restore import Info

Results = Iterable[Prediction | Unreadable]


def run(
    checkpoint: str,
    inputs: Sequence[str],
    *,
    top: int = 5,
    features: str | None = None,
    output_format: str = "table",
    batch_size: int = 256,
) -> int:
    """Predicts and prints: what `--mode predict` does.

    Args:
      checkpoint: a working directory or one step's folder in it.
      inputs: images, folders, lists.
      top: most probable classes told of each image.
      features: an .npz file to write.
      output_format: one of `FORMATS`.
      batch_size: of the network's runs.

    Returns: the exit status, 1 if some file was unreadable and 0 otherwise.

    Raises:
      UserError: if there are no images, the checkpoint can't be read, or the .npz file not be written.
    """
    if top < 1:
        raise ConfigError(f"--top must be at least 1, got {top}")
    files = list_files(inputs)
    predictor = Predictor(checkpoint)
    unreadable: list[Unreadable] = []
    try:
        with _saving(features) as save:
            results = _noting(predictor.predict(files, batch_size=batch_size), unreadable, save)
            for text in FORMATS[output_format](results, predictor.info, top, files):
                sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # as in `… | head`: whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    for item in unreadable:
        print(f"unreadable: {item.file}: {item.reason}", file=sys.stderr)
    return 1 if unreadable else 0


def _noting(results: Results, unreadable: list[Unreadable], save: Callable[[Prediction], None]) -> Results:
    for result in results:
        if isinstance(result, Unreadable):
            unreadable.append(result)
        else:
            save(result)
        yield result


def _best(prediction: Prediction, top: int) -> np.ndarray:
    """The most probable classes' numbers, the best first."""
    return np.argsort(-prediction.probabilities, kind="stable")[:top]


def _table(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """Columns for the eye; an image has a line for each class, its gate weights stand on the first."""
    classes = info.inputs.classes
    name_width = max(len("file"), *(len(file) for file in files))
    class_width = max(len("class"), *(len(name) for name in classes))
    yield f"{'file':{name_width}}  {'class':{class_width}}  probability  gate weight × candidate\n"
    for result in results:
        if isinstance(result, Unreadable):
            yield f"{result.file:{name_width}}  unreadable\n"
            continue
        weights = result.gate_weights
        used = [i for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
        gate = "  ".join(f"{weights[i]:.2f} × {i}" for i in used) if len(weights) > 1 else "no gate"
        for rank, label in enumerate(_best(result, top)):
            name, rest = ("", "") if rank else (result.file, gate)
            line = f"{name:{name_width}}  {classes[label]:{class_width}}  {100 * result.probabilities[label]:9.2f} %"
            yield f"{line}  {rest}".rstrip() + "\n"


def _json(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """One array with an object for each file, a line each."""
    del files
    separator = "[\n"
    for result in results:
        if isinstance(result, Unreadable):
            value: dict[str, Any] = {"file": result.file, "error": result.reason}
        else:
            value = {
                "file": result.file,
                "classes": [
                    {"name": info.inputs.classes[i], "label": int(i), "probability": float(result.probabilities[i])}
                    for i in _best(result, top)
                ],
                "gate_weights": [float(weight) for weight in result.gate_weights],
            }
        yield separator + json.dumps(value, ensure_ascii=False)
        separator = ",\n"
    yield "\n]\n"


def _csv(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """A header, and a row for each file."""
    del files
    ranks = range(1, min(top, len(info.inputs.classes)) + 1)
    header = ["file", "error", *(f"{key}_{rank}" for rank in ranks for key in ("class", "probability"))]
    header += [f"gate_{i}" for i in range(info.num_candidates)]
    yield _csv_line(header)
    for result in results:
        if isinstance(result, Unreadable):
            yield _csv_line([result.file, result.reason, *[""] * (len(header) - 2)])
            continue
        row = [result.file, ""]
        for label in _best(result, top):
            row += [info.inputs.classes[label], f"{result.probabilities[label]:.6g}"]
        yield _csv_line(row + [f"{weight:.6g}" for weight in result.gate_weights])


def _csv_line(row: Sequence[str]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(row)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[Results, Info, int, Sequence[str]], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
}


class _Features:
    """Collects predictions for an .npz file; the features wait on disk, for they may be many.

    The file has `files` [m], `features` [m, f], `gate_weights` [m, n] and `labels` [m] (the most
    probable class), for the m readable images.
    """

    def __init__(self, path: pathlib.Path, scratch: IO[bytes]):
        self._path, self._scratch = path, scratch
        self._files: list[str] = []
        self._labels: list[int] = []
        self._gate_weights: list[np.ndarray] = []
        self._width = 0

    def add(self, prediction: Prediction) -> None:
        """One more row."""
        row = prediction.features.astype("<f4")
        self._width = row.size
        self._scratch.write(row.tobytes())
        self._files.append(prediction.file)
        self._labels.append(int(np.argmax(prediction.probabilities)))
        self._gate_weights.append(prediction.gate_weights)

    def write(self) -> None:
        """Writes the file."""
        self._scratch.seek(0)
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self._files), self._width)}
        small = {
            "files": np.array(self._files, dtype=str),
            "labels": np.array(self._labels, np.int32),
            "gate_weights": np.array(self._gate_weights, np.float32),
        }
        with zipfile.ZipFile(self._path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("features.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(self._scratch, member)
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


@contextlib.contextmanager
def _saving(path: str | None) -> Iterator[Callable[[Prediction], None]]:
    """Gives what is called with each prediction; on leaving, the .npz file (if any) is written."""
    if path is None:
        yield lambda prediction: None
        return
    target = pathlib.Path(path)
    if target.suffix != ".npz":
        raise ConfigError(f"--features {path} must end in .npz")
    try:
        with tempfile.TemporaryFile(dir=target.parent) as scratch:
            features = _Features(target, scratch)
            yield features.add
            features.write()
    except BrokenPipeError:  # of the table's reader
        raise
    except OSError as error:
        raise DataError(f"the features can't be written to {path} ({error.strerror or error})") from error
