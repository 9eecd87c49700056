"""Reads pickles of numbers and NumPy arrays without executing them and without loading the arrays.

A pickle is a program for a small stack machine, one of whose instructions calls any function by name. `pickletools`
decodes the instructions. This module executes only those that numbers, strings, lists, tuples, dictionaries and NumPy
arrays need, and calls nothing: it recognises the few names in the pickle of an array and rejects all others.

`pickle.Unpickler` with a restricted `find_class` is not enough. It loads every array, 1.5 GB for one file of ImageNet.
A few bytes can make it allocate gigabytes (by an index into its memo) or crash (by hashing a deeply nested tuple). And
NumPy's `__setstate__` trusts what the file states about the memory layout of an array.
"""

import dataclasses
import math
import pickletools
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from gmsop_jax.conversion.sources.files import FileArray, open_binary
from gmsop_jax.errors import DataError

_LAZY_BYTES = 2**16  # strings of this length or more are not loaded
_MAX_LINE = 1000
_MAX_DIMENSIONS = 8
MAX_INSTRUCTIONS = 5_000_000  # ImageNet's largest file has 0.3 million
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_NUMBERS_AND_STRINGS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_NUMBERS_AND_STRINGS |= {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"}
_NUMBERS_AND_STRINGS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_ALLOWED_NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    "numpy.core.multiarray _reconstruct": "reconstruct",
    "numpy._core.multiarray _reconstruct": "reconstruct",
    "numpy.core.numeric _frombuffer": "frombuffer",
    "numpy._core.numeric _frombuffer": "frombuffer",
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
    "builtins bytes": "bytes",
}


@dataclasses.dataclass(frozen=True)
class _Name:
    """An allowed global."""

    role: str


@dataclasses.dataclass
class _Dtype:
    code: str


@dataclasses.dataclass
class _Array:
    """An array as the instruction BUILD or `_frombuffer` describes it, before anything has been checked."""

    shape: Any = ()
    dtype: Any = None
    fortran: Any = False
    data: Any = b""


@dataclasses.dataclass(frozen=True)
class _Skipped:
    """A string that was not loaded."""

    offset: int
    length: int


class _Placeholder(bytes):
    """What `pickletools` receives for a skipped string, of which it checks only the length."""

    length = 0

    def __len__(self) -> int:
        return self.length


class _File:
    """The file as `pickletools` reads it; `skipped` is the most recently skipped string."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file, self._path = file, path
        self._size = file.seek(0, 2)
        self.tell = file.tell
        self.skipped: _Skipped | None = None
        file.seek(0)

    def read(self, count: int) -> bytes:
        start = self.tell()
        if start + count > self._size:
            raise self.error("it is truncated")
        if count < _LAZY_BYTES:
            return self._file.read(count)
        self._file.seek(start + count)
        self.skipped = _Skipped(start, count)
        placeholder = _Placeholder()
        placeholder.length = count
        return placeholder

    def readline(self) -> bytes:
        line = self._file.readline(_MAX_LINE)
        if not line.endswith(b"\n") or b"\\" in line:  # pickletools would warn of unknown escapes
            raise self.error("it contains a line without end, or with a backslash,")
        return line

    def error(self, problem: str) -> DataError:
        return DataError(f"{self._path} can't be read as a pickle of arrays: {problem} at byte {self.tell():,}")


def load(path: Path) -> Any:
    """Reads a pickle file.

    Returns: the pickled object, in which an array is a FileArray, or an ndarray if it is small. If the object is a
      dictionary, this applies to its values, and keys that are bytes become strings.

    Raises:
      DataError: if the file is truncated, is not a pickle, or contains anything but arrays and plain values.
    """
    with open_binary(path) as opened:
        file = _File(opened, path)
        try:
            value = _run(file)
            if isinstance(value, dict):
                return {_text(key): _plain(item, path) for key, item in value.items()}
            return _plain(value, path)
        except DataError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise file.error(f"it is damaged, or contains something else ({type(error).__name__}: {error}),") from error


def _run(file: _File) -> Any:
    """Executes the instructions. Containers are never traversed, so cycles and deep nesting do no harm."""
    if not b"\x80\x02" <= file.read(2) < b"\x81":
        raise file.error("it is not a pickle of protocol 2 or later")
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    decodable: Any = file
    argument: Any
    for count, (instruction, argument, _) in enumerate(pickletools.genops(decodable)):
        if count >= MAX_INSTRUCTIONS:
            raise file.error(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        name = instruction.name
        if name in _NUMBERS_AND_STRINGS:
            stack.append(file.skipped or argument)
            file.skipped = None
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            items, stack = stack, below.pop()
            _collect(name, stack, items)
        elif name == "APPEND":
            _collect("APPENDS", stack, [stack.pop()])
        elif name == "SETITEM":
            _collect("SETITEMS", stack, [stack.pop(), stack.pop()][::-1])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(items[::-1]))
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            stack.append(_global(argument or " ".join([_text(stack.pop()), _text(stack.pop())][::-1])))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "BUILD":
            _build(stack.pop(), stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name != "FRAME":  # only a hint for buffering
            raise file.error(f"it contains the instruction {name}")


def _collect(name: str, stack: list[Any], items: list[Any]) -> None:
    """Adds items to the list or dictionary at the top of the stack, or makes them a tuple there."""
    if name == "TUPLE":
        stack.append(tuple(items))
        return
    target = stack[-1]
    if name == "APPENDS" and isinstance(target, list):
        target.extend(items)
    elif name == "SETITEMS" and isinstance(target, dict):
        if not all(isinstance(key, str | bytes | int) for key in items[::2]):
            raise ValueError("a dictionary whose keys are neither strings nor integers")
        target.update(zip(items[::2], items[1::2], strict=True))
    else:
        raise ValueError(f"{name} of a {type(target).__name__}")


def _global(name: str) -> _Name:
    if name not in _ALLOWED_NAMES:
        raise ValueError(f"it refers to {name.replace(' ', '.')}, which could run code and which no data file needs")
    return _Name(_ALLOWED_NAMES[name])


def _call(function: Any, arguments: Any) -> Any:
    role = function.role if isinstance(function, _Name) else type(function).__name__
    if role == "reconstruct":
        return _Array()
    if role == "dtype":
        return _Dtype(_text(arguments[0]))
    if role == "frombuffer":
        data, dtype, shape, order = arguments
        return _Array(shape, dtype, order == "F", data)
    if role == "bytes" and not arguments:
        return b""
    if role == "encode" and arguments[1] in ("latin1", "latin-1"):
        if isinstance(arguments[0], _Skipped):
            raise ValueError("an array in the text form of pickle protocol 2; save it with protocol 4")
        return _text(arguments[0]).encode("latin-1")
    raise ValueError(f"it calls {role}")


def _build(state: Any, target: Any) -> None:
    if isinstance(target, _Array):
        _, target.shape, target.dtype, target.fortran, target.data = state
    elif isinstance(target, _Dtype):
        order = _text(state[1])
        target.code = target.code if order == "|" else order + target.code
    else:
        raise ValueError(f"BUILD of a {type(target).__name__}")


def _text(value: Any) -> Any:
    """Returns bytes, such as the strings of Python 2, as str; integers are returned unchanged."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str | int):
        raise TypeError(f"expected a string, found {type(value).__name__}")
    return value


def _plain(value: Any, path: Path) -> Any:
    if isinstance(value, _Array):
        return _array(value, path)
    if isinstance(value, (_Skipped, _Name, _Dtype)):
        raise ValueError("it contains a long string, a function or a dtype that is not part of an array")
    return value


def _array(value: _Array, path: Path) -> FileArray | np.ndarray:
    code, shape, data = value.dtype.code, value.shape, value.data
    if not re.fullmatch("[<>]?[uif][1248]", code):
        raise ValueError(f"an array of dtype {code[:20]!r}; expected numbers")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError("an array whose shape is not a tuple of sizes")
    if not 1 <= len(shape) <= _MAX_DIMENSIONS or (value.fortran and len(shape) > 1):
        raise ValueError(f"an array of {len(shape)} dimensions{' in Fortran order' if value.fortran else ''}")
    dtype = np.dtype(code)
    if isinstance(data, str):
        data = data.encode("latin-1")
    length = data.length if isinstance(data, _Skipped) else len(data)
    if length != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} with {length:,} bytes")
    if isinstance(data, _Skipped):
        return FileArray(path, data.offset, shape, dtype.str)
    return np.frombuffer(data, dtype).reshape(shape)
