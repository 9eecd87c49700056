"""Coefficients of the coupled iteration Y ← Y T, Z ← T Z with T = aI − bZY, step by step."""

import functools
import math
import numbers
from typing import Literal

import numpy as np

Coefficients = Literal["newton_schulz", "minimax"]
Step = tuple[float, float]  # (a, b)
Steps = tuple[Step, ...]
Factors = tuple[tuple[float, float], tuple[float, float], float]  # (p₁, q₁), (p₂, q₂), g

# For n = 1, 2, …: the lower end l of the interval of √λ on which the n minimax steps are optimal. Each l
# minimises the largest error of the root on the whole interval 0 ≤ λ ≤ 1; tools/minimax_coefficients.py computes them.
MINIMAX_LOWER_ENDS = (
    *(0.446265, 0.26668239, 0.14502256, 0.073885793, 0.035970298, 0.016946206),
    *(0.0077893878, 0.0035125093, 0.0015597929, 0.00068397495, 0.00029677186, 0.00012761302),
)


def iteration_steps(num_iters: int, coefficients: Coefficients = "newton_schulz") -> Steps:
    """The coefficients (a, b) of each step.

    Args:
      num_iters: number of steps.
      coefficients: `newton_schulz` for (3/2, 1/2) in every step, or `minimax` for `minimax_steps`.

    Raises:
      ValueError: if num_iters < 1, if `coefficients` is unknown, or if there are no minimax coefficients for
        that many steps.
      TypeError: if num_iters is not a Python int, because it determines the program that is compiled.
    """
    if np.ndim(num_iters):
        shape = np.shape(num_iters)
        raise TypeError(f"num_iters must be a Python int, got an array of shape {shape}; pass a mask as where=…")
    if not isinstance(num_iters, numbers.Integral) or isinstance(num_iters, bool):
        raise TypeError(f"num_iters must be a Python int, got {num_iters!r}; under jax.jit, make it a static argument")
    if num_iters < 1:
        raise ValueError(f"num_iters must be at least 1, got {num_iters}")
    if coefficients == "newton_schulz":
        return ((1.5, 0.5),) * num_iters
    if coefficients != "minimax":
        raise ValueError(f"coefficients must be 'newton_schulz' or 'minimax', got {coefficients!r}")
    if num_iters > len(MINIMAX_LOWER_ENDS):
        most = len(MINIMAX_LOWER_ENDS)
        raise ValueError(f"coefficients='minimax' is available for num_iters from 1 to {most}, got {num_iters}")
    return minimax_steps(num_iters, MINIMAX_LOWER_ENDS[num_iters - 1])


@functools.cache
def minimax_steps(num_iters: int, lower_end: float) -> Steps:
    """The composition of n odd cubics that is closest to 1 on [l, 1], applied to √λ.

    The cubic s ← s(a − bs²) with a = (1 + l + l²)c and b = c has equal values at l and 1, and its maximum
    between them. The optimal composition uses, in each step, the best cubic on the interval to which the previous
    steps map [l, 1] (Amsel et al. 2025, Polar Express). Here, each step but the last is scaled so that its maximum
    is 1, which keeps the eigenvalues of ZY in [0, 1]. The last step is scaled so that its values are centred on 1.

    Args:
      num_iters: number of steps.
      lower_end: l, between 0 and 1.

    Returns: (a, b) of each step.
    """
    steps, low = [], lower_end
    for i in range(num_iters):
        a = 1 + low + low**2
        end, peak = a * low - low**3, 2 * (a / 3) ** 1.5
        scale = 1 / peak if i < num_iters - 1 else 2 / (end + peak)
        steps.append((a * scale, scale))
        low = end * scale
    return tuple(steps)


@functools.cache
def two_step_factors(first: Step, second: Step) -> Factors:
    """Factors two steps into two quadratics, whose product takes one matrix product in addition to w².

    With w = ZY, two steps multiply Y and Z by the quartic
    T₁(w)·T₂(w T₁(w)²) = g·(w² + p₁w + q₁)·(w² + p₂w + q₂).

    Args:
      first, second: (a, b) of the two steps.

    Returns: (p₁, q₁), (p₂, q₂), g.
    """
    (a1, b1), (a2, b2) = first, second
    ratio, constant = a1 / b1, a2 / (b2 * b1**2)
    # T₂ contributes the cubic w³ − 2ρw² + ρ²w − c with ρ = a₁/b₁. It has one real root, given by Viète's formula.
    root = ratio * 2 / 3 * (1 + math.cosh(math.acosh(27 * constant / (2 * ratio**3) - 1) / 3))
    return (-(ratio + root), ratio * root), (root - 2 * ratio, constant / root), b1**3 * b2
