"""Reads and writes MATLAB files of version 7 and 7.3 (HDF5).

A struct is read as a dict, a struct array as a list of dicts, a cell array as a NumPy array of objects, text as a
`str`, and everything else as a NumPy array with MATLAB's axes, of which there are at least two. Logical arrays have
dtype bool. Nothing in a file is executed: functions and instances of classes are ignored. The memory that reading takes
is limited in proportion to the size of the file.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import open_file, replacing
from gmsop_jax.interop.matfile import hdf5, v7

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


def read(path: str | pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads the variables with these names; missing ones are ignored.

    Raises:
      CheckpointError: if the file does not exist, is not a MATLAB file, is damaged, or needs too much memory for its
        size.
    """
    path = pathlib.Path(path)
    reader = hdf5 if is_hdf5(path) else v7
    try:
        return reader.read(path, names)
    except Exception as error:  # damaged files make the readers raise exceptions of many types
        detail = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged or truncated ({detail}); download it again") from error


def is_hdf5(path: pathlib.Path) -> bool:
    """Returns whether a MATLAB file has version 7.3; raises CheckpointError for any other file."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    with open_file(path) as file:
        head = file.read(520)
    if _HDF5_SIGNATURE in (head[:8], head[512:520]):
        return True
    if not head.startswith(b"MATLAB 5.0"):
        raise CheckpointError(f"{path} is not a MATLAB file of version 7 or 7.3")
    return False


def write(path: str | pathlib.Path, variables: Mapping[str, Any], *, v73: bool = False) -> None:
    """Writes variables, so that MATLAB's `load` and `read` return them.

    Args:
      path: the file, which is replaced once the new one is complete.
      variables: values as `read` returns them; a list of dicts with the same keys is a row of structs.
      v73: whether to write version 7.3 (HDF5) instead of version 7.
    """
    with replacing(pathlib.Path(path)) as temporary:
        if v73:
            hdf5.write(temporary, variables)
        else:
            _write_v7(temporary, variables)


def _write_v7(path: pathlib.Path, variables: Mapping[str, Any]) -> None:
    import scipy.io  # imported late, because the process that reads version 7.3 does not need it

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
