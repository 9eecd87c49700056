"""The errors that a trained gated mixture makes if the weights of its gate are replaced.

In evaluation, batch norm and classifier are affine, so the logits for the weights w are l₀ + Σᵢ wᵢ (lᵢ − l₀), where lᵢ
are the logits of candidate i with weight 1, and l₀ those without any candidate. The network therefore runs once for all
replacements.

Axes: b images of a batch, m images of the split, n candidates, c classes.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gmsop_jax.models import Network
from gmsop_jax.models.gate import Gate
from gmsop_jax.training import restore
from gmsop_jax.training.step import normalize


@dataclasses.dataclass(frozen=True)
class GateErrors:
    """Whether each image is misclassified, for several choices of the gate's weights.

    Attributes:
      gate: with the weights of the gate [m].
      equal: with equal weights for the candidates that the gate selects [m].
      uniform: with equal weights for all candidates [m].
      random: with equal weights for k candidates that are drawn at random for each image [m].
      shuffled: with the weights that the gate gives to another image, drawn at random [m].
      top_k: with k = 1, …, n selected candidates [n, m].
      alone: with each candidate alone [n, m].
      without: with each candidate excluded from the selection [n, m].
    """

    gate: np.ndarray
    equal: np.ndarray
    uniform: np.ndarray
    random: np.ndarray
    shuffled: np.ndarray
    top_k: np.ndarray
    alone: np.ndarray
    without: np.ndarray


def measure_gate_errors(
    path: str | os.PathLike[str], batches: Iterable[tuple[np.ndarray, np.ndarray]], gate_weights: np.ndarray
) -> GateErrors:
    """Measures the errors of a gated mixture with replaced weights.

    Args:
      path: the network, as in `gmsop_jax.load`.
      batches: pairs (images, uint8 [b, h, w, 3]; labels [b]).
      gate_weights: the gate's weights for the same images [m, n].
    """
    model, variables, info = restore.load(path)
    config, flip = info.config.model, info.config.eval.flip_average
    step = jax.jit(_candidate_step(model, config.num_candidates, info.inputs.mean_rgb))
    rng = np.random.default_rng(0)
    shuffled = rng.permutation(gate_weights)
    wrong: list[np.ndarray] = []
    start = 0
    for images, labels in batches:
        views = (images, images[:, :, ::-1]) if flip else (images,)
        outputs = [jax.device_get(step(variables, view)) for view in views]
        end = start + len(labels)
        rules = _rules(config, shuffled[start:end], rng)
        logits = np.mean([_mix(alone, [rule(h) for rule in rules]) for alone, h in outputs], axis=0)
        wrong.append(logits.argmax(-1) != labels)
        start = end
    rows = np.concatenate(wrong, axis=1)
    n = config.num_candidates
    return GateErrors(*rows[:5], *(rows[5 + i * n : 5 + (i + 1) * n] for i in range(3)))


def _candidate_step(model: Network, n: int, mean_rgb: Sequence[float]) -> Callable[[Any, Array], tuple[Array, Array]]:
    """Creates a function (variables, images) → (logits [n + 1, b, c], gate logits [b, n]).

    The logits are those of each candidate with weight 1, followed by those without any candidate.
    """

    def candidate_step(variables: Any, images: Array) -> tuple[Array, Array]:
        pixels = normalize(images, mean_rgb)

        def forward(weights: Array) -> tuple[Array, Array]:
            found: list[Array] = []

            def replace(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
                output = call(*args, **kwargs)
                if not isinstance(context.module, Gate) or context.method_name != "__call__":
                    return output
                found.append(output.logits)
                shape = output.logits.shape
                everything = jnp.broadcast_to(jnp.arange(n), shape)
                return output._replace(indices=everything, weights=jnp.broadcast_to(weights, shape))

            with nn.intercept_methods(replace):
                logits, _ = model.apply(variables, pixels)
            return logits, found[0]

        # Only what depends on the weights, after the pooling of the candidates, is computed more than once.
        one_hot = jnp.concatenate([jnp.eye(n), jnp.zeros((1, n))])
        return jax.vmap(forward, out_axes=(0, None))(one_hot)

    return candidate_step


def _mix(alone: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    """The logits [rules, b, c] for weights [rules, b, n]."""
    none = alone[-1]
    return none + np.einsum("rbn,nbc->rbc", np.stack(weights), alone[:-1] - none)


def _rules(config: Any, shuffled: np.ndarray, rng: np.random.Generator) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Functions from gate logits [b, n] to weights [b, n], in the order of the fields of `GateErrors`."""
    n, k, over_all = config.num_candidates, config.num_selected, config.gate_softmax == "all"
    drawn = rng.random((len(shuffled), n))

    def gate(h: np.ndarray, k: int = k) -> np.ndarray:
        chosen = _largest(h, k)
        exponentials = np.exp(h - h.max(1, keepdims=True))
        kept = exponentials * chosen
        return kept / (exponentials if over_all else kept).sum(1, keepdims=True)

    def without(i: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda h: gate(np.where(np.arange(n) == i, -np.inf, h), min(k, n - 1))

    return [
        gate,
        lambda h: _largest(h, k) / k,
        lambda h: np.full_like(h, 1 / n),
        lambda h: _largest(drawn, k) / k,
        lambda h: shuffled,
        *(lambda h, k=k: gate(h, k) for k in range(1, n + 1)),
        *(lambda h, i=i: np.broadcast_to(np.eye(n, dtype=h.dtype)[i], h.shape) for i in range(n)),
        *(without(i) for i in range(n)),
    ]


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Whether each value is among the k largest of its row; of equal values, the first ones are chosen."""
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    chosen = np.zeros(values.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen
