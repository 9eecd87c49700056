"""The manifest of a data set, dataset.json, and checks that the files beside it match it."""

import collections
import dataclasses
import json
import math
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from gmsop_jax.errors import DataError, FileAccessError
from gmsop_jax.files import open_file, sha256, write_json

SCHEMA_VERSION = 1
FILE_NAME = "dataset.json"
JOB_DIR = ".convert"  # the folder with the state of an unfinished conversion

_MIN_RECORD_BYTES = 20  # the header
_MAX_SIDE = 2**16 - 1  # the largest side of an image that a record's header can store
_MAX_NAME = 255  # bytes of a file name, the limit of most file systems
_MAX_BYTES = 2**26  # of dataset.json
_CONVERT = "create a data set with `gmsop convert SOURCE --output DIR`"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file; `file` is its name in the data set's directory."""

    file: str
    num_records: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split; `image_size` is None if the images differ in size."""

    num_images: int
    image_size: tuple[int, int] | None
    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of dataset.json.

    Attributes:
      classes: names of the classes, in the order of the labels.
      mean_rgb: exact mean over all pixels of the training split, 0…255, [3].
      covariance_rgb: exact covariance of the channels over the same pixels, [3, 3].
      provenance: how the data set was made: source, files with their checksums, options, seed, tool version.
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
        """Number of classes; labels are 0…num_classes − 1."""
        return len(self.classes)

    def split(self, name: str) -> Split:
        """Returns a split by its name. Raises DataError if it does not exist; the message lists the splits."""
        if name not in self.splits:
            raise DataError(f"data set {self.name!r} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]

    def image_size(self, split: str, side: int) -> tuple[int, int]:
        """Returns the height and width of a split's images after resizing to `side`; 0 means that they keep their size.

        Raises:
          DataError: if there is no such split, or its images differ in size and `side` is 0.
        """
        size = self.split(split).image_size
        if side:
            return side, side
        if size is None:
            raise DataError(
                f"the images of split {split!r} of data set {self.name!r} differ in size: set config.data.image_size"
            )
        return size

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes dataset.json atomically."""
        write_json(Path(directory) / FILE_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, directory: str | os.PathLike[str], splits: Collection[str] | None = None) -> "Manifest":
        """Reads dataset.json and compares the sizes of the shards of some splits, by default all, with it.

        Raises:
          DataError: if the directory is not a data set, is an incomplete one, or lacks one of the splits, if
            dataset.json is damaged or of another version, or if a shard is missing or of another size.
          FileAccessError: if one of these files can't be opened.
        """
        path = Path(directory)
        manifest = _parse(_read(path), path / FILE_NAME)
        for shard in manifest._shards(splits):
            if (size := shard_size(path, shard)) != shard.bytes:
                raise DataError(
                    f"shard {path / shard.file} has {size} bytes instead of {shard.bytes}; convert the data set again"
                )
        return manifest

    def verify_checksums(
        self,
        directory: str | os.PathLike[str],
        *,
        splits: Collection[str] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        """Compares the checksums of the shards of some splits, by default all, with the manifest; reads every byte.

        This process checks every `process_count`-th shard.

        Raises:
          DataError: if a shard is missing or its bytes changed.
          FileAccessError: if a shard can't be read.
        """
        for shard in self._shards(splits)[process_index::process_count]:
            path = Path(directory) / shard.file
            shard_size(Path(directory), shard)
            if (found := sha256(path)) != shard.sha256:
                raise DataError(
                    f"shard {path} has sha256 {found} instead of {shard.sha256}: its bytes changed; convert the data"
                    " set again"
                )

    def _shards(self, splits: Collection[str] | None) -> list[Shard]:
        return [shard for name in (self.splits if splits is None else splits) for shard in self.split(name).shards]


def shard_size(directory: Path, shard: Shard) -> int:
    """Opens a shard's file to check that it can be read, and returns its size in bytes.

    Raises:
      DataError: if the shard is missing from the data set, or isn't a file.
      FileAccessError: if it can't be opened, or dataset.json is missing too.
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
        with open_file(file) as opened:
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
        return f"the folder does not exist; {_CONVERT}"
    except OSError as error:
        raise FileAccessError.from_os_error(path, error) from error
    if JOB_DIR in names:
        return (
            "its conversion is unfinished: run the same `gmsop convert` command again to finish it (after"
            " --shard-range, `gmsop merge`)"
        )
    return f"the folder {f'contains other files and no {FILE_NAME}' if names else 'is empty'}; {_CONVERT}"


def _parse(value: Any, file: Path) -> Manifest:
    version = value.get("schema_version") if isinstance(value, dict) else None
    if version is None:
        raise DataError(f"{file} isn't a manifest of gmsop_jax: it has no schema_version; {_CONVERT}")
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
        _check(manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = error if isinstance(error, DataError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{file} is damaged ({reason}); convert the data set again") from error
    return manifest


def _vector(value: Any) -> tuple[float, float, float]:
    red, green, blue = (float(number) for number in value)
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError(f"{value} is not finite")
    return red, green, blue


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**53:
        raise ValueError(f"{str(value)[:40]} is not a count")
    return value


def _size(value: Any) -> tuple[int, int]:
    height, width = value
    return _count(height), _count(width)


def _parse_split(value: Any) -> Split:
    size = value["image_size"]
    return Split(
        num_images=_count(value["num_images"]),
        image_size=None if size is None else _size(size),
        class_counts=tuple(_count(count) for count in value["class_counts"]),
        shards=tuple(
            Shard(str(shard["file"]), _count(shard["num_records"]), _count(shard["bytes"]), str(shard["sha256"]))
            for shard in value["shards"]
        ),
    )


def _check(manifest: Manifest) -> None:
    """Checks values that have the right types but may be impossible or malicious."""
    if not manifest.classes or not manifest.splits:
        raise DataError("it lists no classes or no splits")
    files = [shard.file for split in manifest.splits.values() for shard in split.shards]
    if repeated := [file for file, count in collections.Counter(files).items() if count > 1]:
        raise DataError(f"it lists the shard {repeated[0]!r} more than once")
    for file in files:
        if not _is_plain_name(file):
            raise DataError(f"it lists a shard outside its folder: {file[:200]!r}; don't trust this data set")
    _check_provenance(manifest.provenance)
    for name, split in manifest.splits.items():
        _check_split(name, split, manifest.num_classes)


def _check_provenance(provenance: Mapping[str, Any]) -> None:
    for file in provenance.get("files", []):
        if not isinstance(file["name"], str) or type(file["bytes"]) is not int or "sha256" not in file:
            raise DataError(f"it lists an input file without its size or checksum: {str(file)[:200]}")
    if not isinstance(provenance.get("unreadable", []), list):
        raise DataError("its list of unreadable images is not a list")


def _is_plain_name(file: str) -> bool:
    return file not in ("", ".", "..") and not set(file) & set("/\\\0") and len(os.fsencode(file)) <= _MAX_NAME


def _check_split(name: str, split: Split, num_classes: int) -> None:
    if split.image_size and not all(1 <= side <= _MAX_SIDE for side in split.image_size):
        raise DataError(f"split {name!r} has images of {split.image_size}; sides must be from 1 to {_MAX_SIDE}")
    for shard in split.shards:
        if shard.num_records * _MIN_RECORD_BYTES > shard.bytes:
            raise DataError(f"{shard.num_records} records don't fit into the {shard.bytes} bytes of {shard.file}")
    if len(split.class_counts) != num_classes:
        raise DataError(
            f"split {name!r} counts the images of {len(split.class_counts)} classes, but the data set has {num_classes}"
        )
    records = sum(shard.num_records for shard in split.shards)
    if not split.num_images == records == sum(split.class_counts):
        raise DataError(
            f"split {name!r} has num_images {split.num_images}, but its shards have {records} records and its"
            f" class_counts add up to {sum(split.class_counts)}"
        )
