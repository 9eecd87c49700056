"""The layout of a working directory: its checkpoints, and the JSON files of which each checkpoint contains a copy."""

import json
import os
import pathlib
import re

from gmsop_jax.errors import CheckpointError, reason
from gmsop_jax.files import find_damage, read_bytes

DIRECTORY = "checkpoints"
WORKDIR_FILES = ("config.json", "inputs.json")  # each checkpoint contains a copy of them
_STEP = re.compile(r"0|[1-9][0-9]{0,17}")  # str.isdigit accepts "²" and "٣" too


def steps_on_disk(directory: pathlib.Path) -> list[int]:
    """Returns the steps that have a complete checkpoint, in ascending order."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if _STEP.fullmatch(name))


def latest_saved(directory: pathlib.Path) -> str:
    """Describes which step was saved last, for error messages."""
    steps = steps_on_disk(directory)
    return f"the latest saved step is {steps[-1]}" if steps else "no step has been saved"


def locate(path: str | os.PathLike[str]) -> tuple[pathlib.Path, int | None]:
    """Finds the folder of checkpoints and the step that a path refers to.

    Args:
      path: a working directory, its `checkpoints` folder, or the folder of a step in it.

    Returns: (folder, step), where step is None if the path does not refer to a single step.

    Raises:
      CheckpointError: if there is no checkpoint.
    """
    path = pathlib.Path(path)
    # the name of a working directory can be a number too
    step = int(path.name) if _STEP.fullmatch(path.name) and not (path / DIRECTORY).is_dir() else None
    folder = path.parent if step is not None else path
    if (folder / DIRECTORY).is_dir():
        folder = folder / DIRECTORY
    steps = steps_on_disk(folder)
    if not steps or (step is not None and step not in steps):
        there = f"; there are steps {', '.join(map(str, steps))}" if steps else ""
        raise CheckpointError(f"there is no checkpoint at {path}{there}; give the working directory of a training run")
    return folder, step


def read_file(workdir: pathlib.Path, name: str) -> str:
    """Returns one of `WORKDIR_FILES`, as text; if it is missing, the copy in the last checkpoint.

    Raises:
      CheckpointError: if the file can't be read as JSON, or if both are missing.
    """
    file = workdir / name
    try:
        text = read_bytes(file).decode() if file.exists() else read_copy(workdir, name)
        json.loads("{}" if text is None else text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} can't be read ({reason(error)}); copy it back, or delete it to use the copy in the last"
            " checkpoint, if there is one"
        ) from error
    if text is None:
        raise CheckpointError(f"{file} is missing, and no checkpoint contains a copy of it; copy it back")
    return text


def read_copy(workdir: pathlib.Path, name: str) -> str | None:
    """Returns the latest copy of one of `WORKDIR_FILES` in a checkpoint; None if no checkpoint contains one.

    Damaged copies, and checkpoints of older versions, which have no copy, are skipped.
    """
    for step in reversed(steps_on_disk(workdir / DIRECTORY)):
        folder = workdir / DIRECTORY / str(step)
        file = folder / "files" / "metadata"
        if file.exists() and find_damage(folder, below="files") is None:
            return json.loads(read_bytes(file)).get(name)
    return None
