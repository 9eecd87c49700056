import re
import types
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import precision as tool
import pytest
from flax import nnx
from jax.lax import DotAlgorithmPreset, Precision

import gmsop_jax.nnx as nnx_heads
from gmsop_jax import models, ops
from gmsop_jax.ops.coefficients import iteration_steps

PAGE = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text("utf-8")
PRESETS = ("BF16_BF16_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32_X6", "TF32_TF32_F32", "TF32_TF32_F32_X3")
MAPS = jnp.ones((2, 3, 3, 4))
FUNCTIONS = {
    "covariance_pool": ops.covariance_pool,
    "newton_schulz_sqrt": ops.newton_schulz_sqrt,
    "newton_schulz_inverse_sqrt": ops.newton_schulz_inverse_sqrt,
    "second_order_pool": ops.second_order_pool,
    "second_order_pool, forward mode": partial(ops.second_order_pool, forward_mode=True),
    "second_order_pool, mask": partial(ops.second_order_pool, where=np.ones((2, 4))),
    "matrix_power": ops.matrix_power,
    "cross_covariance_pool": lambda x, precision: ops.cross_covariance_pool(x, x, precision=precision),
}
HEADS = {
    "CovarianceHead": {},
    "SecondOrderHead": {},
    "MPNCOVHead": {},
    "DropCovHead": {},
    "CrossCovarianceHead": {"num_heads": 2, "head_width": 2},
    "MixtureHead": {"num_candidates": 2, "candidate_widths": (3,)},
    "GatedMixtureHead": {"num_candidates": 2, "candidate_widths": (3,), "num_selected": 1, "gate_widths": (3,)},
}


def products(function: Any, *arguments: Any, platform: str = "cuda") -> list[str]:
    """The products of matrices in the program that is handed to XLA; the mean, a product with a row, is in float32."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    found = [line for line in text.splitlines() if "dot_general" in line]
    rows = [line for line in found if re.search(r"tensor<(\d+x)*1x\d+xf32>", line)]
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in rows)
    return [line for line in found if line not in rows]


def with_gradient(function: Any) -> Any:
    return jax.value_and_grad(lambda x: jnp.sum(function(x)))


def on_device(monkeypatch: pytest.MonkeyPatch, compute_capability: str) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=compute_capability)])


def test_parts_of_bfloat16_are_those_of_the_format():
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.float32(2) ** np.arange(-50, 50).repeat(10)
    x = np.append(x, [0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8]).astype(np.float32)  # zeros, and ties
    np.testing.assert_array_equal(tool.round_significand(x, 8), np.asarray(x.astype(jnp.bfloat16), np.float32))


def test_tf32_by_hand():
    x = np.array([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, -1 - 2**-11 - 2**-23], np.float32)
    np.testing.assert_array_equal(tool.round_significand(x, 11), [1 + 2**-10, 1, 1 + 2**-9, -1 - 2**-10])


@pytest.mark.parametrize(("precision", "digits"), list(zip(PRESETS, (8, 16, 24, 11, 22), strict=True)))
def test_emulated_product_has_the_digits_of_its_parts(precision, digits):
    x, y = np.random.default_rng(0).normal(size=(2, 1, 64, 1)).astype(np.float32)  # outer products: nothing is summed
    product = tool.product_of(precision)(x, y[..., None, :, 0])
    exact = x.astype(np.float64) * y[..., None, :, 0]
    error = np.max(abs(product - exact) / abs(exact))
    assert 2.0 ** -(digits + 1.5) < error + 2.0**-24 < 2.0 ** (2 - min(digits, 24))


@pytest.mark.parametrize("coefficients", tool.COEFFICIENTS)
@pytest.mark.parametrize("n", [1, 4, 5, 8])
def test_the_tool_computes_what_the_library_computes(x64, coefficients, n):
    x = np.random.default_rng(0).normal(size=(2, 9, 6))
    pooled, pullback = jax.vjp(partial(ops.second_order_pool, num_iters=n, coefficients=coefficients), x)
    g = np.random.default_rng(1).normal(size=pooled.shape)
    sigma, direction = tool.covariance(x, np.matmul), np.asarray(ops.triangle_matrix(g)) * (1 + np.eye(6)) / 2
    root, gradient = tool.root_and_gradient(sigma, direction, iteration_steps(n, coefficients), np.matmul)
    np.testing.assert_allclose(ops.triangle_vector(root), pooled, rtol=1e-11, atol=1e-12)
    centered = x - np.mean(x, axis=1, keepdims=True)
    np.testing.assert_allclose(centered @ (2 * gradient) / 9, pullback(jnp.asarray(g))[0], rtol=1e-10, atol=1e-11)


def test_the_tool_computes_the_products_of_the_library():
    """Those of the gradient are the 8 of a symmetric cotangent."""
    count = 0

    def product(x, y):
        nonlocal count
        count += 1
        return x @ y

    tool.root_and_gradient(np.eye(4), tool.cotangent((4, 4)), iteration_steps(3, "newton_schulz"), product)
    assert count == 5 + 8


@pytest.mark.parametrize("coefficients", tool.COEFFICIENTS)
def test_published_errors_of_precisions(coefficients):
    key = ("κ = 1000", 64, coefficients)
    rows = [numbers(row) for row in PAGE.splitlines() if row.startswith(f"| {key[0]} | 64 | {coefficients} | 5 |")]
    assert len(rows) == 1
    np.testing.assert_allclose(tool.rounding_errors(tool.synthetic(64, 1e3), coefficients, 5), rows[0], rtol=0.3)


def test_published_errors_of_the_iteration():
    row = re.findall(r"\| κ = 1000 \| 64 \| minimax \| root \|(.*)\|", PAGE)[0]
    published = [float(cell) for cell in row.split("|")]
    sigma = tool.synthetic(64, 1e3).astype(np.float64)
    found = [tool.iteration_errors(sigma, "minimax", n)[0] for n in (1, 3, 8)]
    np.testing.assert_allclose(found, [published[n - 1] for n in (1, 3, 8)], rtol=0.05)


def test_default_of_accelerators_is_the_cheapest_that_reaches_the_goal():
    """On covariances of features, with the iterations of the published networks."""
    rows = re.findall(r"^\| features \| \d+ \| newton_schulz \| [35] \|.*$", PAGE, re.M)
    worst = np.max([numbers(row) for row in rows], axis=(0, 2))
    assert len(rows) == 4
    errors = dict(zip(tool.PRECISIONS, worst, strict=True))
    assert errors["BF16_BF16_F32_X6"] < tool.GOAL
    assert min(errors["BF16_BF16_F32_X3"], errors["TF32_TF32_F32"], errors["BF16_BF16_F32"]) > tool.GOAL


def test_example_of_the_page_runs():
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.S)[0], names)
    assert names["root"].shape == names["closer"].shape == (2, 16, 16)


def numbers(row: str) -> list[list[float]]:
    """The cells of a row of the table of precisions."""
    return [[float(number) for number in cell.replace("> 1", "inf").split("/")] for cell in row.split("|")[5:-1]]


@pytest.mark.parametrize("precision", PRESETS)
def test_programs_for_cuda_contain_the_algorithm(precision):
    algorithm = {"T": "lhs_precision_type = tf32", "B": "lhs_precision_type = bf16"}[precision[0]]
    passes = f"num_primitive_operations = {precision[-1] if '_X' in precision else 1},"
    found = products(with_gradient(partial(ops.second_order_pool, precision=precision)), jnp.ones((2, 5, 4)))
    assert len(found) == 1 + 5 + 12 + 1  # covariance, root, its gradient, that of the covariance
    assert all(algorithm in line and passes in line for line in found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_product_of_a_function_has_its_precision(name):
    found = products(with_gradient(partial(FUNCTIONS[name], precision="BF16_BF16_F32_X3")), jnp.ones((2, 4, 4)))
    assert found
    assert all("num_primitive_operations = 3," in line for line in found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_default_on_a_cpu_is_float32(name):
    function = with_gradient(partial(FUNCTIONS[name], precision=None))
    found = products(function, jnp.ones((2, 4, 4)), platform="cpu")
    assert found
    assert all("precision = [HIGHEST, HIGHEST]" in line and "algorithm" not in line for line in found)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_precision_of_heads_is_that_of_their_pooling(name, kind):
    """What a head computes without the fields of pooling has no algorithm."""

    def count(precision: Any) -> int:
        if kind == "linen":
            head = getattr(models, name)(3, **HEADS[name], pool_precision=precision)
            variables = jax.eval_shape(head.init, jax.random.key(0), MAPS)
            found = products(lambda variables, x: head.apply(variables, x)[0], variables, MAPS)
        else:
            create = partial(getattr(nnx_heads, name), 4, 3, **HEADS[name], pool_precision=precision)
            graph, state = nnx.split(nnx.eval_shape(lambda: create(rngs=nnx.Rngs(0))))
            found = products(lambda state, x: nnx.merge(graph, state)(x)[0], state, MAPS)
        return sum("num_primitive_operations = 6," in line for line in found)

    root = {"CovarianceHead": 1, "DropCovHead": 1, "CrossCovarianceHead": 1, "MPNCOVHead": 2, "GatedMixtureHead": 12}
    assert count("BF16_BF16_F32_X6") == root.get(name, 6)
    assert count(None) == 0


def test_minimax_coefficients_of_heads():
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype(np.float32)
    head = models.SecondOrderHead(3, num_iters=5, coefficients="minimax")
    variables = head.init(jax.random.key(0), x)
    pooled = ops.second_order_pool(x, 5, coefficients="minimax")
    assert not np.allclose(pooled, ops.second_order_pool(x, 5), rtol=1e-2)
    output: Any = head.apply(variables, x)
    np.testing.assert_allclose(output[1]["features"], pooled, rtol=1e-6)
    other = nnx_heads.from_linen(head, variables)
    np.testing.assert_allclose(other(x)[1]["features"], pooled, rtol=1e-6)


@pytest.mark.parametrize(
    ("capability", "default"),
    [
        *[(capability, DotAlgorithmPreset.BF16_BF16_F32_X6) for capability in ("8.0", "9.0", "10.0", "10.3")],
        *[(capability, Precision.HIGHEST) for capability in ("7.5", "8.6", "8.9", "12.0", "gfx90a")],
    ],
)
def test_default_of_gpus(monkeypatch, capability, default):
    on_device(monkeypatch, capability)
    assert ops.matrix_precision(None, jnp.float32) == default
    assert ops.matrix_precision(None, jnp.float64) == Precision.HIGHEST
    assert ops.matrix_precision("highest", jnp.float32) == "highest"


def test_default_of_a_gpu_reaches_its_program(monkeypatch):
    on_device(monkeypatch, "9.0")
    found = products(with_gradient(ops.second_order_pool), jnp.ones((2, 5, 4), jnp.bfloat16))
    assert all("num_primitive_operations = 6," in line for line in found)


def test_double_precision_keeps_its_digits(x64, monkeypatch):
    on_device(monkeypatch, "9.0")
    found = products(with_gradient(ops.second_order_pool), jnp.ones((2, 5, 4)))
    assert found
    assert all("xf64" in line and "algorithm" not in line for line in found)
    with pytest.raises(ValueError, match=r"precision='BF16_BF16_F32_X6' does not accumulate in float64, .*'highest'"):
        ops.newton_schulz_sqrt(jnp.eye(2), precision="BF16_BF16_F32_X6")


def test_precisions_that_are_refused():
    with pytest.raises(ValueError, match="'BF16_BF16_BF16' does not accumulate in float32"):
        ops.covariance_pool(jnp.ones((2, 3)), precision="BF16_BF16_BF16")


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("unknown", ["tf32", "", ("highest", "BF16_BF16_F32_X6"), ("high",), 2])
def test_an_unknown_precision_is_named_with_the_known_ones(unknown):
    message = rf"recision must be None, 'default', 'high', 'highest', or a .*, got {re.escape(repr(unknown))}$"
    for function in FUNCTIONS.values():
        with pytest.raises(ValueError, match=f"^p{message}"):
            function(jnp.ones((2, 4, 4)), precision=unknown)
    for name, fields in HEADS.items():
        fields = {**fields, "pool_precision": unknown}
        for head in (getattr(models, name), partial(getattr(nnx_heads, name), 4, rngs=nnx.Rngs(0))):
            with pytest.raises(ValueError, match=rf"^{name}\.pool_p{message}"):
                head(num_classes=3, **fields)


@pytest.mark.usefixtures("unchecked_types")
def test_precisions_that_jax_knows_are_accepted():
    levels = ("default", "fastest", "high", "bfloat16_3x", "highest", "float32", "tensorfloat32", *Precision)
    for precision in (None, *levels, ("high", "highest"), (Precision.HIGH, Precision.HIGH), "F32_F32_F32", "DEFAULT"):
        assert np.isfinite(ops.newton_schulz_sqrt(jnp.eye(2), precision=precision)).all()
    with pytest.raises(ValueError, match="'TF32_TF32_F32' is not supported by dot_general on CPU"):
        ops.newton_schulz_sqrt(jnp.eye(2), precision="TF32_TF32_F32")
