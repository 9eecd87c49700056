"""Reads arrays from files item by item, and unpacks archives."""

import contextlib
import dataclasses
import functools
import lzma
import math
import os
import re
import shutil
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Literal

import numpy as np

from gmsop_jax.errors import DataError
from gmsop_jax.files import Budget, replacing

# What the standard library raises for damaged or unsupported archives and headers.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    RuntimeError,  # encrypted; NotImplementedError: an unsupported compression, such as Deflate64
    ValueError,
    OverflowError,
    IndexError,
)
# RecursionError: headers within headers; MemoryError and OverflowError: impossible sizes.
_TAR_ERRORS = (tarfile.TarError, zlib.error, OSError, EOFError, ValueError, OverflowError, MemoryError, RecursionError)
_HEADER_ERRORS = (ValueError, TypeError, EOFError, OverflowError, SyntaxError, tokenize.TokenError, MemoryError)


@dataclasses.dataclass(frozen=True)
class FileArray:
    """An uncompressed, C-ordered array in a file. Each item is read when it is needed, so memory use is constant."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str = "u1"

    def __post_init__(self) -> None:
        end = self.offset + len(self) * self.item_bytes
        if (size := self.path.stat().st_size) < end:
            raise DataError(
                f"{self.path} is truncated: its {len(self):,} items need {end:,} bytes, but it has {size:,};"
                " download it again"
            )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns item `index`, an array of shape `shape[1:]`."""
        data = read_at(self.path, self.offset + index * self.item_bytes, self.item_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])

    def whole(self) -> np.ndarray:
        """Returns the whole array, for example of labels."""
        data = read_at(self.path, self.offset, len(self) * self.item_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes of a file from `offset`. Raises DataError if the file ends too early."""
    try:
        with path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except (OSError, OverflowError) as error:
        raise DataError(f"{path} can't be read at byte {offset:,} ({error})") from error
    if len(data) != size:
        raise DataError(f"{path} is truncated: it ends before byte {offset + size:,}; download it again")
    return data


def npy_array(path: Path, offset: int = 0) -> FileArray:
    """Describes the array of a .npy file that begins at `offset` of `path`.

    Raises:
      DataError: if the file is damaged, or its array does not consist of numbers in C order.
    """
    with path.open("rb") as file:
        file.seek(offset)
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
        except _HEADER_ERRORS as error:
            raise DataError(f"{path} does not contain a readable .npy array ({error}); download it again") from error
        start = file.tell()
    if dtype.hasobject:
        raise DataError(f"{path} contains Python objects (dtype {dtype}); only arrays of numbers are supported")
    if dtype.kind not in "uif" or any(type(n) is not int or n < 0 for n in shape):
        raise DataError(f"{path} contains an array of dtype {dtype} and shape {shape}; expected numbers")
    if (fortran and len(shape) > 1) or not shape:
        raise DataError(
            f"{path} contains an array of shape {shape}{' in Fortran order' * fortran}; expected C order and at least"
            " one axis"
        )
    return FileArray(path, start, shape, dtype.str)


def npz_arrays(path: Path, names: Sequence[str], scratch: Path) -> dict[str, FileArray]:
    """Describes arrays of an .npz file after checking their CRCs; compressed ones are unpacked into `scratch`."""
    arrays = {}
    with open_zip(path) as archive:
        members = {Path(info.filename).stem: info for info in archive.infolist()}
        for name in names:
            if name not in members:
                raise DataError(f"{path} has no array {name!r}; it contains {', '.join(sorted(members))}")
            info = members[name]
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                arrays[name] = npy_array(path, _stored_member(path, info))
            else:
                arrays[name] = npy_array(unpack(archive, info, scratch))
    return arrays


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip file for reading. Raises DataError if it is not one."""
    try:
        return zipfile.ZipFile(path)
    except (*_ZIP_ERRORS, OSError) as error:
        raise DataError(f"{path} is not a complete zip archive ({error}); download it again") from error


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, scratch: Path) -> Path:
    """Unpacks a member into `scratch` and returns the file; a file that is there already is kept."""
    scratch.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W", "_", f"{Path(str(archive.filename)).name}-{member.filename}")[-200:]
    target = scratch / f"{stem}-{member.CRC:08x}{Path(member.filename).suffix[:8]}"
    if target.exists():
        return target
    check_space(scratch, member.file_size)
    try:
        Budget(member.compress_size).take_bytes(member.file_size)
        with archive.open(member) as packed, replacing(target) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
        return target
    except (*_ZIP_ERRORS, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{target} can't be written ({error.strerror})") from error
        raise DataError(
            f"{archive.filename}: {member.filename} can't be unpacked ({error}); download it again"
        ) from error


def tar_members(path: Path, mode: Literal["r:", "r:gz"]) -> Iterator[tuple[tarfile.TarInfo, Callable[[], bytes]]]:
    """Yields the regular files of a tar archive, each with a function that reads it, to be called before the next file.

    Raises:
      DataError: if the archive is damaged or truncated.
    """
    with _explaining_tar_errors(path), tarfile.open(path, mode) as archive:
        end = 0
        for member in archive:
            if member.offset < end or member.size < 0:  # the headers of a damaged file may form a cycle
                raise tarfile.ReadError(f"the member at byte {member.offset:,} has a wrong size")
            end = member.offset_data
            if member.isfile() and not member.issparse():
                yield member, functools.partial(_read_member, path, archive, member)
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]  # otherwise all stay in memory


def _read_member(path: Path, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _explaining_tar_errors(path):
        file = archive.extractfile(member)
        assert file is not None  # it is a regular file
        return file.read()


@contextlib.contextmanager
def _explaining_tar_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except _TAR_ERRORS as error:
        raise DataError(f"{path} is not a complete tar archive ({error}); download it again") from error


def check_space(folder: Path, needed: int) -> None:
    """Raises DataError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder.absolute()} needs {needed / 2**20:,.0f} MiB, but its disk has only {free / 2**20:,.0f} MiB free;"
            " free some space, or give a folder on another disk"
        )


def read_lines(file: Path) -> list[str]:
    """Returns the non-empty lines of a UTF-8 text file. Raises DataError if it can't be read as one."""
    if not file.is_file():
        raise DataError(f"{file} does not exist or is not a file")
    try:
        return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read as text ({error})") from error


def _stored_member(path: Path, info: zipfile.ZipInfo) -> int:
    """Returns the offset of an uncompressed member in its archive, after verifying the member's CRC."""
    header = read_at(path, info.header_offset, 30)
    if header[:4] != b"PK\3\4":
        raise DataError(f"{path} is not a complete zip archive ({info.filename} has no header); download it again")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = info.header_offset + 30 + name + extra
    crc = 0
    for offset in range(0, info.file_size, 2**24):
        crc = zlib.crc32(read_at(path, start + offset, min(2**24, info.file_size - offset)), crc)
    if crc != info.CRC:
        raise DataError(f"{path}: {info.filename} is damaged (its CRC is wrong); download it again")
    return start


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file for reading. Raises DataError if that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} can't be opened ({error})") from error
