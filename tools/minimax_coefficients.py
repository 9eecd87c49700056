"""Computes the constants of `coefficients='minimax'`: python tools/minimax_coefficients.py

Prints, for each number n of steps, the lower end l that minimises the largest error of the root,
max |λ Zₙ(λ) − √λ| over 0 ≤ λ ≤ 1, with this error and that of the Newton–Schulz iteration. The values of l are
constants in gmsop_jax/ops/coefficients.py.
"""

import numpy as np
from scipy.optimize import minimize_scalar

from gmsop_jax.ops.coefficients import MINIMAX_LOWER_ENDS, Steps, iteration_steps, minimax_steps

ROOTS = np.concatenate([np.geomspace(1e-8, 1, 100_001), np.linspace(0, 1, 100_001)])  # x = √λ


def root_error(steps: Steps, x: np.ndarray = ROOTS) -> float:
    """The largest error of the root in exact arithmetic: |x s(x) − x|, where s is the composition of the steps."""
    s = x
    for a, b in steps:
        s = s * (a - b * s**2)
    return float(np.max(np.abs(x * (s - 1))))


def best_lower_end(num_iters: int) -> float:
    """The value of l with the smallest error."""

    def error(log_end: float) -> float:
        return root_error(minimax_steps(num_iters, float(np.exp(log_end))))

    grid = np.linspace(np.log(1e-7), np.log(0.5), 200)
    start = grid[np.argmin([error(log_end) for log_end in grid])]
    width = grid[1] - grid[0]
    found = minimize_scalar(error, bounds=(start - width, start + width), method="bounded", options={"xatol": 1e-10})
    return float(np.exp(found.x))


def main() -> None:
    """Prints one row for each number of steps."""
    print("  n  lower end l    error     error of Newton–Schulz  ratio")
    for n in range(1, len(MINIMAX_LOWER_ENDS) + 1):
        end = best_lower_end(n)
        error, plain = root_error(minimax_steps(n, end)), root_error(iteration_steps(n))
        print(f"{n:3}  {end:.8g}  {error:.2e}  {plain:<22.2e}  {error / plain:.3f}", flush=True)


if __name__ == "__main__":
    main()
