"""Cases of `benchmark.py` for matrix square roots, alone and with their gradient, against other libraries."""

# pyright: reportMissingImports=false
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_timing import Case, Program, normal, torch_device, with_gradient

from gmsop_jax import ops

NUM_ITERS = 3
OURS = "newton_schulz_sqrt"


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to compute square roots.

    Attributes:
      name: its name in the table.
      root: the function of covariances [b, d, d], in JAX or in PyTorch.
      package: the package that it needs, besides JAX.
      widest_gradient: side of the largest matrices whose gradient is measured; 0 if there is no gradient.
    """

    name: str
    root: Callable[[Any], Any]
    package: str = ""
    widest_gradient: int = 1 << 30

    @property
    def is_installed(self) -> bool:
        """Whether the package that it needs is installed."""
        return not self.package or importlib.util.find_spec(self.package) is not None


def _eigendecomposition(sigma: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(sigma)
    return (vectors * jnp.sqrt(values)[..., None, :]) @ vectors.mT


def _ott(sigma: jax.Array) -> jax.Array:
    from ott.math import matrix_square_root

    return matrix_square_root.sqrtm(sigma)[0]


def _torch_autograd(sigma: Any) -> Any:
    import torch_peer

    return torch_peer.newton_schulz_sqrt(sigma, NUM_ITERS)


def _torch_function(sigma: Any) -> Any:
    import torch_peer

    return torch_peer.ISqrtCov.apply(sigma, NUM_ITERS)


METHODS = (
    Method(OURS, lambda sigma: ops.newton_schulz_sqrt(sigma, NUM_ITERS)),
    Method("PyTorch, autograd through Newton–Schulz", _torch_autograd, "torch"),
    Method("PyTorch, iSQRT-COV's backward pass", _torch_function, "torch"),
    Method("matrix_power(sigma, 0.5)", lambda sigma: ops.matrix_power(sigma, 0.5)),
    Method("jnp.linalg.eigh, differentiated by JAX", _eigendecomposition),
    Method("ott.math.matrix_square_root.sqrtm", _ott, "ott", widest_gradient=64),  # compiling takes minutes
    Method("jax.scipy.linalg.sqrtm", jax.vmap(lambda sigma: jax.scipy.linalg.sqrtm(sigma).real), widest_gradient=0),
)


def root_cases(width: int, batch: int) -> list[Case]:
    """The cases of all methods that are installed, without and with gradient."""
    cases = []
    for method in METHODS:
        if not method.is_installed:
            print(f"skipped {method.name}: the package {method.package} is not installed")
            continue
        cases.append(root_case(method, width, batch, gradient=False))
        if width <= method.widest_gradient:
            cases.append(root_case(method, width, batch, gradient=True))
    return cases


def root_case(method: Method, width: int, batch: int, *, gradient: bool) -> Case:
    """Roots, and on request their gradient, of the covariances of 4 · width normally distributed positions."""
    sigma, cotangent = covariances(width, batch), normal(batch, width, width) if gradient else None
    name = case_name(method.name, width, gradient=gradient)
    make_program = _torch_program if method.package == "torch" else _jax_program
    flops = batch * (15 if gradient else 5) * 2 * width**3
    versus = "" if method.name == OURS else case_name(OURS, width, gradient=gradient)
    return Case(name, make_program(method.root, sigma, cotangent), flops, 2 * sigma.nbytes, versus)


def case_name(method: str, width: int, *, gradient: bool) -> str:
    """The name of a method's case in the table."""
    return f"d = {width}, {'root and gradient' if gradient else 'root'}, {method}"


def covariances(width: int, batch: int) -> jax.Array:
    """Covariances [batch, width, width] of full rank."""
    return jax.jit(ops.covariance_pool)(normal(batch, 4 * width, width))


def root_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `root_cases` for one or more widths as a table in Markdown: milliseconds, and their ratio to ours."""
    cells = {row["name"]: row for row in rows}
    widths = sorted({int(name.split()[2].rstrip(",")) for name in cells if name.startswith("d = ")})
    lines = [
        "| method | " + " | ".join(f"d = {d}, root | with gradient" for d in widths) + " |",
        "|---|" + "---|---|" * len(widths),
    ]
    for method in METHODS:
        values = [
            _cell(cells.get(case_name(method.name, d, gradient=gradient)), cells[case_name(OURS, d, gradient=gradient)])
            for d in widths
            for gradient in (False, True)
        ]
        if any(value != "–" for value in values):
            lines.append(f"| {method.name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, ours: dict[str, Any]) -> str:
    if row is None:
        return "–"
    low, high = row["quartiles_ms"]
    return f"{row['ms']:.3g} ({low:.3g}–{high:.3g}), {row['ms'] / ours['ms']:.2g}×"


def _jax_program(root: Callable, sigma: jax.Array, cotangent: jax.Array | None) -> Callable[[], Any]:
    if cotangent is None:
        return Program(root, sigma)
    return Program(with_gradient(root), (sigma,), cotangent)


def _torch_program(root: Callable, sigma: jax.Array, cotangent: jax.Array | None) -> Callable[[], None]:
    import torch
    import torch_peer

    inputs = torch.tensor(np.asarray(sigma), device=torch_device(), requires_grad=cotangent is not None)
    outputs = None if cotangent is None else torch.tensor(np.asarray(cotangent), device=torch_device())

    def run() -> None:
        if outputs is None:
            root(inputs)
        else:
            torch.autograd.grad(root(inputs), inputs, outputs)
        torch_peer.synchronize(torch_device())

    return run
