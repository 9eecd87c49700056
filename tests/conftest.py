import os
from collections.abc import Iterator

import jax
import pytest

# Tiny programs: compiling them takes longer than running them.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
