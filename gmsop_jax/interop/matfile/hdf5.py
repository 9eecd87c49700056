"""Reads and writes MATLAB 7.3 files: HDF5 with MATLAB's attributes.

Axes are stored in reverse order. A struct is a group. Cells and the fields of a struct array are arrays of references
into the group `#refs#`. An empty array stores its shape.
"""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import h5py
import numpy as np

from gmsop_jax.files import Budget
from gmsop_jax.interop.matfile import isolated

_MAX_DEPTH = 32  # structs that are nested more deeply are assumed to contain themselves
_HEADER = b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created by gmsop_jax HDF5 schema 1.00 ."
_CLASSES = {"f8": "double", "f4": "single", "b1": "logical"}


def read(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads variables as `matfile.read` does, in another process. Raises ValueError if the file is damaged."""
    return isolated.call_limited(_read, path, names)


def _read(path: pathlib.Path, budget: Budget, names: Sequence[str]) -> dict[str, Any]:
    with h5py.File(path, "r") as file:
        reader = _Reader(file, budget)
        return {name: reader.read(_own(file, name)) for name in names if name in file}


def _own(group: h5py.Group, name: str) -> Any:
    """Returns a member of a group; raises ValueError if it is missing, or a link, which could leave the file."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{group.name}/{name} is missing or is a link")
    return group[name]


def check_array(node: h5py.Dataset) -> None:
    """Raises ValueError unless an array consists of numbers or references and is stored in the file itself.

    An array of strings of variable length could refer a million times to one long string.
    """
    if node.external or node.is_virtual:
        raise ValueError(f"{node.name} is stored in another file")
    if node.dtype.kind not in "biuf" and h5py.check_ref_dtype(node.dtype) is not h5py.Reference:
        raise ValueError(f"{node.name} has the type {node.dtype}, which MATLAB does not write")


def _attribute(node: Any, name: str, default: Any) -> Any:
    """Returns the value of an attribute, which must be one number or one string of fixed length."""
    if name not in node.attrs:
        return default
    stored = node.attrs.get_id(name)
    if math.prod(stored.shape) != 1 or stored.dtype.kind not in "biufS":
        raise ValueError(f"{node.name} has the attribute {name} of type {stored.dtype} and shape {stored.shape}")
    return np.ravel(node.attrs[name])[0]


class _Reader:
    """Reads the values of one file; an object with several references is read once."""

    def __init__(self, file: h5py.File, budget: Budget):
        self._file, self._budget = file, budget
        self._known: dict[int, Any] = {}

    def read(self, node: Any, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError(f"{node.name} contains itself")
        address = h5py.h5o.get_info(node.id).addr  # pyright: ignore[reportAttributeAccessIssue]
        if address not in self._known:
            self._budget.take_nodes()
            is_struct = isinstance(node, h5py.Group)
            self._known[address] = self._read_struct(node, depth) if is_struct else self._read_array(node, depth)
        return self._known[address]

    def _read_array(self, node: h5py.Dataset, depth: int) -> Any:
        kind = _text(_attribute(node, "MATLAB_class", b""))
        value = self._load(node).T
        if _attribute(node, "MATLAB_empty", 0):
            shape = tuple(int(n) for n in value.ravel())
            if kind == "struct":
                return {} if 0 not in shape else []
            if kind == "char":
                return ""
            if 0 not in shape:
                raise ValueError(f"{node.name} is marked as empty, but has the shape {shape}")
            return np.zeros(shape, object if kind == "cell" else _dtype(kind))
        if kind == "cell":
            return self._dereference(value, depth)
        if kind == "char":
            self._budget.check_text(value.size)
            return "".join(chr(c) for c in value.ravel())
        return value.astype(bool) if kind == "logical" else value

    def _load(self, node: h5py.Dataset) -> np.ndarray:
        check_array(node)
        self._budget.take_bytes(node.nbytes)
        return node[()]

    def _read_struct(self, node: h5py.Group, depth: int) -> Any:
        names = [b"".join(name).decode("ascii") for name in node.attrs.get("MATLAB_fields", [])]  # in MATLAB's order
        self._budget.take_bytes(sum(map(len, names)))
        members = {name: _own(node, name) for name in names or map(str, node)}
        if not members or not all(_is_field_of_array(member) for member in members.values()):
            return {name: self.read(member, depth + 1) for name, member in members.items()}
        columns = {name: self._dereference(self._load(m).T, depth).ravel() for name, m in members.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def _dereference(self, references: np.ndarray, depth: int) -> np.ndarray:
        self._budget.take_nodes(references.size)
        values = np.empty(references.shape, object)
        for i, reference in np.ndenumerate(references):
            values[i] = self.read(self._file[reference], depth + 1)
        return values


def _is_field_of_array(member: Any) -> bool:
    return isinstance(member, h5py.Dataset) and "MATLAB_class" not in member.attrs


def _dtype(kind: str) -> Any:
    return {"double": np.float64, "single": np.float32, "logical": bool}.get(kind, kind or np.float64)


def _text(value: Any) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)


def write(path: pathlib.Path, variables: Mapping[str, Any]) -> None:
    """Writes variables as described in `matfile.write`."""
    with h5py.File(path, "w", userblock_size=512, libver=("earliest", "v110")) as file:
        for name, value in variables.items():
            _write(file, name, value)
    with path.open("r+b") as stream:
        stream.write(_HEADER.ljust(116) + bytes(8) + b"\x00\x02IM")


def _write(group: h5py.Group, name: str, value: Any) -> None:
    if isinstance(value, Mapping) or (isinstance(value, list) and value):
        _write_struct(group.create_group(name), value)
        return
    if isinstance(value, np.ndarray) and value.dtype == object and value.size:
        node, kind = _write_references(group, name, value), "cell"
    elif isinstance(value, str) and value:
        node = group.create_dataset(name, data=np.frombuffer(value.encode("utf-16-le"), "<u2")[:, None])
        kind = "char"
        node.attrs["MATLAB_int_decode"] = np.int32(2)
    else:
        node, kind = _write_numbers(group, name, value)
    node.attrs["MATLAB_class"] = np.bytes_(kind)


def _write_numbers(group: h5py.Group, name: str, value: Any) -> tuple[h5py.Dataset, str]:
    if isinstance(value, list):
        return _write_empty(group, name, (0, 0)), "struct"
    if isinstance(value, str):
        return _write_empty(group, name, (0, 0)), "char"
    array = np.atleast_2d(np.asarray(value))
    kind = "cell" if array.dtype == object else _CLASSES.get(array.dtype.str[1:], array.dtype.name)
    if not array.size:
        return _write_empty(group, name, array.shape), kind
    if kind == "logical":
        node = group.create_dataset(name, data=array.T.astype(np.uint8))
        node.attrs["MATLAB_int_decode"] = np.int32(1)
        return node, kind
    large = {"compression": "gzip", "compression_opts": 3} if array.nbytes > 4096 else {}
    return group.create_dataset(name, data=array.T, **large), kind


def _write_empty(group: h5py.Group, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
    node = group.create_dataset(name, data=np.array(shape, np.uint64))
    node.attrs["MATLAB_empty"] = np.uint8(1)
    return node


def _write_struct(group: h5py.Group, value: Mapping[str, Any] | list[dict[str, Any]]) -> None:
    fields = list(value) if isinstance(value, Mapping) else list(value[0])
    group.attrs["MATLAB_class"] = np.bytes_("struct")
    if fields:
        letters = np.empty(len(fields), object)
        letters[:] = [np.array([c.encode() for c in field], "S1") for field in fields]
        group.attrs.create("MATLAB_fields", letters, dtype=h5py.vlen_dtype(np.dtype("S1")))
    for field in fields:
        if isinstance(value, Mapping):
            _write(group, field, value[field])
        else:
            column = np.empty((1, len(value)), object)
            column[0] = [item[field] for item in value]
            _write_references(group, field, column)


def _write_references(group: h5py.Group, name: str, values: np.ndarray) -> h5py.Dataset:
    """Writes values into `#refs#`, and an array of references to them."""
    node = group.create_dataset(name, values.shape[::-1], h5py.ref_dtype)
    store = group.file.require_group("#refs#")
    references = np.empty(values.shape, object)
    for i, value in np.ndenumerate(values):
        key = f"r{len(store)}"
        _write(store, key, value)
        references[i] = store[key].ref
    node[...] = references.T
    return node
