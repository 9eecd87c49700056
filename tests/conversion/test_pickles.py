import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gmsop_jax.conversion.sources import Options, Request, open_source, pickles
from gmsop_jax.conversion.sources.files import FileArray
from gmsop_jax.errors import DataError


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_values(tmp_path: Path, protocol: int):
    value = {"ints": [0, -1, 255, 65536, 2**40], "text": "größe", "nested": {"t": (1, (2, 3), ())}, "none": None}
    value |= {"float": 0.5, "flags": [True, False], "many": list(range(5000)), "same": [[7]] * 2}
    assert pickles.load(write(tmp_path / "x", pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["u1", "<i8", ">i4", "<f4"])
def test_small_arrays(tmp_path: Path, protocol: int, dtype: str):
    array = np.arange(24).astype(dtype).reshape(4, 6)
    found = pickles.load(write(tmp_path / "x", pickle.dumps({"a": array}, protocol)))["a"]
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_long_arrays_stay_in_the_file(tmp_path: Path, protocol: int):
    array = np.random.default_rng(0).integers(0, 256, (50, 3000), np.uint8)
    found = pickles.load(write(tmp_path / "x", pickle.dumps({"a": array}, protocol)))["a"]
    assert isinstance(found, FileArray)
    np.testing.assert_array_equal(found[49], array[49])
    np.testing.assert_array_equal(found.whole(), array)


def test_strings_of_python_2(tmp_path: Path):
    # cPickle's protocol 2: {'labels': [1], 'data': 'ab'} with byte strings (SHORT_BINSTRING)
    found = pickles.load(write(tmp_path / "x", b"\x80\x02}(U\x06labels]K\x01aU\x04dataU\x02abu."))
    assert found == {"labels": [1], "data": "ab"}


class Evil:
    """Would make a file if it were run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


class Shell:
    def __reduce__(self):
        import os

        return (os.system, ("touch /tmp/never",))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_nothing_runs(tmp_path: Path, protocol: int):
    target = tmp_path / "made"
    data = pickle.dumps({"data": Evil(target)}, protocol)
    with pytest.raises(DataError, match=r"it refers to (pathlib|builtins|__builtin__)\.\w+"):
        pickles.load(write(tmp_path / "x", data))
    assert not target.exists()
    pickle.loads(data)  # it was dangerous indeed
    assert target.exists()


def test_the_refused_name_is_stated(tmp_path: Path):
    with pytest.raises(DataError, match=r"refers to (posix|nt)\.system, which could run code"):
        pickles.load(write(tmp_path / "x", pickle.dumps([Shell()])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "truncated"),
        (b"\x80\x04", "truncated"),
        (b"(dp0\n.", "not a pickle of protocol 2 or later"),
        (b"PK\x03\x04....", "not a pickle of protocol 2 or later"),
        (b"\x80\x04\xff.", "opcode .* unknown"),
        (b"\x80\x02ccodecs\nencode\n.", "refers to codecs.encode"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "refers to os.system"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "calls"),
        (b"\x80\x02cnumpy\nndarray\n.", "a function or a dtype that is not part of an array"),
        (b"\x80\x02K\x01)R.", "calls int"),
        (b"\x80\x02K\x01}b.", "BUILD of a int"),
        (b"\x80\x02K\x01K\x02a.", "APPENDS of a int"),
        (b"\x80\x02]K\x01K\x02s.", "SETITEMS of a list"),
        (b"\x80\x02}]K\x02s.", "keys are neither strings nor integers"),
        (b"\x80\x02})" + b"\x85" * 100_000 + b"Ns.", "keys are neither strings nor integers"),  # hashing it would crash
        (b"\x80\x02h\x05.", "it is damaged"),  # no such memo
        (b"\x80\x02.", "it is damaged"),  # nothing to return
        (b"\x80\x02K\x01\x86.", "it is damaged"),  # a pair of one
        (b"\x80\x02NQ.", "instruction BINPERSID"),
        (b"\x80\x02cos\nsystem", "without end"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "truncated"),
        (b"\x80\x02\x82\x01.", "instruction EXT1"),
        (b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff)R.", "calls NoneType"),  # a memo of 64 GB elsewhere
        (b"\x80\x02" + b"N\x85" + b"\x86".join([b"q\x00h\x00"] * 100) + b"\x86)R.", "calls tuple"),  # 2^100 paths
    ],
)
def test_refused(tmp_path: Path, data: bytes, message: str):
    with pytest.raises(DataError, match=message):
        pickles.load(write(tmp_path / "x", data))


@pytest.mark.parametrize("array", [np.array([{}], object), np.asfortranarray(np.zeros((2, 2))), np.array(["a"])])
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray):
    with pytest.raises(DataError, match="can't be read as a pickle of arrays"):
        pickles.load(write(tmp_path / "x", pickle.dumps({"a": array}, 4)))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}q\x00U\x01ah\x00s.",  # a dictionary that contains itself
        b"\x80\x02]q\x00h\x00a.",  # a list that contains itself
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",  # nested 100,000 deep
        b"\x80\x02}" + b"".join(b"q%c}U\x01ah%cs" % (k, k) for k in range(100)) + b".",  # shared, 2^100 paths
    ],
    ids=["itself", "list", "deep", "shared"],
)
def test_cycles_and_depth_are_harmless(tmp_path: Path, data: bytes):
    assert isinstance(pickles.load(write(tmp_path / "x", data)), dict | list)


def test_nested_labels_are_refused_without_walking_through_them(tmp_path: Path):
    nested = b"N\x85" + b"".join(b"q\x00h\x00\x86" for _ in range(60))  # a tuple of 2^60 paths
    image = pickle.dumps(np.zeros((1, 12), np.uint8), 2)[2:-1]
    data = b"\x80\x02}(U\x04data" + image + b"U\x06labels" + nested + b"u."
    write(tmp_path / "train_data_batch_1", data)
    with pytest.raises(DataError, match="'labels' is neither an array nor a list of integers"):
        open_source("imagenet64", Request(tmp_path, tmp_path / "scratch", options=Options(allow_partial=True)))


def test_the_number_of_instructions_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 1000)
    with pytest.raises(DataError, match="more than 1,000 instructions"):
        pickles.load(write(tmp_path / "x", b"\x80\x02" + b"N" * 2000 + b"."))


def test_an_empty_array_of_protocol_2(tmp_path: Path):
    data = pickle.dumps({"data": np.zeros((0, 12), np.uint8)}, 2)  # calls __builtin__.bytes()
    assert pickles.load(write(tmp_path / "x", data))["data"].shape == (0, 12)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4])
def test_fuzzed_pickles_raise_one_error(tmp_path: Path, protocol: int):
    """2,500 damaged files of each protocol: DataError, or plain values."""
    good = pickle.dumps({"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3], "x": 0.5}, protocol)
    rng, file, refused = np.random.default_rng(protocol), tmp_path / "x", 0
    for case in range(2500):
        damaged = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            damaged[rng.integers(len(good))] = rng.integers(256)
        if case % 4 == 0:
            at, length = rng.integers(len(good)), rng.integers(1, 20)
            damaged[at:at] = damaged[at : at + length]
        try:
            pickles.load(write(file, bytes(damaged)))
        except DataError:
            refused += 1
    assert refused > 500


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_escapes(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    good = pickle.dumps({"data": np.arange(12, dtype=np.uint8).reshape(3, 4), "labels": [1, 2, 3]}, 4)
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / "damaged", bytes(damaged))
    try:
        value = pickles.load(path)
    except DataError:
        return
    assert isinstance(value, (dict, list, tuple, int, float, str, bytes, type(None), np.ndarray))
