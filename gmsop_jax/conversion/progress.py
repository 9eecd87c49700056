"""Shows the progress of reading or writing many images."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

SECONDS_PER_LINE = 30


@contextlib.contextmanager
def count_images(
    action: str, total: int, *, initial: int = 0, enabled: bool = True
) -> Iterator[Callable[[int], object]]:
    """Yields a function that adds to the number of images that are done.

    The progress is shown on standard error: by a bar on a terminal, and elsewhere by a line every 30 seconds.
    """
    if not enabled or (sys.stderr is not None and sys.stderr.isatty()):
        with tqdm(total=total, initial=initial, unit=" images", desc=action, disable=not enabled) as bar:
            yield bar.update
        return
    done, next_line = initial, time.monotonic() + SECONDS_PER_LINE

    def count(more: int) -> None:
        nonlocal done, next_line
        done += more
        if time.monotonic() >= next_line:
            print(f"{action}: {done:,} of {total:,} images", file=sys.stderr, flush=True)
            next_line = time.monotonic() + SECONDS_PER_LINE

    yield count
