"""Divergence: checks whether the numbers of a run are finite, and chooses the step to skip if they are not."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gmsop_jax.config import ConfigDict
from gmsop_jax.training.metrics import NonFiniteError, check_metrics
from gmsop_jax.training.step import TrainState

MAX_LOSS = 1e4  # nats per image; a larger loss counts as divergence. Guessing among a million classes has a loss of 14
MAX_SKIPPED = 10  # maximum number of consecutive steps that a run skips before it ends


def check_evaluation(step: int, evaluation: Mapping[str, Any]) -> None:
    """Raises NonFiniteError if the loss of the evaluation after a step is not finite, or absurdly large."""
    if not np.isfinite(evaluation["loss"]):
        raise NonFiniteError(f"the evaluation loss is not finite after step {step}", step)
    _check_size(evaluation["loss"], "evaluation loss", step)


def check_state(state: TrainState, step: int, train_step: Callable, batch: Any) -> None:
    """Checks that a state has not diverged, before it replaces a good checkpoint.

    An update can make the parameters useless but finite, which only the next loss would show. Therefore, the batch of
    the last trained step is run once more with the new parameters, and the result is discarded.

    Raises:
      NonFiniteError: if the state, its loss or its gradient is not finite, or the loss is absurdly large.
    """
    if not _all_finite(state):
        raise NonFiniteError(
            f"the parameters, batch statistics or optimiser state are not finite after step {step}", step
        )
    copy = jax.tree.map(jnp.copy, state.replace(step=state.step * 0 + step - 1))
    metrics = jax.device_get(train_step(copy, batch)[1])
    check_metrics(step, metrics)
    _check_size(float(metrics["loss_sum"]) / int(metrics["count"]), "loss", step)


def _check_size(loss: float, name: str, step: int) -> None:
    if loss > MAX_LOSS:
        raise NonFiniteError(f"the {name} diverged to {loss:.3g} at step {step}; this is treated as not finite", step)


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    arrays = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def step_to_skip(error: NonFiniteError, skipped: set[int], last_saved: int) -> int | None:
    """Returns the step whose update to skip after a rollback; None if the run should end with the error."""
    step = max((step for step in range(last_saved + 1, error.step + 1) if step not in skipped), default=None)
    if step is None or skipped.issuperset(range(step - MAX_SKIPPED, step)):
        return None
    return step


def explain(error: NonFiniteError, config: ConfigDict, learning_rate: float, last_saved: int | None) -> str:
    """Returns the message of a run that ends because its numbers are not finite."""
    saved = "there is no earlier checkpoint" if last_saved is None else f"the last good checkpoint is step {last_saved}"
    causes = f"a learning rate too high for this network (it is currently {learning_rate:g})"
    if config.compute_dtype:
        causes += f", the limited range of config.compute_dtype = {config.compute_dtype!r}"
    advice = "Lower config.train.learning_rates and start in a new --workdir"
    if config.train.on_nonfinite == "stop":
        advice += ", or skip that step's batch with --config.train.on_nonfinite=rollback"
    else:
        advice = f"Rolling back and skipping steps did not help. {advice}"
    return f"{error} ({saved}). Likely causes: {causes}, or damaged images. {advice}"
