"""Batches of a data set by keywords instead of sections of a configuration."""

from pathlib import Path

from gmsop_jax.config import default_config
from gmsop_jax.data import pipeline
from gmsop_jax.data.manifest import Manifest

PLACE = {"start_step", "padding_rgb", "process_index", "process_count"}


def train_batches(directory: Path, *, batch_size: int, seed: int = 0, drop_last: bool = True, **fields):
    """`pipeline.train_batches` with default values; `fields` are of the section `data`, or further arguments."""
    config = default_config()
    config.train.update(batch_size=batch_size, drop_last=drop_last)
    place = {name: fields.pop(name) for name in PLACE & fields.keys()}
    config.data.update(fields | {"dir": str(directory)})
    manifest = Manifest.load(directory, splits=())
    return pipeline.train_batches(config.data, config.train, manifest, seed=seed, **place)


def eval_batches(directory: Path, split: str, *, batch_size: int, resize: int = 0, **fields):
    """`pipeline.eval_batches` likewise."""
    config = default_config()
    config.eval.update(split=split, batch_size=batch_size, resize=resize)
    place = {name: fields.pop(name) for name in PLACE & fields.keys()}
    config.data.update(fields | {"dir": str(directory)})
    return pipeline.eval_batches(config.data, config.eval, Manifest.load(directory, splits=()), **place)
