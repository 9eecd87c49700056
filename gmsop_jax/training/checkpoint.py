"""Checkpoints of a run, written asynchronously by Orbax. The latest n and the best are kept."""

import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gmsop_jax.errors import CheckpointError
from gmsop_jax.files import find_damage, read_bytes, write_checksums
from gmsop_jax.training.layout import WORKDIR_FILES, latest_saved, steps_on_disk
from gmsop_jax.training.processes import first_process_does
from gmsop_jax.training.step import TrainState

_DAMAGED = "damaged-checkpoints"  # beside the folder of checkpoints: damaged checkpoints are moved to it
_DISCARDED = "discarded"  # inside the folder of checkpoints: contains old checkpoints while they are being deleted
_ITEMS = ("params", "batch_stats", "opt_state")
_AVERAGES = "ema"  # averages of params and batch_stats, in a run that computes them


@dataclasses.dataclass(frozen=True)
class Progress:
    """The progress of a run, which is stored with its arrays.

    Attributes:
      step: number of optimiser steps. Together with the seed, it determines the position in the data and in every
        random stream.
      epoch: number of complete epochs.
      wall_seconds: seconds spent so far, in total over all starts of the run.
      skipped: steps that were skipped because the loss, its gradient or the state was not finite.
      pending: totals of the training metrics since the last record (`metrics.add_up`).
    """

    step: int
    epoch: int
    wall_seconds: float
    skipped: tuple[int, ...] = ()
    pending: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _error(metrics: Mapping[str, float]) -> float:
    return metrics["top1_error"]


class Checkpoints:
    """The checkpoints in a folder, with one sub-folder per step.

    Parameters, batch statistics, optimiser state and averages are stored separately. A checkpoint is written under a
    temporary name, together with the checksums of its files, and renamed when it is complete.

    Attributes:
      set_aside: a message for each damaged checkpoint that was moved away when the folder was opened; only in the first
        process.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int | None = None, read_only: bool = False):
        """Opens the folder. Unless `read_only` is set, creates it if necessary, and moves damaged checkpoints away.

        The latest `keep` checkpoints are kept, besides the best; None keeps all.

        Raises:
          CheckpointError: if all checkpoints are damaged, if a file in them isn't a regular file, or if the folder
            can't be read or written to.
        """
        self.directory = path = pathlib.Path(directory).absolute()
        self.set_aside: list[str] = []
        self._files = {} if read_only else _read_files(path.parent)
        if not read_only:
            first_process_does(self._clean_up)
        self._check_regular_files()
        _silence_orbax()
        options = ocp.CheckpointManagerOptions(
            best_fn=_error,  # without this function, Orbax writes no metrics
            preservation_policy=_latest_and_best(keep),
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            todelete_subdir=None if read_only else _DISCARDED,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._before_rename),
        )
        with self._open_failure_as_error() if read_only else self._write_failure_as_error():
            self._manager = ocp.CheckpointManager(path, options=options, handler_registry=_handlers())
            # kept open, so that no new folder can reuse its inode number
            self._folder = None if read_only else os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        # if an error is already being raised, closing often fails for the same reason; the first error is reported
        with contextlib.suppress(CheckpointError) if kind else contextlib.nullcontext():
            self.close()

    def _folder_of(self, step: int) -> pathlib.Path:
        return self.directory / str(step)

    def _damaged(self) -> dict[int, str]:
        """Returns a message for each damaged step."""
        found = {step: find_damage(self._folder_of(step)) for step in steps_on_disk(self.directory)}
        return {step: f"checkpoint {self._folder_of(step)} is damaged ({what})" for step, what in found.items() if what}

    def _clean_up(self) -> None:
        """Finishes the deletions of a killed process, and moves damaged checkpoints out of the way."""
        self._delete_discarded()
        damaged = self._damaged()
        if damaged and len(damaged) == len(steps_on_disk(self.directory)):
            raise CheckpointError(
                "; ".join(damaged.values()) + ": there is no intact checkpoint to resume from; give another --workdir"
            )
        for step, line in damaged.items():
            target = self.directory.parent / _DAMAGED / str(step)
            with self._write_failure_as_error():
                while target.exists():
                    target = target.with_name(f"{target.name}_")
                target.parent.mkdir(exist_ok=True)
                self._folder_of(step).rename(target)
            self.set_aside.append(f"{line}; moved to {target}")

    def _check_regular_files(self) -> None:
        """Raises CheckpointError for anything but regular files and folders. A named pipe, say, would block Orbax."""
        for step in steps_on_disk(self.directory):
            with contextlib.suppress(FileNotFoundError):  # another process may be deleting an old checkpoint
                for file in self._folder_of(step).rglob("*"):
                    if file.exists() and not (file.is_file() or file.is_dir()):
                        raise CheckpointError(f"{file} is not a regular file; copy the checkpoint back, or delete it")

    def _delete_discarded(self) -> None:
        with self._write_failure_as_error():
            if (self.directory / _DISCARDED).is_dir():
                shutil.rmtree(self.directory / _DISCARDED)

    def _before_rename(self) -> None:
        self._check_folder()
        for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
            write_checksums(folder)

    def _check_folder(self) -> None:
        """Raises FileNotFoundError if the folder was removed, after removing what a running save has written since."""
        with contextlib.suppress(FileNotFoundError):
            if self._folder is None or os.path.samestat(self.directory.stat(), os.fstat(self._folder)):
                return
        self._remove_recreated_folders()
        raise FileNotFoundError(f"{self.directory} was removed")

    def _remove_recreated_folders(self) -> None:
        """Removes folders that a failed save recreated, unless a new run has written other files beside them."""
        for _ in range(20):  # a thread of the failed save may still be writing
            if set(self.directory.parent.glob("*")) - {self.directory}:
                return
            for folder in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(folder, ignore_errors=True)
            for folder in (self.directory, self.directory.parent):
                with contextlib.suppress(OSError):  # not empty, or already gone
                    folder.rmdir()
            time.sleep(0.05)

    @contextlib.contextmanager
    def _open_failure_as_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            damage = "; ".join(self._damaged().values())
            raise CheckpointError(damage or f"{self.directory} can't be read ({_first_line(error)})") from error

    @contextlib.contextmanager
    def _write_failure_as_error(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"can't write a checkpoint to {self.directory} ({_first_line(error)}); {latest_saved(self.directory)}."
                " Free some space or restore the folder, and run the same command again to resume"
            ) from error

    @contextlib.contextmanager
    def _read_failure_as_error(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises exceptions of many types for damaged files
            raise CheckpointError(
                f"checkpoint {self._folder_of(step)} can't be read ({_first_line(error)});"
                " delete that folder to resume from the previous checkpoint"
            ) from error

    @property
    def latest_step(self) -> int | None:
        """The latest saved step; None if nothing was saved."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the lowest top-1 error, or the latest one if several have it; None if no step was evaluated."""
        metrics = {step: self.metrics(step) for step in self._manager.all_steps()}
        errors = [(_error(values), -step) for step, values in metrics.items() if values]
        return -min(errors)[1] if errors else None

    def metrics(self, step: int) -> dict[str, float] | None:
        """Returns the evaluation metrics of a step; None if it was not evaluated.

        Raises:
          CheckpointError: if they are damaged.
        """
        folder = self.directory / str(step)
        if (folder / "metrics").is_dir() and (damage := find_damage(folder, below="metrics/")):
            raise CheckpointError(
                f"checkpoint {folder} is damaged ({damage}); give another step, or delete that folder"
            )
        with self._read_failure_as_error(step):
            values = self._manager.metrics(step)
            return values and {**values, "top1_error": float(values["top1_error"])}

    def save(self, state: TrainState, progress: Progress, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving a checkpoint; `wait` returns when it is on disk. A saved step is not saved again.

        Raises:
          CheckpointError: if this checkpoint, or the previous one in the background, can't be written.
        """
        if progress.step in self._manager.all_steps():
            return
        items: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
        items["progress"] = ocp.args.JsonSave(dataclasses.asdict(progress))
        items["files"] = ocp.args.JsonSave(self._files)
        with self._write_failure_as_error():
            self._check_folder()
            self._manager.save(progress.step, args=ocp.args.Composite(**items), metrics=metrics and dict(metrics))

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, Progress]:
        """Restores the state of a step, with the placement of `like`.

        Raises:
          CheckpointError: if the shapes differ from those of `like`, or files are damaged.
        """
        items, progress = self._restore(_trees(like), step)
        number = jax.device_put(jax.numpy.asarray(progress.step, like.step.dtype), like.step.sharding)
        return like.replace(step=number, **items), progress

    def restore_variables(self, like: Mapping[str, Any], step: int) -> tuple[dict[str, Any], Progress]:
        """Restores the variables to evaluate, for `model.apply`: the averages if there are any.

        Raises:
          CheckpointError: as in `restore`.
        """
        if not (self._folder_of(step) / _AVERAGES).is_dir():
            return self._restore(dict(like), step)
        items, progress = self._restore({_AVERAGES: dict(like)}, step)
        return items[_AVERAGES], progress

    def _restore(self, trees: dict[str, Any], step: int) -> tuple[dict[str, Any], Progress]:
        if damage := find_damage(self._folder_of(step)):
            raise CheckpointError(f"checkpoint {self._folder_of(step)} is damaged ({damage}); give another step")
        abstract = {name: jax.tree.map(_abstract, tree) for name, tree in trees.items()}
        with self._read_failure_as_error(step):
            stored = self._manager.item_metadata(step)
        _check_shapes(abstract, stored, self._folder_of(step))
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        with self._read_failure_as_error(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args, progress=ocp.args.JsonRestore()))
        return {name: restored[name] for name in trees}, _parse_progress(restored["progress"], self._folder_of(step))

    def wait(self) -> None:
        """Waits until everything is on disk; raises CheckpointError as `save` does."""
        with self._write_failure_as_error():
            self._finish(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits as `wait` does, and closes the folder."""
        with self._write_failure_as_error():
            self._finish(self._manager.close)
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None
            if jax.process_index() == 0:
                self._delete_discarded()

    def _finish(self, wait: Callable[[], object]) -> None:
        """Waits for running saves; then checks, even if they failed, that the folder has not been removed."""
        try:
            wait()
        finally:
            self._check_folder()


def _parse_progress(stored: Any, folder: pathlib.Path) -> Progress:
    try:
        skipped = tuple(int(at) for at in stored.get("skipped", ()))
        pending = {str(name): float(value) for name, value in stored.get("pending", {}).items()}
        progress = Progress(int(stored["step"]), int(stored["epoch"]), float(stored["wall_seconds"]), skipped, pending)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"the progress stored in checkpoint {folder} can't be read ({error!r}); delete that folder to resume from"
            " the previous checkpoint"
        ) from error
    if str(progress.step) != folder.name:
        raise CheckpointError(
            f"checkpoint {folder} contains step {progress.step}; rename the folder to {progress.step}"
        )
    return progress


def _check_shapes(abstract: Mapping[str, Any], stored: Any, folder: pathlib.Path) -> None:
    lines = []
    for name, tree in abstract.items():
        if stored.get(name) is None:
            raise CheckpointError(f"{folder} has no {name}: it is damaged, or not a checkpoint of gmsop_jax")
        theirs, ours = dict(_shapes(stored.get(name))), dict(_shapes(tree))
        for path in sorted(theirs.keys() | ours.keys()):
            a, b = theirs.get(path, "absent"), ours.get(path, "absent")
            if a != b:
                lines.append(f"  {name}{path}: checkpoint {a}, model {b}")
    if lines:
        more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
        raise CheckpointError(
            f"checkpoint {folder} does not fit the model:\n"
            + "\n".join(lines[:10] + more)
            + "\nuse the configuration it was trained with (config.json beside the checkpoints)"
        )


def _latest_and_best(keep: int | None) -> policies.PreservationPolicy:
    # BestN keeps the last in its order: with `reverse`, the lowest error, and among equal errors the latest step.
    best = policies.BestN(get_metric_fn=_error, reverse=True, n=1, keep_checkpoints_without_metrics=False)
    return policies.AnyPreservationPolicy([policies.LatestN(keep), best])


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    registry = ocp.DefaultCheckpointHandlerRegistry()
    for name in (*_ITEMS, _AVERAGES):
        handler = ocp.StandardCheckpointHandler()
        registry.add(name, ocp.args.StandardSave, handler)
        registry.add(name, ocp.args.StandardRestore, handler)
    for name in ("progress", "files"):
        registry.add(name, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        registry.add(name, ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
    return registry


@functools.cache
def _silence_orbax() -> None:
    """Silences the messages of Orbax; the exceptions that it raises are reported in any case.

    Orbax logs every step, and every error a second time. When a save fails, the other pending writes finish after their
    event loop is closed, or never start, and each prints a traceback or a warning from a thread of TensorStore or
    asyncio.
    """
    warnings.filterwarnings("ignore", message="coroutine '.*serialize.*' was never awaited", category=RuntimeWarning)
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    report = sys.unraisablehook

    def report_others(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = report_others


def _trees(state: TrainState) -> dict[str, Any]:
    names = _ITEMS if state.ema is None else (*_ITEMS, _AVERAGES)
    return {name: getattr(state, name) for name in names}


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _shapes(tree: Any) -> Iterator[tuple[str, str]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(leaf, "shape"):
            keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
            yield "".join(f"/{key}" for key in keys), str(tuple(leaf.shape))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _read_files(workdir: pathlib.Path) -> dict[str, str]:
    paths = [workdir / name for name in WORKDIR_FILES]
    return {file.name: read_bytes(file).decode() for file in paths if file.exists()}
