"""Prepares the data set of a configuration: converts the embedded sample, or explains how to convert another one."""

import os
import sys
from pathlib import Path
from typing import Any

from gmsop_jax.data.manifest import FILE_NAME, JOB_DIR
from gmsop_jax.errors import DataError, FileAccessError, UserError


def prepare_data(data: Any) -> None:
    """Makes sure that a data set exists, as far as that is possible without downloading one.

    Args:
      data: the section `data` of a configuration. With `auto_convert`, the embedded sample of `source` is converted
        into `dir` if there is no data set yet, and a message says so.

    Raises:
      DataError: if the folder contains other files, if it does not exist and `auto_convert` is off, or if the
        conversion fails; the message explains what to do. (`Manifest.load` reports an empty folder and an unfinished
        conversion.)
      FileAccessError: if `dir` can't be read.
    """
    directory = Path(data.dir)
    try:
        if (directory / FILE_NAME).exists():
            return
        names = sorted(os.listdir(directory)) if directory.is_dir() else []
        exists = directory.exists()
    except OSError as error:
        raise FileAccessError.from_os_error(f"config.data.dir = {data.dir!r}", error) from error
    if names and not any(name.startswith(JOB_DIR) for name in names):
        raise DataError(
            f"no data set at {directory.absolute()} (config.data.dir): it contains other files, such as {names[0]}."
            " If these are images, convert them first, and train with the result:\n"
            f"  gmsop convert image-folder --input {directory} --output DIR\n"
            "  gmsop train --config.data.dir=DIR …"
        )
    if data.auto_convert:
        from gmsop_jax.conversion.convert import convert

        print(f"there is no data set at {directory} yet; converting {data.source} into this folder", file=sys.stderr)
        try:
            convert(data.source, None, directory)
        except UserError as error:
            raise DataError(f"config.data.dir = {data.dir!r} can't be prepared: {error}") from error
    elif not exists:
        raise DataError(
            f"no data set at {directory.absolute()} (config.data.dir). Convert one with\n"
            f"  gmsop convert {data.source} --input DOWNLOADS --output {directory}\n"
            "or give the folder of another with --config.data.dir=DIR. To start without a download, run\n"
            "  gmsop train --config quickstart"
        )
