"""Reads MATLAB files of version 5 to 7: a sequence of tagged elements, in which each variable can be compressed.

SciPy's reader can crash the process on a damaged file. This reader compares every size with the remaining bytes.
"""

import math
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gmsop_jax.files import Budget, read_bytes

_HEAD_BYTES = 2**12  # of a compressed variable: enough for its name
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _OBJECT, _CHAR = 1, 2, 3, 4
_LOGICAL = 0x200
_MAX_DIMENSIONS = 32
# The types in which numbers are stored, and the classes of the arrays that contain them.
_STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_STORED |= {16: "u1", 17: "u2", 18: "u4"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4"}
_CLASSES |= {14: "i8", 15: "u8"}

Element = tuple[int, memoryview]


def read(path: pathlib.Path, names: Sequence[str]) -> dict[str, Any]:
    """Reads variables as described in `matfile.read`.

    Raises:
      Exception: ValueError or another exception, if the file is damaged.
    """
    content = memoryview(read_bytes(path))
    budget = Budget(len(content))
    order = {b"IM": "<", b"MI": ">"}.get(bytes(content[126:128]))
    if order is None:
        raise ValueError("the header does not state the byte order")
    reader, variables = _Reader(order, budget), {}
    for kind, data in _elements(content[128:], order):
        head = _inflate(data, _HEAD_BYTES)[8:] if kind == _COMPRESSED else data
        name = _name(head, order)
        if name in names:
            if kind == _COMPRESSED:
                ((kind, data),) = _elements(_inflate_all(data, budget), order)
            if kind != _MATRIX:
                raise ValueError(f"an element of type {kind} in place of a variable")
            budget.take_nodes()
            variables[name] = reader.matrix(data)
    return variables


def _inflate(data: memoryview, count: int) -> memoryview:
    return memoryview(zlib.decompressobj().decompress(data, count))


def _inflate_all(data: memoryview, budget: Budget) -> memoryview:
    stream = zlib.decompressobj()
    inflated = stream.decompress(data, budget.bytes)
    if not stream.eof:
        raise ValueError(f"a compressed variable is truncated, or has more than {budget.bytes:,} bytes")
    budget.take_bytes(len(inflated))
    return memoryview(inflated)


def _name(matrix: memoryview, order: str) -> str:
    """Returns the name of a variable: the third element, after flags and shape."""
    parts = _elements(matrix, order)
    _, _, (_, name) = next(parts), next(parts), next(parts)
    return bytes(name).decode("ascii")


def _elements(data: memoryview, order: str) -> Iterator[Element]:
    """Yields the elements (type, bytes) in data."""
    start = 0
    while start < len(data):
        kind, size = (int(word) for word in np.frombuffer(data[start : start + 8], f"{order}u4"))
        body, room, padding = start + 8, len(data) - start - 8, 0
        if kind >> 16:  # up to four bytes are stored in the tag itself
            kind, size = kind & 0xFFFF, kind >> 16
            body, room, padding = start + 4, 4, 4 - size
        elif kind != _COMPRESSED:
            padding = -size % 8
        if size > room:
            raise ValueError(f"an element of {size} bytes, but only {room} bytes remain")
        yield kind, data[body : body + size]
        start = body + size + padding


class _Reader:
    def __init__(self, order: str, budget: Budget):
        self._order, self._budget = order, budget

    def matrix(self, data: memoryview) -> Any:
        """Returns the array, cells, structs or text of a matrix element."""
        if not len(data):
            return np.zeros((0, 0))
        parts = _elements(data, self._order)
        flags = int(self._numbers(next(parts))[0])
        sizes = self._numbers(next(parts))
        if not 2 <= sizes.size <= _MAX_DIMENSIONS or sizes.min() < 0:
            raise ValueError(f"an array of shape {sizes[:_MAX_DIMENSIONS].tolist()}")
        shape = tuple(sizes.tolist())
        next(parts)  # the name
        kind = flags & 0xFF
        if kind == _CELL:
            cells = np.empty(self._take_count(shape, 1, data), object)
            for i in range(cells.size):
                cells[i] = self._child(parts)
            return cells.reshape(shape, order="F")
        if kind in (_STRUCT, _OBJECT):
            return self._structs(shape, parts, data, is_object=kind == _OBJECT)
        if kind == _CHAR:
            return self._text(next(parts), shape)
        if kind not in _CLASSES:
            return {}  # a sparse matrix, a function or an instance of a class
        values = self._numbers(next(parts))
        dtype = np.dtype(bool if flags & _LOGICAL else _CLASSES[kind])
        self._budget.take_bytes(values.size * dtype.itemsize)
        return values.astype(dtype).reshape(shape, order="F")

    def _child(self, parts: Iterator[Element]) -> Any:
        kind, data = next(parts)
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} in place of an array")
        return self.matrix(data)

    def _structs(self, shape: Sequence[int], parts: Iterator[Element], data: memoryview, *, is_object: bool) -> Any:
        if is_object:
            next(parts)  # the name of its class
        length = int(self._numbers(next(parts))[0])
        block = bytes(next(parts)[1])
        self._budget.check_text(len(block))
        if length < 1:
            raise ValueError(f"field names of length {length}")
        fields = [block[i : i + length] for i in range(0, len(block), length)]
        names = [field.split(b"\0")[0].decode("ascii") for field in fields]
        if not names:
            return {} if math.prod(shape) else []
        count = self._take_count(shape, len(names), data)
        structs = [{name: self._child(parts) for name in names} for _ in range(count)]
        return structs[0] if count == 1 else structs

    def _take_count(self, shape: Sequence[int], each: int, data: memoryview) -> int:
        """Returns the number of elements, each of which consists of `each` matrices of at least eight bytes."""
        count = math.prod(shape)
        if count * each * 8 > len(data):
            raise ValueError(f"{count * each} arrays in {len(data)} bytes")
        self._budget.take_nodes(count * each)
        return count

    def _text(self, element: Element, shape: Sequence[int]) -> str:
        codes = self._numbers(element)
        self._budget.check_text(codes.size)
        if element[0] in (2, 16):
            return bytes(element[1]).decode("utf-8")
        if codes.size != math.prod(shape):
            raise ValueError(f"text of {codes.size} characters in shape {tuple(shape)}")
        rows = codes.reshape(shape[0], -1, order="F") if codes.size else []
        return "\n".join("".join(map(chr, row)) for row in rows)

    def _numbers(self, element: Element) -> np.ndarray:
        kind, data = element
        return np.frombuffer(data, self._order + _STORED[kind])
