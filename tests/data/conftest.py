from pathlib import Path

import pytest

from gmsop_jax.data.convert import convert


@pytest.fixture(scope="session")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample, converted to three training shards; tests only read it."""
    directory = tmp_path_factory.mktemp("fashion") / "set"
    convert("fashion-mnist", None, directory, shards=3, progress=False)
    return directory
