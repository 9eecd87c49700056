"""Predicts the classes of images and prints them as a table, JSON or CSV; saves features."""

import contextlib
import csv
import io
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np

from gmsop_jax.errors import ConfigError, DataError
from gmsop_jax.files import replacing
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
    """Predicts the classes of images and prints them.

    If the reader of standard output has gone (`| head`), the rest is not printed, but the features are saved.

    Args:
      checkpoint: a working directory, or the folder of one step in it.
      inputs: images, folders, and lists of files; see `list_files`.
      top: number of most probable classes to print for each image.
      features: an .npz file for the features; see `FeatureFile`.
      output_format: one of `FORMATS`.
      batch_size: number of images in a batch.

    Returns: the exit status: 1 if a file could not be read, 0 otherwise.

    Raises:
      UserError: if there are no images, the checkpoint can't be read, or the .npz file can't be written.
    """
    if top < 1:
        raise ConfigError(f"--top must be at least 1, got {top}")
    if features and not features.endswith(".npz"):
        raise ConfigError(f"--features {features} must end in .npz")
    files = list_files(inputs)
    predictor = Predictor(checkpoint)
    unreadable: list[Unreadable] = []
    with FeatureFile(pathlib.Path(features)) if features else contextlib.nullcontext() as feature_file:

        def results() -> Iterator[Prediction | Unreadable]:
            for result in predictor.predict(files, batch_size=batch_size):
                if isinstance(result, Unreadable):
                    unreadable.append(result)
                elif feature_file:
                    feature_file.add(result)
                yield result

        for text in FORMATS[output_format](results(), predictor.info, top, files):
            if not _print(text) and not features:
                break
    for item in unreadable:
        print(f"unreadable: {item.file}: {item.reason}", file=sys.stderr)
    return 1 if unreadable else 0


def _print(text: str) -> bool:
    """Prints text as it is, at once; file names that are not UTF-8 are escaped. Returns whether anybody reads it."""
    try:
        print(text.encode("utf-8", "backslashreplace").decode(), end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _best(prediction: Prediction, top: int) -> np.ndarray:
    """The labels of the most probable classes, in order of decreasing probability."""
    return np.argsort(-prediction.probabilities, kind="stable")[:top]


def _table(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """Aligned columns, with a line for each class; the gate weights are on the first line of an image."""
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
    """One array, with an object for each file on a line of its own."""
    separator = "[\n"
    for result in results:
        value: dict[str, Any] = {"file": result.file}
        if isinstance(result, Unreadable):
            value["error"] = result.reason
        else:
            value["classes"] = [
                {"name": info.inputs.classes[i], "label": int(i), "probability": float(result.probabilities[i])}
                for i in _best(result, top)
            ]
            value["gate_weights"] = result.gate_weights.tolist()
        yield separator + json.dumps(value, ensure_ascii=False)
        separator = ",\n"
    yield "\n]\n"


def _csv(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """A header, and a row for each file."""
    ranks = range(1, min(top, len(info.inputs.classes)) + 1)
    header = ["file", "error", *(f"{key}_{rank}" for rank in ranks for key in ("class", "probability"))]
    header += [f"gate_{i}" for i in range(info.num_candidates)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, header, lineterminator="\n")
    writer.writeheader()
    for result in results:
        row: dict[str, Any] = {"file": result.file}
        if isinstance(result, Unreadable):
            row["error"] = result.reason
        else:
            for rank, label in enumerate(_best(result, top), 1):
                row[f"class_{rank}"] = info.inputs.classes[label]
                row[f"probability_{rank}"] = f"{result.probabilities[label]:.6g}"
            row |= {f"gate_{i}": f"{weight:.6g}" for i, weight in enumerate(result.gate_weights)}
        writer.writerow(row)
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


FORMATS: dict[str, Callable[[Results, Info, int, Sequence[str]], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
}


class FeatureFile:
    """A context manager that collects predictions and, on leaving, writes them to an .npz file.

    The file has the arrays `files` [m], `features` [m, f], `gate_weights` [m, n] and `labels` [m] (the most
    probable class) of the m images that could be read. Until then the features are kept on disk, because all of
    them may not fit into memory.

    Raises:
      DataError: if the file can't be written.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._files: list[str] = []
        self._labels: list[int] = []
        self._gate_weights: list[np.ndarray] = []

    def __enter__(self) -> "FeatureFile":
        with self._errors():
            self._scratch: IO[bytes] = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        with self._errors(), self._scratch:
            if kind is None:
                self._write()

    def add(self, prediction: Prediction) -> None:
        """Adds one row."""
        with self._errors():
            self._scratch.write(prediction.features.astype(np.float32).tobytes())
        self._files.append(prediction.file)
        self._labels.append(int(np.argmax(prediction.probabilities)))
        self._gate_weights.append(prediction.gate_weights)

    def _write(self) -> None:
        rows = len(self._files)
        self._scratch.flush()
        features = np.memmap(self._scratch, np.float32, "r").reshape(rows, -1) if rows else np.zeros((0, 0), np.float32)
        with replacing(self._path) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                files=np.array(self._files, dtype=str),
                features=features,
                gate_weights=np.array(self._gate_weights, np.float32),
                labels=np.array(self._labels, np.int32),
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"the features can't be written to {self._path} ({reason})") from error
