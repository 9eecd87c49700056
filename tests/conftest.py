import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

# Tiny programs: compiling them takes longer than running them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """For a test that passes wrong types or shapes to see the library's own error: annotations are not checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of a small GM-SOP after two epochs on some Fashion-MNIST; not to be written to."""
    from gmsop_jax.config import default_config, validate
    from gmsop_jax.conversion.convert import convert
    from gmsop_jax.training.loop import train_and_evaluate

    folder = tmp_path_factory.mktemp("trained")
    convert("fashion-mnist", None, folder / "data", limit=200, workers=1)
    c = default_config()
    c.data.dir = str(folder / "data")
    c.data.source = "fashion-mnist"
    c.model.blocks_per_stage = 1
    c.model.stage_widths = (8, 12)
    c.model.stage_strides = (2, 2)
    c.model.gate_widths = (6,)
    c.model.candidate_widths = (5,)
    c.model.num_candidates = 4
    c.model.num_selected = 2
    c.train.batch_size = 40
    c.train.learning_rates = ((0.05, 2),)
    c.train.num_epochs = 2
    c.train.log_every_steps = 2
    c.eval.batch_size = 64
    validate(c)
    train_and_evaluate(c, folder / "run", profile=range(3, 5))
    return folder / "run"


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample, converted to three training shards; tests only read it."""
    from gmsop_jax.conversion.convert import convert

    directory = tmp_path_factory.mktemp("fashion") / "set"
    convert("fashion-mnist", None, directory, shards=3, progress=False)
    return directory
