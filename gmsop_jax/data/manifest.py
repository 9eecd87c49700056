"""dataset.json: what a data set directory holds, and the checks that it still does."""

import dataclasses
import json
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from gmsop_jax.errors import DataError, FileAccessError
from gmsop_jax.files import sha256, write_json

SCHEMA_VERSION = 1
FILE_NAME = "dataset.json"
JOB_DIR = ".convert"  # a conversion's own folder while it is unfinished

_LEAST_RECORD = 20  # bytes: the header
_MAX_BYTES = 2**26  # of dataset.json
_CONVERT = "make it with `python tools/convert.py SOURCE --output DIR`"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file, relative to the data set's directory."""

    file: str
    num_records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split.

    `image_size` is (height, width), or None if the images differ; `class_counts` has one count per
    class.
    """

    num_images: int
    image_size: tuple[int, int] | None
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of dataset.json.

    `mean_rgb` [3] and `covariance_rgb` [3, 3] are exact over all pixels of the training split, in
    0…255 units; `provenance` says how the set was made: source, files with their sums, options,
    seed, tool version.
    """

    name: str
    classes: tuple[str, ...]
    mean_rgb: tuple[float, float, float]
    covariance_rgb: tuple[tuple[float, float, float], ...]
    splits: Mapping[str, Split]
    provenance: Mapping[str, Any]
    schema_version: int = SCHEMA_VERSION

    @property
    def num_classes(self) -> int:
        """How many classes there are; labels are 0…num_classes − 1."""
        return len(self.classes)

    def split(self, name: str) -> Split:
        """The split of that name; DataError names the ones there are."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes dataset.json, whole or not at all."""
        write_json(Path(directory) / FILE_NAME, dataclasses.asdict(self))

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        verify_checksums: bool = False,
        splits: Collection[str] | None = None,
    ) -> "Manifest":
        """Reads dataset.json and checks it against the files beside it.

        Only the shards of `splits` need be there and are checked; of all splits where it is None.

        Shard sizes are always compared; their sha256 sums (which read every byte) only where
        `verify_checksums`.

        Raises: DataError if the directory is missing, empty, foreign or half-written, if its
          schema is another, or if a shard is missing, changed or named outside the directory.
        """
        path = Path(directory)
        manifest = _parse(_read(path), path / FILE_NAME)
        for name in manifest.splits if splits is None else splits:
            for shard in manifest.split(name).shards:
                check_shard(path, shard, verify_checksums)
        return manifest


def check_shard(directory: Path, shard: Shard, verify_checksum: bool) -> None:
    """Compares a shard's size with the manifest, and on demand its checksum.

    Raises:
      DataError: if the shard is missing or differs.
      FileAccessError: if the system refuses to read it.
    """
    path = directory / shard.file
    redo = "convert the data set again"
    if (size := shard_size(directory, shard)) != shard.bytes:
        raise DataError(f"shard {path} has {size} bytes instead of {shard.bytes}; {redo}")
    if verify_checksum and (found := sha256(path)) != shard.sha256:
        raise DataError(f"shard {path} has sha256 {found} instead of {shard.sha256}: its bytes changed; {redo}")


def shard_size(directory: Path, shard: Shard) -> int:
    """Bytes of a shard's file, which is opened to see whether it can be read.

    Raises:
      DataError: if the shard is missing from the data set, or isn't a file.
      FileAccessError: if the system refuses to open it, or the whole data set is gone.
    """
    path = directory / shard.file
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if not (directory / FILE_NAME).exists():
            raise FileAccessError(f"{directory} is no longer a data set: its {FILE_NAME} is missing") from error
        raise DataError(f"shard {path} is missing; convert the data set again") from error
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error
    try:
        status = os.fstat(file)
    finally:
        os.close(file)
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"shard {path} is not a file; convert the data set again")
    return status.st_size


def _read(path: Path) -> Any:
    file = path / FILE_NAME
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"no data set at {path.absolute()}: {_what_is_there(path)}") from None
    except NotADirectoryError:
        raise DataError(f"no data set at {path.absolute()}: it is a file, not a folder; {_CONVERT}") from None
    except OSError as error:
        raise FileAccessError.from_os_error(file, error) from error
    if len(text) > _MAX_BYTES:
        raise DataError(f"{file} is larger than {_MAX_BYTES} bytes, so it is not a manifest; {_CONVERT}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} can't be read as JSON ({error}); convert the data set again") from error


def _what_is_there(path: Path) -> str:
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return f"there is no such folder; {_CONVERT}"
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error
    if JOB_DIR in names:
        return (
            "it is half-written: run the same tools/convert.py command again to finish it (after --shard-range,"
            " tools/merge_manifests.py)"
        )
    return f"the folder {f'holds other files and no {FILE_NAME}' if names else 'is empty'}; {_CONVERT}"


def _parse(value: Any, file: Path) -> Manifest:
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version is None:
        raise DataError(f"{file} isn't a manifest of this project: it has no schema_version; {_CONVERT}")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"{file} has schema_version {version}; this release reads {SCHEMA_VERSION}: convert the data set again"
        )
    try:
        manifest = Manifest(
            name=str(value["name"]),
            classes=tuple(str(name) for name in value["classes"]),
            mean_rgb=_vector(value["mean_rgb"]),
            covariance_rgb=tuple(_vector(row) for row in value["covariance_rgb"]),
            splits={str(name): _parse_split(split) for name, split in value["splits"].items()},
            provenance=dict(value["provenance"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({type(error).__name__}: {error}); convert the data set again") from error
    _check(manifest, file)
    return manifest


def _vector(value: Any) -> tuple[float, float, float]:
    red, green, blue = value
    return float(red), float(green), float(blue)


def _parse_split(value: Any) -> Split:
    size = value["image_size"]
    return Split(
        num_images=int(value["num_images"]),
        image_size=None if size is None else (int(size[0]), int(size[1])),
        class_counts=tuple(int(count) for count in value["class_counts"]),
        shards=tuple(
            Shard(
                str(shard["file"]),
                int(shard["num_records"]),
                int(shard["bytes"]),
                str(shard["sha256"]),
            )
            for shard in value["shards"]
        ),
    )


def _check(manifest: Manifest, file: Path) -> None:
    if not manifest.classes or not manifest.splits:
        raise DataError(f"{file} names no classes or no splits; convert the data set again")
    for name, split in manifest.splits.items():
        for shard in split.shards:
            parts = PurePosixPath(shard.file).parts
            if len(parts) != 1 or parts[0] in ("..", ".", "/") or "\\" in shard.file:
                raise DataError(f"{file} names a shard outside its folder: {shard.file!r}; don't trust this data set")
            if not 0 <= shard.num_records * _LEAST_RECORD <= shard.bytes:
                raise DataError(
                    f"{file}: {shard.num_records} records don't fit into the {shard.bytes} bytes of {shard.file}; "
                    "convert the data set again"
                )
        records = sum(shard.num_records for shard in split.shards)
        if len(split.class_counts) != manifest.num_classes:
            raise DataError(
                f"{file}: split {name!r} counts {len(split.class_counts)} classes and the data set "
                "has "
                f"{manifest.num_classes}: labels would be out of range; convert the data set again"
            )
        if split.num_images != records or split.num_images != sum(split.class_counts):
            raise DataError(
                f"{file}: split {name!r} says {split.num_images} images, its shards {records}, its "
                "classes "
                f"{sum(split.class_counts)}; convert the data set again"
            )
