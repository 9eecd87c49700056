"""Arrays that stay in their files, and the archives they may have to be unpacked from."""

import dataclasses
import math
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from gmsop_jax.errors import DataError
from gmsop_jax.files import replacing


@dataclasses.dataclass(frozen=True)
class FileArray:
    """A C-ordered array in a file, uncompressed; one read per item, so memory stays constant.

    It may be pickled: the descriptor belongs to the process.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: str = "u1"

    def __post_init__(self) -> None:
        end = self.offset + len(self) * self.item_bytes
        if (size := self.path.stat().st_size) < end:
            raise DataError(
                f"{self.path} is truncated: it has {size:,} bytes and its {len(self):,} items need "
                f"{end:,}; "
                "download it again"
            )

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def item_bytes(self) -> int:
        """Bytes of one item."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def __getitem__(self, index: int) -> np.ndarray:
        """Item `index`, of shape `shape[1:]`."""
        data = read_at(self.path, self.offset + index * self.item_bytes, self.item_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape[1:])

    def whole(self) -> np.ndarray:
        """All of it in memory, for labels and the like."""
        data = read_at(self.path, self.offset, len(self) * self.item_bytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset`; DataError if it ends before."""
    data = os.pread(_descriptor(path), size, offset)
    if len(data) != size:
        raise DataError(f"{path} is truncated: it ends before byte {offset + size:,}; download it again")
    return data


_descriptors: dict[Path, int] = {}


def _descriptor(path: Path) -> int:
    """This process's descriptor of a file: one each, kept until the process ends."""
    if path not in _descriptors:
        _descriptors[path] = os.open(path, os.O_RDONLY)
    return _descriptors[path]


def npy_array(path: Path, offset: int = 0) -> FileArray:
    """The array of a .npy file that begins at `offset` of `path`; DataError if it is none."""
    with path.open("rb") as file:
        file.seek(offset)
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read_header = np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
        except (ValueError, EOFError) as error:
            raise DataError(f"{path} holds no readable .npy array ({error})") from error
        start = file.tell()
    if dtype.hasobject:
        raise DataError(f"{path} holds Python objects (dtype {dtype}); such arrays are refused")
    if (fortran and len(shape) > 1) or not shape:
        raise DataError(f"{path} holds an array of shape {shape} in Fortran order; expected C order")
    return FileArray(path, start, shape, dtype.str)


def npz_arrays(path: Path, names: Sequence[str], scratch: Path) -> dict[str, FileArray]:
    """The arrays of those names in an .npz file; compressed ones are unpacked into `scratch`."""
    arrays = {}
    with open_zip(path) as archive:
        members = {Path(info.filename).stem: info for info in archive.infolist()}
        for name in names:
            if name not in members:
                raise DataError(f"{path} lacks {name!r}; it holds {', '.join(sorted(members))}")
            info = members[name]
            if info.compress_type == zipfile.ZIP_STORED:
                arrays[name] = npy_array(path, _data_offset(path, info))
            else:
                arrays[name] = npy_array(unpack(archive, info, scratch))
    return arrays


def open_zip(path: Path) -> zipfile.ZipFile:
    """A zip file opened for reading; DataError if it is none."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} isn't a whole zip archive ({error}); download it again") from error


def unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, scratch: Path) -> Path:
    """A member's bytes as a file in `scratch`, unpacked unless it is there already."""
    scratch.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W", "_", f"{Path(str(archive.filename)).name}-{member.filename}")
    target = scratch / f"{stem}-{member.CRC:08x}{Path(member.filename).suffix}"
    if target.exists():
        return target
    check_space(scratch, member.file_size)
    try:
        with archive.open(member) as packed, replacing(target) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{archive.filename}: {member.filename} can't be unpacked ({error}); download it again"
        ) from error
    return target


def check_space(folder: Path, needed: int) -> None:
    """Raises DataError unless `needed` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{folder.absolute()} needs {needed / 2**20:,.0f} MiB, but its disk has only {free / 2**20:,.0f} MiB free;"
            " make room, or give a folder on another disk"
        )


def read_lines(file: Path) -> list[str]:
    """The non-empty lines of a small UTF-8 text file; DataError if it is none."""
    try:
        return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} can't be read as text ({error})") from error


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    header = read_at(path, info.header_offset, 30)
    if header[:4] != b"PK\3\4":
        raise DataError(f"{path} isn't a whole zip archive ({info.filename} has no header); download it again")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + 30 + name + extra


def open_binary(path: Path) -> IO[bytes]:
    """A file opened for reading; DataError if that fails."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} can't be opened ({error})") from error
