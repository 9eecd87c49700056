"""Checkpoints of a run, through Orbax: asynchronous, the last n and the best kept."""

import dataclasses
import json
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from gmsop_jax.errors import CheckpointError
from gmsop_jax.train_step import TrainState

DIRECTORY = "checkpoints"
_ITEMS = ("params", "batch_stats", "opt_state")


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its arrays.

    Attributes:
      step: optimiser steps done; with the seed it is also the position in the data and in every
        random stream.
      epoch: whole epochs done.
      wall_seconds: spent so far, over all starts of the run.
    """

    step: int
    epoch: int
    wall_seconds: float


def _error(metrics: Mapping[str, float]) -> float:
    return metrics["top1_error"]


class Checkpoints:
    """The checkpoints in one folder, one sub-folder a step; parameters, moments and optimiser apart."""

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 3, read_only: bool = False):
        """Opens the folder, which is made unless read_only."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells its every step there
        keep_policy = policies.AnyPreservationPolicy(
            [
                policies.LatestN(keep),
                # the lowest error comes last; of equal ones the latest
                policies.BestN(get_metric_fn=_error, reverse=True, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_error,  # without one Orbax writes no metrics
            preservation_policy=keep_policy,
            read_only=read_only,
            create=not read_only,
        )
        path = pathlib.Path(directory).absolute()
        handlers = {name: ocp.StandardCheckpointHandler() for name in _ITEMS}
        registry = ocp.DefaultCheckpointHandlerRegistry()
        for name, handler in handlers.items():
            registry.add(name, ocp.args.StandardSave, handler)
            registry.add(name, ocp.args.StandardRestore, handler)
        registry.add("progress", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        registry.add("progress", ocp.args.JsonRestore, ocp.JsonCheckpointHandler())
        self._manager = ocp.CheckpointManager(path, options=options, handler_registry=registry)
        self.directory = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The last step saved."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step with the lowest top-1 error, the latest of equals; None if none was evaluated."""
        metrics = {step: self.metrics(step) for step in self._manager.all_steps()}
        errors = [(_error(values), -step) for step, values in metrics.items() if values]
        return -min(errors)[1] if errors else None

    def metrics(self, step: int) -> dict[str, float] | None:
        """What was measured at a step; None if it was not evaluated."""
        return self._manager.metrics(step)

    def save(self, state: TrainState, progress: Progress, metrics: Mapping[str, float] | None = None) -> None:
        """Starts saving; `wait` returns once it is on disk. A step that is there already is kept."""
        if progress.step in self._manager.all_steps():
            return
        items: dict[str, Any] = {name: ocp.args.StandardSave(getattr(state, name)) for name in _ITEMS}
        items["progress"] = ocp.args.JsonSave(dataclasses.asdict(progress))
        self._manager.save(progress.step, args=ocp.args.Composite(**items), metrics=metrics and dict(metrics))

    def restore(self, like: TrainState, step: int) -> tuple[TrainState, Progress]:
        """The state saved at a step, placed as `like` is.

        Raises:
          CheckpointError: if the shapes differ from those of `like`, or files are damaged.
        """
        trees = {name: getattr(like, name) for name in _ITEMS}
        items, progress = self._restore(trees, step)
        return like.replace(step=_like(like.step, progress.step), **items), progress

    def restore_variables(self, like: Mapping[str, Any], step: int) -> tuple[dict[str, Any], Progress]:
        """Parameters and moments alone, as `model.apply` takes them; errors as `restore`."""
        return self._restore(dict(like), step)

    def _restore(self, trees: dict[str, Any], step: int) -> tuple[dict[str, Any], Progress]:
        abstract = {name: jax.tree.map(_abstract, tree) for name, tree in trees.items()}
        self._check_shapes(abstract, step)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args, progress=ocp.args.JsonRestore()))
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} can't be read ({_first_line(error)});"
                " delete that folder to go on from the one before"
            ) from error
        items = {name: restored[name] for name in trees}
        return items, Progress(**restored["progress"])

    def _check_shapes(self, abstract: Mapping[str, Any], step: int) -> None:
        stored_items = self._manager.item_metadata(step)
        lines = []
        for name, tree in abstract.items():
            stored = stored_items[name]
            if stored is None:
                raise CheckpointError(
                    f"{self.directory / str(step)} has no {name}: it is no checkpoint of gmsop_jax, or damaged"
                )
            theirs, ours = dict(_shapes(stored)), dict(_shapes(tree))
            for path in sorted(theirs.keys() | ours.keys()):
                a, b = theirs.get(path, "absent"), ours.get(path, "absent")
                if a != b:
                    lines.append(f"  {name}{path}: checkpoint {a}, model {b}")
        if lines:
            more = [f"  and {len(lines) - 10} more"] if len(lines) > 10 else []
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} doesn't fit the model:\n"
                + "\n".join(lines[:10] + more)
                + "\nuse the configuration it was trained with (config.json beside the checkpoints)"
            )

    def wait(self) -> None:
        """Returns once all that was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then closes the folder."""
        self._manager.close()


def _like(array: jax.Array, value: int) -> jax.Array:
    return jax.device_put(jax.numpy.asarray(value, array.dtype), array.sharding)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _shapes(tree: Any) -> Iterator[tuple[str, str]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if hasattr(leaf, "shape"):
            keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
            yield "".join(f"/{key}" for key in keys), str(tuple(leaf.shape))


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def locate(path: str | pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """The folder of checkpoints and the step that a path means.

    Args:
      path: a working directory, its `checkpoints` folder, or one step's folder in it.

    Returns: (folder, step or None where the path names no single one).

    Raises:
      CheckpointError: if no checkpoint is there.
    """
    path = pathlib.Path(path)
    step = int(path.name) if path.name.isdigit() else None
    folder = path.parent if step is not None else path
    if (folder / DIRECTORY).is_dir():
        folder = folder / DIRECTORY
    steps = [p.name for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if not steps or (step is not None and str(step) not in steps):
        there = f"; there are steps {', '.join(sorted(steps, key=int))}" if steps else ""
        raise CheckpointError(f"no checkpoint at {path}{there}; name a working directory that a training run made")
    return folder, step


def read_config(path: str | pathlib.Path) -> str:
    """The `config.json` that belongs to a checkpoint, as text.

    Raises:
      CheckpointError: if it is missing or no JSON.
    """
    folder, _ = locate(path)
    file = folder.parent / "config.json"
    try:
        text = file.read_text()
        json.loads(text)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read ({error}); name it with --config") from error
    return text
