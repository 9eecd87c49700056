"""Reads MATLAB 5 to 7 files: a sequence of tagged elements, each variable perhaps compressed.

Every size is held against the bytes that are there, since checkpoints are fetched from elsewhere and
SciPy's reader can crash the process on damaged ones.
"""

import math
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

_MAX_BYTES = 2**32  # of one variable when inflated
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _OBJECT, _CHAR = 1, 2, 3, 4
_LOGICAL = 0x200
# how numbers are stored, and what they stand for
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_STORED |= {16: "u1", 17: "u2", 18: "u4"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_CLASSES |= {14: "i8", 15: "u8"}

Element = tuple[int, memoryview]


def read(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads variables, as `matfile.read` describes them.

    Raises:
      Exception: ValueError or of another kind, if the file is damaged.
    """
    content = memoryview(path.read_bytes())
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None:
        raise ValueError("the header doesn't tell the order of bytes")
    variables = {}
    for kind, data in _elements(content[128:], order):
        if kind == _COMPRESSED:
            ((kind, data),) = _elements(_inflate(data), order)
        if kind != _MATRIX:
            raise ValueError(f"element of type {kind} where a variable should be")
        parts = _elements(data, order)
        head = [next(parts) for _ in range(3)]
        name = bytes(head[2][1]).decode("ascii")
        if name in names:
            variables[name] = _matrix(data, order)
    return variables


def _inflate(data: memoryview) -> memoryview:
    stream = zlib.decompressobj()
    inflated = stream.decompress(data, _MAX_BYTES)
    if not stream.eof:
        raise ValueError("compressed variable is cut short or beyond 4 GB")
    return memoryview(inflated)


def _elements(data: memoryview, order: str) -> Iterator[Element]:
    """The elements (type, bytes) that follow one another in data."""
    start = 0
    while start < len(data):
        kind, size = (int(word) for word in np.frombuffer(data[start : start + 8], f"{order}u4"))
        body, room, padding = start + 8, len(data) - start - 8, 0
        if kind >> 16:  # up to four bytes lie in the tag itself
            kind, size = kind & 0xFFFF, kind >> 16
            body, room, padding = start + 4, 4, 4 - size
        elif kind != _COMPRESSED:
            padding = -size % 8
        if size > room:
            raise ValueError(f"element of {size} bytes where {room} are left")
        yield kind, data[body : body + size]
        start = body + size + padding


def _matrix(data: memoryview, order: str) -> Any:
    if not len(data):
        return np.zeros((0, 0))
    parts = _elements(data, order)
    flags = int(_numbers(next(parts), order)[0])
    shape = tuple(int(n) for n in _numbers(next(parts), order))
    next(parts)  # its name
    if min(shape, default=-1) < 0:
        raise ValueError(f"array of shape {shape}")
    kind = flags & 0xFF
    if kind == _CELL:
        cells = np.empty(_check_count(shape, 1, data), object)
        for i in range(cells.size):
            cells[i] = _child(parts, order)
        return cells.reshape(shape, order="F")
    if kind in (_STRUCT, _OBJECT):
        return _structs(shape, parts, kind == _OBJECT, data, order)
    if kind == _CHAR:
        return _text(next(parts), shape, order)
    if kind not in _CLASSES:
        return {}  # a sparse matrix, a function or an instance of a class: left alone
    values = _numbers(next(parts), order)
    dtype = np.dtype(bool if flags & _LOGICAL else _CLASSES[kind])
    return values.astype(dtype).reshape(shape, order="F")


def _check_count(shape: Sequence[int], each: int, data: memoryview) -> int:
    """How many matrices follow; every one takes eight bytes at least."""
    count = math.prod(shape)
    if count * each * 8 > len(data):
        raise ValueError(f"{count * each} arrays in {len(data)} bytes")
    return count


def _child(parts: Iterator[Element], order: str) -> Any:
    kind, data = next(parts)
    if kind != _MATRIX:
        raise ValueError(f"element of type {kind} where an array should be")
    return _matrix(data, order)


def _structs(shape: Sequence[int], parts: Iterator[Element], is_object: bool, data: memoryview, order: str) -> Any:
    if is_object:
        next(parts)  # the name of its class
    length = int(_numbers(next(parts), order)[0])
    block = bytes(next(parts)[1])
    if length < 1:
        raise ValueError(f"field names of length {length}")
    fields = [block[i : i + length] for i in range(0, len(block), length)]
    names = [field.split(b"\0")[0].decode("ascii") for field in fields]
    if not names:
        return {} if math.prod(shape) else []
    count = _check_count(shape, len(names), data)
    structs = [{name: _child(parts, order) for name in names} for _ in range(count)]
    return structs[0] if count == 1 else structs


def _text(element: Element, shape: Sequence[int], order: str) -> str:
    codes = _numbers(element, order)
    if element[0] in (2, 16):
        return bytes(element[1]).decode("utf-8")
    if codes.size != math.prod(shape):
        raise ValueError(f"text of {codes.size} characters in shape {tuple(shape)}")
    rows = codes.reshape(shape[0], -1, order="F") if codes.size else []
    return "\n".join("".join(map(chr, row)) for row in rows)


def _numbers(element: Element, order: str) -> np.ndarray:
    kind, data = element
    return np.frombuffer(data, order + _STORED[kind])
