"""Worker processes that prepare batches, and end when the run is stopped or killed."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
import numpy as np
from absl import flags

from gmsop_jax.errors import DataError

Batch = dict[str, np.ndarray]


class WorkerIterator(grain.DatasetIterator[Batch]):
    """Batches that are prepared by worker processes.

    The workers block signals, because a terminal or a cluster's scheduler sends a signal to all processes of a run, and
    the main process may need some more batches before it has saved its state. The workers end when the main process
    ends, even if it is killed. The batches are divided among the workers.
    """

    def __init__(self, dataset: grain.IterDataset[Batch], num_workers: int) -> None:
        if not flags.FLAGS.is_parsed():  # Grain requires parsed flags, which programs without absl.app don't have
            flags.FLAGS.mark_as_parsed()
        with _signals_blocked():  # SIGHUP would end Python's tracker of shared memory
            resource_tracker.ensure_running()  # started now, because starting it unblocks SIGINT and SIGTERM
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        self._batches = iter(dataset.mp_prefetch(options, _end_with_parent))
        self._num_workers = num_workers
        self._started = False
        super().__init__(self._batches)

    def __next__(self) -> Batch:
        """Returns the next batch, copied from memory that is shared with a worker and freed afterwards.

        Raises: DataError if a worker died.
        """
        try:
            with contextlib.nullcontext() if self._started else _signals_blocked():  # new processes inherit the mask
                batch = next(self._batches)
        except RuntimeError as error:
            if "was terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                f"a data worker process died ({str(error).partition('. ')[0]}); if it ran out of memory, lower"
                f" config.data.num_workers (now {self._num_workers}) or config.data.num_threads. Run the same command"
                " again to resume from the last checkpoint"
            ) from error
        self._started = True
        return {name: np.array(values) for name, values in batch.items()}

    def get_state(self) -> Any:
        """Returns the positions of the workers."""
        return self._batches.get_state()

    def set_state(self, state: Any) -> None:
        """Moves the workers to positions that `get_state` returned."""
        self._batches.set_state(state)
        self._started = False


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(worker_index: int, worker_count: int) -> None:
    del worker_index, worker_count

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
