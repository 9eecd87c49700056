import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time

import pytest

from gmsop_jax.errors import FileAccessError
from gmsop_jax.files import (
    FileLock,
    LockHeldError,
    find_damage,
    open_file,
    read_bytes,
    remove_temporary_files,
    replacing,
    sha256,
    write_atomic,
    write_checksums,
    write_json,
)


def test_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_atomic(file, "old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x.json", "old")]
    monkeypatch.undo()
    write_atomic(file, b"new")
    assert file.read_text() == "new"


def test_anything_but_a_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        open_file(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes("/dev/zero")
    with pytest.raises(OSError, match="not a regular file"):
        read_bytes(tmp_path)
    (tmp_path / "file").write_bytes(b"content")
    assert read_bytes(tmp_path / "file") == b"content"


def test_output_is_appended_to_what_standard_output_is_appended_to(tmp_path):
    (tmp_path / "log").write_text("old\n")
    code = "import pathlib; from gmsop_jax.files import write_output; write_output(pathlib.Path('/dev/stdout'), 'new')"
    with (tmp_path / "log").open("a") as file:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=file)
    assert (tmp_path / "log").read_text() == "old\nnew"


def test_temporary_files_of_killed_processes_are_removed(tmp_path):
    ended = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout.strip()
    kept = {"x.json", f"x.json.tmp-{os.getpid()}", "notes.tmp-mine"}
    for name in (*kept, f"x.json.tmp-{ended}", f"x.json.tmp-{10**30}"):
        (tmp_path / name).touch()
    remove_temporary_files(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == kept


def test_names_that_are_not_utf8_survive_in_json(tmp_path):
    value = {"dir": os.fsdecode(b"caf\xe9"), "width": "≥ ½"}
    write_json(tmp_path / "x.json", value)
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == value
    assert "≥ ½" in (tmp_path / "x.json").read_text("utf-8")


def test_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        with replacing(tmp_path / "x") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_unreadable_file_is_named(tmp_path):
    with pytest.raises(FileAccessError, match=f"{tmp_path / 'x'} can't be read"):
        sha256(tmp_path / "x")


@pytest.mark.parametrize("state", ["missing", "empty", "dangling", "no_entries", "deep"])
def test_files_without_checksums_count_as_damaged(tmp_path, state):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_text("content")
    write_checksums(tmp_path)
    assert find_damage(tmp_path) is None
    file = tmp_path / "checksums.json"
    file.unlink()
    if state == "dangling":
        file.symlink_to(tmp_path / "nowhere")
    elif state != "missing":
        file.write_text({"empty": "", "no_entries": "{}", "deep": "[" * 100_000}[state])
    assert "checksums.json" in (find_damage(tmp_path) or "")


def test_a_file_without_a_checksum_counts_as_damage(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in "ab":
        (tmp_path / "sub" / name).write_text(name)
    write_checksums(tmp_path)
    (tmp_path / "sub" / ".DS_Store").write_text("of the system")
    assert find_damage(tmp_path) is None
    sums = json.loads((tmp_path / "checksums.json").read_text())
    del sums["sub/b"]
    write_json(tmp_path / "checksums.json", sums)
    assert find_damage(tmp_path) == "checksums.json does not list sub/b"


# ---- locks


@pytest.fixture(params=["flock", "heartbeat"])
def kind(request, monkeypatch) -> str:
    """Locks of the operating system, and those of file systems that have none."""
    if request.param == "heartbeat":
        without_flock(monkeypatch)
    return request.param


def without_flock(monkeypatch) -> None:
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_lock_names_its_holder(tmp_path, kind):
    with FileLock(tmp_path / "lock") as lock:
        assert lock.is_held()
        assert bool(lock.note) == (kind == "heartbeat")
        with pytest.raises(LockHeldError, match=f"process {os.getpid()} on {socket.gethostname()}"):
            FileLock(tmp_path / "lock").acquire()
        assert lock.is_held()
    for _ in range(2):
        lock.acquire()
        lock.release()
        assert not lock.is_held()


def test_lock_that_was_removed_is_no_longer_held(tmp_path, kind):
    with FileLock(tmp_path / "lock") as lock:
        for file in tmp_path.iterdir():
            file.unlink()
        assert not lock.is_held()
    assert list(tmp_path.iterdir()) == []


HOLD_AND_DIE = """
import fcntl, os, pathlib, sys
from gmsop_jax.files import FileLock

def refuse(*_):
    raise OSError(37, "No locks available")

if sys.argv[2] == "heartbeat":
    fcntl.flock = refuse
FileLock(pathlib.Path(sys.argv[1])).acquire()
os._exit(9)
"""


def test_lock_ends_with_its_process(tmp_path, kind):
    command = [sys.executable, "-c", HOLD_AND_DIE, str(tmp_path / "lock"), kind]
    assert subprocess.run(command, check=False).returncode == 9
    with FileLock(tmp_path / "lock") as lock:
        assert lock.is_held()


def test_heartbeat_of_another_host(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    held = tmp_path / "lock.held"
    held.write_text("process 1 on elsewhere")
    with pytest.raises(LockHeldError, match="process 1 on elsewhere"):
        FileLock(tmp_path / "lock").acquire()
    long_ago = time.time() - 2 * FileLock.EXPIRY_SECONDS
    os.utime(held, (long_ago, long_ago))
    with FileLock(tmp_path / "lock") as lock:
        assert lock.is_held()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock"]


def test_heartbeat_renews_the_time_of_the_file(tmp_path, monkeypatch):
    without_flock(monkeypatch)
    monkeypatch.setattr(FileLock, "HEARTBEAT_SECONDS", 0.01)
    with FileLock(tmp_path / "lock"):
        os.utime(tmp_path / "lock.held", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock.held").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
