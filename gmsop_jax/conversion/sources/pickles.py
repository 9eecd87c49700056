"""Reads pickles of numbers and NumPy arrays without executing them and without loading the arrays.

A pickle is a program for a small stack machine, one of whose instructions calls any function by name. This reader
supports only the instructions that numbers, strings, lists, tuples, dictionaries and NumPy arrays need, and calls
nothing: it recognises the few names in the pickle of an array and refuses all others.

`pickle.Unpickler` with a restricted `find_class` would be as safe, but it loads every array into memory, 1.5 GB for one
file of ImageNet. This reader notes where a long byte string is in the file, so that its array becomes a `FileArray`.
"""

import dataclasses
import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from gmsop_jax.conversion.sources.files import FileArray, open_binary
from gmsop_jax.errors import DataError

_LAZY_BYTES = 2**16  # byte strings of this length or more are not loaded
_MAX_LINE = 1000
MAX_INSTRUCTIONS = 50_000_000  # ImageNet's largest file needs 0.3 million
_NAMES = {operation.code: operation.name for operation in pickletools.opcodes}
_ALLOWED = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("numpy.core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy._core.multiarray", "_reconstruct"): "reconstruct",
    ("numpy.core.numeric", "_frombuffer"): "frombuffer",
    ("numpy._core.numeric", "_frombuffer"): "frombuffer",
    ("_codecs", "encode"): "encode",
    ("__builtin__", "bytes"): "bytes",
    ("builtins", "bytes"): "bytes",
}


@dataclasses.dataclass(frozen=True)
class _Span:
    """A byte string that was not loaded."""

    offset: int
    length: int


@dataclasses.dataclass(frozen=True)
class _Name:
    """One of the allowed globals."""

    role: str


@dataclasses.dataclass
class _Dtype:
    code: str


@dataclasses.dataclass
class _Array:
    """An array, which the instruction BUILD or `_frombuffer` describes."""

    shape: tuple[int, ...] = ()
    dtype: str = ""
    fortran: bool = False
    data: "_Span | bytes" = b""


class _Mark:
    pass


def load(path: Path) -> Any:
    """Reads a pickle file.

    Returns: the pickled object. If it is a dictionary, arrays among its values are FileArrays, or ndarrays if they are
      small.

    Raises:
      DataError: if the file is truncated, is not a pickle, or contains anything else than arrays and plain values.
    """
    with open_binary(path) as file:
        machine = _Machine(file, path)
        try:
            return machine.run()
        except (IndexError, KeyError, TypeError, ValueError, AttributeError, struct.error) as error:
            if isinstance(error, DataError):
                raise
            raise machine.refuse(f"a damaged pickle ({type(error).__name__}: {error})") from error


class _Machine:
    def __init__(self, file: IO[bytes], path: Path) -> None:
        self.file, self.path = file, path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> DataError:
        return DataError(f"{self.path} is refused: {what} at byte {self.file.tell():,}")

    def run(self) -> Any:
        if self.take(1) != b"\x80" or self.take(1) < b"\x02":
            raise self.refuse("not a pickle of protocol 2 or later")
        for _ in range(MAX_INSTRUCTIONS):
            code = self.take(1)
            if code == b".":
                return self.finish(self.stack.pop())
            if code not in _OPERATIONS:
                name = _NAMES.get(code.decode("latin-1"))
                what = f"pickle instruction {name}" if name else f"not a pickle, byte {code!r}"
                raise self.refuse(what)
            _OPERATIONS[code](self)
        raise self.refuse(f"it has more than {MAX_INSTRUCTIONS:,} instructions")

    def take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) != count:
            raise self.refuse("the file is truncated")
        return data

    def long_bytes(self, count: int) -> bytes | _Span:
        if count < _LAZY_BYTES:
            return self.take(count)
        start = self.file.tell()
        if self.file.seek(0, 2) < start + count:
            raise self.refuse("the file is truncated")
        self.file.seek(start + count)
        return _Span(start, count)

    def line(self) -> str:
        line = self.file.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise self.refuse("a line without end")
        return line[:-1].decode("utf-8")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def since_mark(self) -> list[Any]:
        items = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def name(self, module: str, name: str) -> None:
        if (module, name) not in _ALLOWED:
            raise self.refuse(f"it names {module}.{name}, which no data file needs and which could run code")
        self.stack.append(_Name(_ALLOWED[module, name]))

    def stack_name(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.name(str(module), str(name))

    def append_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise self.refuse(f"a pickle that appends to a {type(target).__name__}")
        target.extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise self.refuse(f"a pickle that sets items of a {type(target).__name__}")
        if not all(isinstance(key, str | bytes | int) for key in items[::2]):
            raise self.refuse("a dictionary whose keys are neither strings nor integers")
        target.update(zip(items[::2], items[1::2], strict=True))

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        role = function.role if isinstance(function, _Name) else None
        if role == "reconstruct":
            self.stack.append(_Array())
        elif role == "dtype":
            self.stack.append(_Dtype(_text(arguments[0])))
        elif role == "frombuffer":
            data, dtype, shape, order = arguments
            self.stack.append(_Array(tuple(shape), dtype.code, order == "F", data))
        elif role == "bytes" and not arguments:
            self.stack.append(b"")
        elif role == "encode" and _text(arguments[1]) in ("latin1", "latin-1"):
            if isinstance(arguments[0], _Span):
                raise self.refuse("an array in the text form of pickle protocol 2; save it with protocol 4")
            self.stack.append(_text(arguments[0]).encode("latin-1"))
        else:
            raise self.refuse(f"a pickle that calls {function!r}")

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array):
            _, shape, dtype, fortran, data = state
            target.shape, target.dtype, target.fortran, target.data = tuple(shape), dtype.code, fortran, data
        elif isinstance(target, _Dtype):
            order = _text(state[1])
            target.code = target.code if order == "|" else order + target.code
        else:
            raise self.refuse(f"a pickle that fills a {type(target).__name__}")

    def finish(self, value: Any) -> Any:
        """The pickled object; nested containers are returned as they are, so that no cycle or depth matters."""
        if isinstance(value, dict):
            return {_text(key) if isinstance(key, bytes) else key: self.plain(item) for key, item in value.items()}
        return self.plain(value)

    def plain(self, value: Any) -> Any:
        if isinstance(value, _Array):
            return self.array(value)
        if isinstance(value, (_Span, _Name, _Dtype)):
            raise self.refuse(f"it contains a bare {type(value).__name__.strip('_').lower()}")
        return value

    def array(self, value: _Array) -> FileArray | np.ndarray:
        dtype = np.dtype(value.dtype)
        if dtype.kind not in "uif" or not value.shape or min(value.shape) < 0:
            raise self.refuse(f"an array of dtype {value.dtype} and shape {value.shape}")
        if value.fortran and len(value.shape) > 1:
            raise self.refuse("an array in Fortran order")
        needed = int(np.prod(value.shape, dtype=object)) * dtype.itemsize
        data = value.data
        length = data.length if isinstance(data, _Span) else len(data)
        if length != needed:
            raise self.refuse(f"an array of {value.shape} {dtype} with {length:,} bytes")
        if isinstance(data, _Span):
            return FileArray(self.path, data.offset, value.shape, dtype.str)
        return np.frombuffer(
            data if isinstance(data, (bytes, bytearray)) else _text(data).encode("latin-1"), dtype
        ).reshape(value.shape)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    return value


def _push(read: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(read(machine))


def _put(key: Callable[[_Machine], int]) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        machine.memo[key(machine)] = machine.stack[-1]

    return operation


def _tuple(count: int) -> Callable[[_Machine], None]:
    def operation(machine: _Machine) -> None:
        items = machine.stack[-count:]
        if len(items) != count:
            raise machine.refuse("a damaged pickle (an empty stack)")
        machine.stack[-count:] = [tuple(items)]

    return operation


def _unicode(form: str) -> Callable[[_Machine], Any]:
    def read(machine: _Machine) -> Any:
        data = machine.long_bytes(machine.number(form))
        return data if isinstance(data, _Span) else data.decode("utf-8", "surrogatepass")

    return read


_OPERATIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x95": lambda m: m.take(8),  # FRAME: only a hint for buffering
    b"(": lambda m: m.stack.append(_Mark()),
    b"N": _push(lambda m: None),
    b"\x88": _push(lambda m: True),
    b"\x89": _push(lambda m: False),
    b"J": _push(lambda m: m.number("<i")),
    b"K": _push(lambda m: m.number("<B")),
    b"M": _push(lambda m: m.number("<H")),
    b"\x8a": _push(lambda m: int.from_bytes(m.take(m.number("<B")), "little", signed=True)),
    b"G": _push(lambda m: m.number(">d")),
    b"X": _push(_unicode("<I")),
    b"\x8c": _push(_unicode("<B")),
    b"\x8d": _push(_unicode("<Q")),
    b"T": _push(lambda m: m.long_bytes(m.number("<I"))),  # strings of Python 2 are bytes
    b"U": _push(lambda m: m.take(m.number("<B"))),
    b"B": _push(lambda m: m.long_bytes(m.number("<I"))),
    b"C": _push(lambda m: m.take(m.number("<B"))),
    b"\x8e": _push(lambda m: m.long_bytes(m.number("<Q"))),
    b"\x96": _push(lambda m: m.long_bytes(m.number("<Q"))),
    b"]": _push(lambda m: []),
    b"a": lambda m: m.append_items([m.stack.pop()]),
    b"e": lambda m: m.append_items(m.since_mark()),
    b")": _push(lambda m: ()),
    b"t": _push(lambda m: tuple(m.since_mark())),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"}": _push(lambda m: {}),
    b"s": lambda m: m.set_items([m.stack.pop(), m.stack.pop()][::-1]),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"q": _put(lambda m: m.number("<B")),
    b"r": _put(lambda m: m.number("<I")),
    b"\x94": _put(lambda m: len(m.memo)),
    b"h": _push(lambda m: m.memo[m.number("<B")]),
    b"j": _push(lambda m: m.memo[m.number("<I")]),
    b"c": lambda m: m.name(m.line(), m.line()),
    b"\x93": lambda m: m.stack_name(),
    b"R": lambda m: m.call(),
    b"b": lambda m: m.build(),
}
