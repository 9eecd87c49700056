"""The type checker of the tests, which pyproject.toml passes to jaxtyping."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

_CONFIGURATION = BeartypeConf(is_pep484_tower=True)  # an int is a float, as in PEP 484


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Checks arguments and results against the annotations, at every call."""
    return beartype(conf=_CONFIGURATION)(function)
