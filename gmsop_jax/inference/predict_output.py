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
from typing import Any

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
    batch_size: int | None = None,
) -> int:
    """Predicts the classes of images and prints them.

    If the reader of standard output stops reading (as `head` does), nothing more is printed, but the features are
    still saved.

    Args:
      checkpoint, inputs, batch_size: see `Predictor`.
      top: number of most probable classes to print for each image.
      features: an .npz file for the features; see `FeatureFile`.
      output_format: one of `FORMATS`.

    Returns: the exit status: 1 if a file could not be read, 0 otherwise.

    Raises:
      UserError: if `top` or `features` is invalid, there are no images, the checkpoint can't be read, or the .npz file
        can't be written.
    """
    if top < 1:
        raise ConfigError(f"--top must be at least 1, but got {top}")
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
    """Prints text, escapes file names that are not UTF-8, and flushes. Returns False if the reader closed the pipe."""
    try:
        print(text.encode("utf-8", "backslashreplace").decode(), end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _best(prediction: Prediction, info: Info, top: int) -> list[dict[str, Any]]:
    """The most probable classes, in order of decreasing probability."""
    labels = np.argsort(-prediction.probabilities, kind="stable")[:top]
    return [
        {"name": info.inputs.classes[i], "label": int(i), "probability": float(prediction.probabilities[i])}
        for i in labels
    ]


def _table(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """Aligned columns, with one line per class. The first line of an image also has its name and gate weights."""
    name_width = max(len("file"), *map(len, files))
    class_width = max(len("class"), *map(len, info.inputs.classes))
    yield f"{'file':{name_width}}  {'class':{class_width}}  probability  gate weight × candidate\n"
    for result in results:
        if isinstance(result, Unreadable):
            yield f"{result.file:{name_width}}  unreadable\n"
            continue
        weights = result.gate_weights
        used = [i for i in np.argsort(-weights, kind="stable") if weights[i] > 0]
        gate = "  ".join(f"{weights[i]:.2f} × {i}" for i in used) if len(weights) > 1 else "no gate"
        for rank, best in enumerate(_best(result, info, top)):
            name, rest = ("", "") if rank else (result.file, gate)
            line = f"{name:{name_width}}  {best['name']:{class_width}}  {100 * best['probability']:9.2f} %  {rest}"
            yield line.rstrip() + "\n"


def _json(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """An array with one object per file, each on a line of its own."""
    separator = "[\n"
    for result in results:
        if isinstance(result, Unreadable):
            value = {"file": result.file, "error": result.reason}
        else:
            weights = result.gate_weights.tolist()
            value = {"file": result.file, "classes": _best(result, info, top), "gate_weights": weights}
        yield separator + json.dumps(value, ensure_ascii=False)
        separator = ",\n"
    yield "\n]\n"


def _csv(results: Results, info: Info, top: int, files: Sequence[str]) -> Iterator[str]:
    """A header and one row per file."""
    ranks = range(1, min(top, len(info.inputs.classes)) + 1)
    header = ["file", "error", *(f"{key}_{rank}" for rank in ranks for key in ("class", "probability"))]
    yield _csv_row([*header, *(f"gate_{i}" for i in range(info.num_candidates))])
    for result in results:
        if isinstance(result, Unreadable):
            empty = len(header) - 2 + info.num_candidates
            yield _csv_row([result.file, result.reason, *[""] * empty])
            continue
        best = [cell for c in _best(result, info, top) for cell in (c["name"], f"{c['probability']:.6g}")]
        yield _csv_row([result.file, "", *best, *(f"{weight:.6g}" for weight in result.gate_weights)])


def _csv_row(cells: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


FORMATS: dict[str, Callable[[Results, Info, int, Sequence[str]], Iterator[str]]] = {
    "table": _table,
    "json": _json,
    "csv": _csv,
}


class FeatureFile:
    """A context manager that collects predictions and writes them to an .npz file when it exits.

    For the m images that could be read, the file has the arrays `files` [m], `features` [m, f], `gate_weights`
    [m, n] and `labels` [m] (the most probable class). Until the file is written, the features are kept in a temporary
    file beside it, because they may not fit into memory.

    Raises:
      DataError: if the file can't be written.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._rows: list[tuple[str, np.ndarray, int]] = []

    def __enter__(self) -> "FeatureFile":
        with self._naming_the_file():
            self._scratch = tempfile.TemporaryFile(dir=self._path.parent)
        return self

    def __exit__(self, kind: object, *details: object) -> None:
        with self._naming_the_file(), self._scratch:
            if kind is None:
                self._write()

    def add(self, prediction: Prediction) -> None:
        """Adds one row."""
        with self._naming_the_file():
            self._scratch.write(prediction.features.astype(np.float32).tobytes())
        self._rows.append((prediction.file, prediction.gate_weights, int(np.argmax(prediction.probabilities))))

    def _write(self) -> None:
        files, weights, labels = zip(*self._rows, strict=True) if self._rows else ((), (), ())
        self._scratch.flush()
        features = np.memmap(self._scratch, np.float32, "r") if files else np.zeros(0, np.float32)
        arrays = {
            "files": np.array(files, dtype=str),
            "features": features.reshape(len(files), -1 if files else 0),
            "gate_weights": np.array(weights, np.float32),
            "labels": np.array(labels, np.int32),
        }
        with replacing(self._path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(
                f"the features can't be written to {self._path} ({reason}); give another --features"
            ) from error
