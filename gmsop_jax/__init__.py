"""Second-order pooling in JAX: covariance pooling, iSQRT-COV and GM-SOP, as functions and as Flax modules."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gmsop_jax import models as models
    from gmsop_jax import nnx as nnx
    from gmsop_jax import ops as ops
    from gmsop_jax.models import Network
    from gmsop_jax.training.restore import Info

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in ("models", "nnx", "ops"):  # available after `import gmsop_jax` alone, but imported only when used
        return importlib.import_module(f"gmsop_jax.{name}")
    raise AttributeError(f"module 'gmsop_jax' has no attribute {name!r}")


def load(path: str | os.PathLike[str]) -> "tuple[Network, dict[str, Any], Info]":
    """Restores a trained network: `model, variables, info = gmsop_jax.load(PATH)`.

    The path is the working directory of a run, an exported folder, or the name of a repository on the Hugging Face Hub;
    see `gmsop_jax.training.restore.load`.
    """
    from gmsop_jax.training import restore  # imported late: Orbax takes seconds, and the layers don't need it

    return restore.load(path)
