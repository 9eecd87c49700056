"""Files: atomic writes, and checksums that tell whether a folder is still what was written."""

import hashlib
import json
import os
import pathlib

FILE_NAME = "checksums.json"
_MOST_BYTES = 2**24  # of that file: some 100,000 entries


def write_atomic(path: pathlib.Path, content: str | bytes) -> None:
    """Writes a file under a temporary name, then renames it: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_checksums(folder: pathlib.Path) -> None:
    """Writes `checksums.json`: size and SHA-256 of every file in the folder's sub-folders.

    Files at its top are left out; Orbax still writes to them.
    """
    files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _measure(path) for path in files}
    (folder / FILE_NAME).write_text(json.dumps(sums, indent=1))


def find_damage(folder: pathlib.Path) -> str | None:
    """What is wrong with the folder's files; None if nothing is, or there is no `checksums.json`."""
    file = folder / FILE_NAME
    if not file.exists():
        return None
    try:
        if file.stat().st_size > _MOST_BYTES:
            return f"{FILE_NAME} is damaged"
        sums = {str(name): (int(size), str(digest)) for name, (size, digest) in json.loads(file.read_text()).items()}
        for name, (size, digest) in sums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size or _measure(path) != [size, digest]:
                return f"{name} was changed"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{FILE_NAME} or a file it names can't be read: {error}"
    return None


def _measure(path: pathlib.Path) -> list[int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return [path.stat().st_size, digest]
