"""MATLAB files as plain Python, in both of their formats: v7 and v7.3 (HDF5).

A struct is a dict, a struct array a list of dicts, a cell array a NumPy array of objects, text a
`str`, and everything else a NumPy array with MATLAB's axes, at least two; logicals are bool.
Nothing in a file is executed: functions and class instances are not brought to life.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.io

from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop import matfile_hdf5, matfile_v7

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read(path: str | pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads the variables of these names; those that the file hasn't are left out.

    Raises:
      CheckpointError: if there is no such file, it is no MATLAB file, or it is damaged.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    with path.open("rb") as file:
        head = file.read(520)
    is_hdf5 = _HDF5_SIGNATURE in (head[:8], head[512:520])
    if not is_hdf5 and not head.startswith(b"MATLAB 5.0"):
        raise CheckpointError(f"{path} is no MATLAB file of version 7 or 7.3")
    reader = matfile_hdf5 if is_hdf5 else matfile_v7
    try:
        return reader.read(path, names)
    except Exception as error:  # damaged bytes make readers stumble in every way there is
        detail = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged or cut short; fetch it again ({detail})") from error


def write(path: str | pathlib.Path, variables: Mapping[str, Any], *, v73: bool = False) -> None:
    """Writes variables so that MATLAB's `load` and `read` give them back.

    Args:
      path: of the file, which is replaced.
      variables: as `read` returns them; lists of dicts are rows of structs with the same fields.
      v73: HDF5 (MATLAB 7.3) instead of version 7.
    """
    path = pathlib.Path(path)
    if v73:
        matfile_hdf5.write(path, variables)
        return
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
