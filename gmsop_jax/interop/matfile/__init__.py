"""Reads and writes MATLAB files of version 7 and 7.3 (HDF5).

A struct is read as a dict, a struct array as a list of dicts, a cell array as a NumPy array of objects, text as a
`str`, and everything else as a NumPy array with MATLAB's axes, of which there are at least two. Logical arrays have
dtype bool. Nothing in a file is executed: functions, instances of classes and sparse matrices are read as an empty dict
from version 7, and as the plain values that HDF5 stores from version 7.3. The memory that reading takes is limited in
proportion to the size of the file.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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
        raise CheckpointError(f"{path} does not exist or is not a file")
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
        (hdf5 if v73 else v7).write(temporary, variables)
