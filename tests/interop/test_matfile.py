"""MATLAB's files: every kind of value, and what damaged bytes do."""

import operator
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import zlib
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io

from gmsop_jax.errors import CheckpointError
from gmsop_jax.interop import matfile
from gmsop_jax.interop.matconvnet import load_checkpoint, save
from gmsop_jax.interop.matfile import isolated

FORMATS = {"v7": False, "v7.3": True}


def values():
    cells = np.empty((2, 2), object)
    cells[:] = [["text", np.eye(2)], [{"a": "b"}, np.zeros((0, 0))]]
    return {
        "double": np.arange(6.0).reshape(1, 2, 3),
        "single": np.array([[1.5], [np.nan], [-0.0]], np.float32),
        "integers": np.array([[2**63]], np.uint64),
        "logical": np.array([[True, False]]),
        "empty": np.zeros((0, 3)),
        "text": "mean_rgb",
        "greek": "σ√ε",
        "nothing": "",
        "cells": cells,
        "no_cells": np.empty((0, 0), object),
        "struct": {"field": np.ones((1, 1)), "inner": {"x": "y", "none": {}}},
        "structs": [{"name": "one", "value": np.eye(1)}, {"name": "two", "value": {}}],
    }


def assert_equal(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list) or (isinstance(a, np.ndarray) and a.dtype == object):
        assert np.shape(a) == np.shape(b)
        for x, y in zip(np.ravel(a), np.ravel(b), strict=True):
            assert_equal(x, y)
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    else:
        assert a == b


@pytest.mark.parametrize("name", FORMATS)
def test_every_kind_of_value_comes_back(tmp_path, name):
    matfile.write(tmp_path / "x.mat", values(), v73=FORMATS[name])
    read = matfile.read(tmp_path / "x.mat", list(values()))
    assert list(read) == list(values())
    for key, value in values().items():
        assert_equal(read[key], value)


@pytest.mark.parametrize("v73", FORMATS.values(), ids=FORMATS)
def test_a_write_that_fails_leaves_the_old_file(tmp_path, v73):
    matfile.write(tmp_path / "x.mat", {"a": np.eye(2)}, v73=v73)
    with pytest.raises(TypeError):
        matfile.write(tmp_path / "x.mat", {"a": np.eye(3), "b": object()}, v73=v73)
    np.testing.assert_array_equal(matfile.read(tmp_path / "x.mat", ["a"])["a"], np.eye(2))
    assert [file.name for file in tmp_path.iterdir()] == ["x.mat"]


def test_variables_that_nobody_asked_for_are_left(tmp_path):
    for v73 in FORMATS.values():
        matfile.write(tmp_path / "x.mat", {"a": np.eye(2), "b": np.eye(3)}, v73=v73)
        assert list(matfile.read(tmp_path / "x.mat", ["c", "b"])) == ["b"]


def test_numbers_that_matlab_packed_regain_their_class(tmp_path):
    """MATLAB stores a double or single array of small integers as bytes."""
    ones = np.array([[1.0, 2.0, 3.0]])
    for dtype, kind in (("f8", 6), ("f4", 7)):
        scipy.io.savemat(tmp_path / "x.mat", {"x": ones.astype(dtype)}, do_compression=False)
        content = bytearray((tmp_path / "x.mat").read_bytes())
        matrix = content[128:]
        data = matrix.index(np.array([{6: 9, 7: 7}[kind], ones.astype(dtype).nbytes], "<u4").tobytes())
        packed = matrix[8:data] + np.array([2 | 3 << 16], "<u4").tobytes() + b"\x01\x02\x03\x00"
        tag = np.array([14, len(packed)], "<u4").tobytes()
        (tmp_path / "y.mat").write_bytes(content[:128] + tag + packed)
        read = matfile.read(tmp_path / "y.mat", ["x"])["x"]
        assert (read.dtype, read.tolist()) == (np.dtype(dtype), ones.tolist())


def test_big_endian_files_are_read(tmp_path):
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"
    parts = [
        np.array([6, 8, 6, 0], ">u4").tobytes(),
        np.array([5, 8, 1, 1], ">u4").tobytes(),
        np.array([1 << 16 | 1], ">u4").tobytes() + b"x\0\0\0",
        np.array([9, 8], ">u4").tobytes() + np.array([2.5], ">f8").tobytes(),
    ]
    body = b"".join(parts)
    (tmp_path / "x.mat").write_bytes(header + np.array([14, len(body)], ">u4").tobytes() + body)
    np.testing.assert_array_equal(matfile.read(tmp_path / "x.mat", ["x"])["x"], [[2.5]])


def test_text_is_read_from_codes_of_16_bits(tmp_path):
    """As MATLAB stores characters outside ASCII."""
    text = np.array([4, 6], "<u4").tobytes() + "σ√ε".encode("utf-16-le") + bytes(2)
    (tmp_path / "x.mat").write_bytes(v7_file(head(4, (1, 3)) + text))
    assert matfile.read(tmp_path / "x.mat", ["x"])["x"] == "σ√ε"


def test_files_of_scipy_are_read(tmp_path):
    scipy.io.savemat(tmp_path / "x.mat", {"s": {"a": 1.0, "b": "text"}, "c": np.array([[1, "x"]], object)})
    read = matfile.read(tmp_path / "x.mat", ["s", "c"])
    assert read["s"]["b"] == read["c"][0, 1].replace("x", "text")
    assert read["s"]["a"] == read["c"][0, 0] == 1


def test_a_struct_that_holds_itself_is_refused(tmp_path):
    matfile.write(tmp_path / "x.mat", {"x": values()["cells"]}, v73=True)
    with h5py.File(tmp_path / "x.mat", "r+") as file:
        node: Any = file["x"]
        node[0, 0] = node.ref
    with pytest.raises(CheckpointError, match="contains itself"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_links_out_of_the_file_are_not_followed(tmp_path):
    matfile.write(tmp_path / "secret.mat", {"x": np.eye(2)}, v73=True)
    matfile.write(tmp_path / "x.mat", {"y": np.eye(2)}, v73=True)
    with h5py.File(tmp_path / "x.mat", "r+") as file:
        file["x"] = h5py.ExternalLink(str(tmp_path / "secret.mat"), "/x")
    with pytest.raises(CheckpointError, match="is a link"):
        matfile.read(tmp_path / "x.mat", ["x"])


def v7_file(variable: bytes) -> bytes:
    """A file with one compressed variable, given as its matrix element."""
    packed = zlib.compress(np.array([14, len(variable)], "<u4").tobytes() + variable)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    return header + np.array([15, len(packed)], "<u4").tobytes() + packed


def head(kind: int, shape: tuple[int, int]) -> bytes:
    flags, dimensions = np.array([6, 8, kind, 0], "<u4").tobytes(), np.array([5, 8, *shape], "<u4").tobytes()
    return flags + dimensions + np.array([1 << 16 | 1], "<u4").tobytes() + b"x\0\0\0"


def test_a_small_v7_file_cannot_claim_gigabytes(tmp_path):
    """Zeros stored as bytes, which are doubles in memory: 0.1 MB become 0.8 GB."""
    count = 100_000_000
    data = np.array([2, count], "<u4").tobytes() + bytes(count)
    (tmp_path / "x.mat").write_bytes(v7_file(head(6, (1, count)) + data))
    with pytest.raises(CheckpointError, match="MemoryError"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_a_small_v7_file_cannot_hold_millions_of_cells(tmp_path):
    count = 2_000_000
    (tmp_path / "x.mat").write_bytes(v7_file(head(1, (1, count)) + np.array([14, 0], "<u4").tobytes() * count))
    with pytest.raises(CheckpointError, match="more than 1,000,000 cells"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_a_small_v7_file_cannot_hold_millions_of_field_names(tmp_path):
    element = head(2, (1, 1)) + np.array([4 << 16 | 5, 1], "<u4").tobytes()
    (tmp_path / "x.mat").write_bytes(v7_file(element + np.array([1, 2**24], "<u4").tobytes() + bytes(2**24)))
    with pytest.raises(CheckpointError, match="MemoryError"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_a_v7_array_of_a_million_dimensions_is_refused(tmp_path):
    flags, name = np.array([6, 8, 6, 0], "<u4").tobytes(), np.array([1 << 16 | 1], "<u4").tobytes() + b"x\0\0\0"
    shape = np.array([5, 2000, *[1] * 500], "<u4").tobytes()
    (tmp_path / "x.mat").write_bytes(v7_file(flags + shape + name + np.array([9, 8, 0, 0], "<u4").tobytes()))
    with pytest.raises(CheckpointError, match="malformed"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_a_file_at_which_hdf5_hangs_is_refused(tmp_path, monkeypatch):
    """The free space of the heap with the names of fields has size 0: HDF5 never finishes."""
    matfile.write(tmp_path / "x.mat", {"x": {"a": np.eye(2)}}, v73=True)
    content = bytearray((tmp_path / "x.mat").read_bytes())
    heap = content.index(b"GCOL") + 16
    free = heap + 24  # after the only name
    assert not any(content[free : free + 8])
    content[free + 8 : free + 16] = bytes(8)
    (tmp_path / "x.mat").write_bytes(content)
    monkeypatch.setattr(isolated, "SECONDS", 3)
    with pytest.raises(CheckpointError, match="did not finish within 3 seconds"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_one_long_string_cannot_be_referred_to_many_times(tmp_path):
    with h5py.File(tmp_path / "x.mat", "w", userblock_size=512) as file:
        file.create_dataset("x", data=["text"] * 10, dtype=h5py.string_dtype())
        file.create_dataset("y", data=np.eye(2)).attrs["MATLAB_class"] = ["double"] * 10
    for name, message in (("x", "has the type object"), ("y", "has the attribute MATLAB_class of type")):
        with pytest.raises(CheckpointError, match=message):
            matfile.read(tmp_path / "x.mat", [name])


def test_thousands_of_field_names_cannot_refer_to_one_long_string(tmp_path):
    """1.2 MB that would become 3.7 GB."""
    length, count = 1_234_567, 3000
    names = np.empty(count, object)
    names[:] = [np.full(length, b"a", "S1")] + [np.array([b"b"], "S1")] * (count - 1)
    with h5py.File(tmp_path / "x.mat", "w", userblock_size=512) as file:
        file.create_group("x").attrs.create("MATLAB_fields", names, dtype=h5py.vlen_dtype(np.dtype("S1")))
    content = bytearray((tmp_path / "x.mat").read_bytes())
    first = content.index(length.to_bytes(4, "little"))
    while content[first + 16 : first + 20] != b"\1\0\0\0":  # the next string has one letter
        first = content.index(length.to_bytes(4, "little"), first + 1)
    content[first : first + 16 * count] = content[first : first + 16] * count
    (tmp_path / "x.mat").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"MemoryError|memory"):
        matfile.read(tmp_path / "x.mat", ["x"])


def test_a_graph_of_references_is_read_once(tmp_path):
    """24 cells, each of which refers twice to the next one: 2^24 paths."""
    with h5py.File(tmp_path / "x.mat", "w", userblock_size=512) as file:
        below = file.create_dataset("#refs#/0", data=np.ones((1, 1)))
        for level in range(1, 25):
            cell = file.create_dataset(f"#refs#/{level}" if level < 24 else "x", (2, 1), h5py.ref_dtype)
            cell[:, 0] = [below.ref, below.ref]
            cell.attrs["MATLAB_class"] = np.bytes_("cell")
            below = cell
    value = matfile.read(tmp_path / "x.mat", ["x"])["x"]
    for _ in range(24):
        assert value[0, 0] is value[0, 1]
        value = value[0, 0]
    assert value == 1


def test_arrays_larger_than_memory_are_refused(tmp_path):
    matfile.write(tmp_path / "x.mat", {"y": np.eye(2)}, v73=True)
    with h5py.File(tmp_path / "x.mat", "r+") as file:
        node = file.create_dataset("x", (2**40,), "f8", chunks=(1024,))
        node.attrs["MATLAB_class"] = np.bytes_("double")
    with pytest.raises(CheckpointError, match="claim more than"):
        matfile.read(tmp_path / "x.mat", ["x"])


def _decompressed(content: bytes) -> bytes:
    """The same v7 file with its variables stored as they are."""
    parts, start = [content[:128]], 128
    while start < len(content):
        size = int.from_bytes(content[start + 4 : start + 8], "little")
        parts.append(zlib.decompress(content[start + 8 : start + 8 + size]))
        start += 8 + size
    return b"".join(parts)


def _small_file(tmp_path: pathlib.Path, small_model, kind: str) -> bytes:
    path = tmp_path / "x.mat"
    save(path, *small_model("gap"), v73=kind == "v7.3")
    if kind == "uncompressed":
        return _decompressed(path.read_bytes())
    return path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["v7", "uncompressed", "v7.3"])
def test_fuzzed_files_raise_one_error(tmp_path, kind, monkeypatch):
    """2,500 damaged files of each kind, every one with a single variable: the variable is read, or refused."""
    monkeypatch.setattr(isolated, "SECONDS", 1)  # HDF5 hangs on one in 500
    draw, path, contents = random.Random(0), tmp_path / "x.mat", []
    for name, value in values().items():
        matfile.write(path, {name: value}, v73=kind == "v7.3")
        contents.append((name, _decompressed(path.read_bytes()) if kind == "uncompressed" else path.read_bytes()))
    refused = 0
    for i in range(2500):
        name, content = contents[i % len(contents)]
        damaged = bytearray(content)
        if i % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        for _ in range(draw.choice((1, 1, 4)) if damaged else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            matfile.read(path, [name])
        except CheckpointError:
            refused += 1
    assert refused > 500


def _exit() -> None:
    os._exit(3)


def _allocate(count: int) -> int:
    return len(bytearray(count))


def test_one_child_process_answers_many_calls_and_survives_crashes():
    def call(function, *arguments):
        return isolated.call(function, *arguments, seconds=0.5, memory_bytes=2**28)

    server = call(os.getppid)
    for function, arguments, message in (
        (_exit, (), "crashed with exit code 3"),
        (time.sleep, (60,), "did not finish within"),
        (_allocate, (2**30,), "MemoryError"),
        (operator.truediv, (1, 0), "ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(ValueError, match=message):
            call(function, *arguments)
        assert call(_allocate, 10) == 10
    assert call(os.getppid) == server
    assert server != os.getpid()


@pytest.mark.parametrize("kill_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_process_that_was_killed_is_started_again(kill_number):
    def call(function, *arguments):
        return isolated.call(function, *arguments, seconds=5, memory_bytes=2**28)

    server = call(os.getppid)
    os.kill(server, kill_number)
    while _runs(server):
        time.sleep(0.01)
    assert call(_allocate, 10) == 10
    assert call(os.getppid) != server


def test_the_child_process_ends_with_its_parent():
    """Also if the parent is killed, and while the child reads."""
    program = (
        "import os, threading, time\n"
        "from gmsop_jax.interop.matfile import isolated\n"
        "limits = {'seconds': 1, 'memory_bytes': 2**28}\n"
        "print(isolated.call(os.getppid, **limits), flush=True)\n"
        "isolated.call(time.sleep, 60, **limits)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        server = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        if not _runs(server):
            return
        time.sleep(0.1)
    pytest.fail("the server still runs")


def _runs(pid: int) -> bool:
    """Whether a process exists, not counting one whose parent has not fetched its status yet."""
    status = pathlib.Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize("kind", ["v7", "uncompressed", "v7.3"])
def test_damaged_files_are_read_or_refused(tmp_path, small_model, kind):
    """Files that are cut short or have flipped bits give a network or a CheckpointError, and no other exception."""
    content, draw = _small_file(tmp_path, small_model, kind), random.Random(0)
    outcomes = set()
    for i in range(150 if kind != "v7.3" else 20):
        damaged = bytearray(content)
        if i % 4 == 0:
            del damaged[draw.randrange(len(damaged)) :]
        for _ in range(draw.choice((1, 1, 4))):
            if damaged:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        (tmp_path / "damaged.mat").write_bytes(damaged)
        try:
            load_checkpoint(tmp_path / "damaged.mat")
            outcomes.add("read")
        except CheckpointError:
            outcomes.add("refused")
    assert "refused" in outcomes
