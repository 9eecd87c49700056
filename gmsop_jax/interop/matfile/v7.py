"""Reads and writes MATLAB files of version 5 to 7 with SciPy."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.io
from scipy.io.matlab import MatlabFunction, MatlabOpaque

from gmsop_jax.files import Budget
from gmsop_jax.interop.matfile import isolated


def read(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads variables as `matfile.read` does, in another process. Raises ValueError if the file is damaged."""
    return isolated.call_limited(_read, path, names)


def _read(path: pathlib.Path, budget: Budget, names: Sequence[str]) -> dict[str, Any]:
    # mat_dtype restores the class of numbers that MATLAB stored in fewer bytes
    stored = scipy.io.loadmat(path, mat_dtype=True, chars_as_strings=False, variable_names=names, uint16_codec="utf-16")
    return {name: _from_scipy(stored[name], budget) for name in names if name in stored}


def _from_scipy(value: Any, budget: Budget) -> Any:
    if not isinstance(value, np.ndarray) or isinstance(value, MatlabFunction | MatlabOpaque):
        return {}  # a sparse matrix, a function or an instance of a class
    if names := value.dtype.names:
        budget.take_nodes(value.size * len(names))
        structs = [{name: _from_scipy(item[name], budget) for name in names} for item in value.ravel(order="F")]
        return structs[0] if len(structs) == 1 else structs
    if value.dtype == object:
        budget.take_nodes(value.size)
        if value.size and value.ravel()[0] is None:  # a struct without fields
            return {}
        cells = np.empty(value.shape, object)
        for i, item in np.ndenumerate(value):
            cells[i] = _from_scipy(item, budget)
        return cells
    if value.dtype.kind == "U":
        budget.check_text(value.size)
        return "\n".join("".join(row.flat) for row in value) if value.size else ""
    budget.take_bytes(value.nbytes)
    return value


def write(path: pathlib.Path, variables: Mapping[str, Any]) -> None:
    """Writes variables as described in `matfile.write`."""
    stored = {name: _to_scipy(value) for name, value in variables.items()}
    with path.open("wb") as file:  # given a path, SciPy would append .mat
        scipy.io.savemat(file, stored, do_compression=True, long_field_names=True, oned_as="row")


def _to_scipy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _to_scipy(item) for key, item in value.items()}
    if isinstance(value, list):
        fields = list(value[0]) if value else []
        if not fields:
            return np.zeros((0, 0))
        structs = np.empty((1, len(value)), [(name, object) for name in fields])
        for i, item in enumerate(value):
            for name in fields:
                structs[name][0, i] = _to_scipy(item[name])
        return structs
    if isinstance(value, np.ndarray) and value.dtype == object:
        cells = np.empty(value.shape, object)
        for i, item in np.ndenumerate(value):
            cells[i] = _to_scipy(item)
        return cells
    return value
