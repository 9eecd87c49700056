"""Layers one by one: pooling, triangle, batch norm, loss and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import DOUBLE, SINGLE, assert_close, cases, column_order, load, to_matrix, to_ours

from gmsop_jax.models import BatchNorm
from gmsop_jax.ops import (
    average_pool,
    covariance_pool,
    matrix_power,
    newton_schulz_sqrt,
    second_order_pool,
    triangle_vector,
)
from gmsop_jax.training.metrics import count_errors
from gmsop_jax.training.step import cross_entropy

COVARIANCES = cases("layers/cov_*.npz")
WITH_COVARIANCE = [path for path in COVARIANCES if "cov_f64" in load(path)]
WITH_POWER = [path for path in COVARIANCES if "mpn_out_f64" in load(path)]
WITH_ITERATES = [path for path in COVARIANCES if "ns3_Y_f64" in load(path)]
MISC = load(cases("layers/misc.npz")[0])
by_name: Any = {"ids": lambda path: path.stem}


def positions(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def iterations(values):
    return sorted(int(key[2]) for key in values if key.endswith("_out_f64") and key[:2] == "ns")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", COVARIANCES, **by_name)
def test_second_order_pooling_in_double(path):
    values = load(path)
    x = jnp.asarray(values["x"], jnp.float64)
    cotangent = jnp.asarray(to_ours(values["dvec"]), jnp.float64)
    for k in iterations(values):
        y, vjp = jax.vjp(lambda x, k=k: second_order_pool(positions(x), k), x)
        assert_close("second-order pooling", y, to_ours(values[f"ns{k}_out_f64"]))
        (dx,) = vjp(cotangent)
        assert_close("second-order pooling, gradient", dx, values[f"ns{k}_dx_f64"])


@pytest.mark.parametrize("path", COVARIANCES, **by_name)
def test_second_order_pooling_in_single(path):
    values = load(path)
    x = jnp.asarray(values["x"])
    for k in iterations(values):
        y = second_order_pool(positions(x), k)
        assert y.dtype == jnp.float32
        assert_close("second-order pooling, f32", y, to_ours(values[f"ns{k}_out_f32"]), SINGLE)
        assert_close("second-order pooling, f32", y, to_ours(values[f"ns{k}_out_f64"]), SINGLE)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", WITH_POWER, **by_name)
def test_eigenvalue_power(path):
    """Theirs is √(λ + 10⁻¹²) and ours √λ; on these full-rank covariances that is less than the bound."""
    values = load(path)
    x = jnp.asarray(values["x"], jnp.float64)
    assert (values["mpn_rank"] == x.shape[-1]).all()
    y, vjp = jax.vjp(lambda x: triangle_vector(matrix_power(covariance_pool(positions(x)), 0.5)), x)
    (dx,) = vjp(jnp.asarray(to_ours(values["dvec"]), jnp.float64))
    for code in ("mpn", "mpn_m"):  # the compiled and the MATLAB version
        assert_close("eigenvalue power", y, to_ours(values[f"{code}_out_f64"]))
        assert_close("eigenvalue power, gradient", dx, values[f"{code}_dx_f64"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", WITH_ITERATES, **by_name)
def test_covariance_and_its_gradient(path):
    values = load(path)
    x = jnp.asarray(values["x"], jnp.float64)
    sigma, vjp = jax.vjp(lambda x: covariance_pool(positions(x)), x)
    assert_close("covariance", sigma, values["cov_f64"])
    (dx,) = vjp(jnp.asarray(values["dcov"], jnp.float64))
    assert_close("covariance, gradient", dx, values["cov_dx_f64"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", WITH_ITERATES, **by_name)
def test_newton_schulz_of_a_matrix_of_trace_one(path):
    """The authors' A = Σ/tr Σ has trace 1, and so our square root of it is their Yₖ."""
    values = load(path)
    a, sigma = jnp.asarray(values["trnorm_f64"]), jnp.asarray(values["cov_f64"])
    trace = jnp.trace(sigma, axis1=1, axis2=2)
    assert_close("trace", trace, values["trace_f64"])
    assert_close("trace normalisation", sigma / trace[:, None, None], a)
    for k in iterations(values):
        root = triangle_vector(newton_schulz_sqrt(a, k))
        assert_close("Newton–Schulz", root, to_ours(values[f"ns{k}_sqrtm_f64"]))
        for i in range(1, k):  # 1 and 2 are what the authors' code can't run on its own
            iterate = values[f"ns{k}_Y_f64"][:, i - 1]
            assert_close("Newton–Schulz, iterates", newton_schulz_sqrt(a, i), iterate)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", WITH_ITERATES, **by_name)
def test_gradient_of_newton_schulz_at_the_covariance(path):
    """Theirs isn't symmetric where the cotangent isn't; along symmetric directions both agree."""
    values = load(path)
    cotangent = jnp.asarray(to_matrix(values["dvec"].astype(np.float64)))
    for k in iterations(values):
        _, vjp = jax.vjp(lambda sigma, k=k: newton_schulz_sqrt(sigma, k), jnp.asarray(values["cov_f64"]))
        (ours,), theirs = vjp(cotangent), values[f"ns{k}_dP_f64"]
        ours, theirs = (m + m.swapaxes(1, 2) for m in (ours, theirs))
        assert_close("Newton–Schulz, gradient", ours, theirs)


def test_order_of_the_triangle():
    """MATLAB writes (0,0), (0,1), (1,1), (0,2), …; this project (0,0), (0,1), (0,2), …, (1,1), …"""
    m = np.arange(16.0).reshape(4, 4)
    theirs = m[column_order(4)]
    np.testing.assert_array_equal(theirs, [0, 1, 5, 2, 6, 10, 3, 7, 11, 15])
    np.testing.assert_array_equal(to_ours(theirs), [0, 1, 2, 3, 5, 6, 7, 10, 11, 15])
    np.testing.assert_array_equal(to_ours(theirs), triangle_vector(jnp.asarray(m)))


@pytest.mark.usefixtures("x64")
def test_batch_norm_in_training():
    x, w, b, dy = (jnp.asarray(MISC[f"bn_{name}"], jnp.float64) for name in ("x", "w", "b", "dy"))
    start = {"mean": jnp.zeros_like(w), "sigma": jnp.zeros_like(w)}
    module = BatchNorm(running_rate=1.0, epsilon=float(MISC["bn_eps"]))

    def forward(x, w, b):
        variables = {"params": {"scale": w, "bias": b}, "batch_stats": start}
        return module.apply(variables, x, train=True, mutable=["batch_stats"])

    y, vjp, updates = jax.vjp(forward, x, w, b, has_aux=True)
    dx, dw, db = vjp(dy)
    moments: Any = updates["batch_stats"]
    assert_close("batch norm", y, MISC["bn_y_f64"])
    assert_close("batch norm, moments", moments["mean"], MISC["bn_moments_f64"][:, 0])
    assert_close("batch norm, moments", moments["sigma"], MISC["bn_moments_f64"][:, 1])
    assert_close("batch norm, gradient", dx, MISC["bn_dx_f64"])
    assert_close("batch norm, gradient", dw, MISC["bn_dw_f64"])
    assert_close("batch norm, gradient", db, MISC["bn_db_f64"])


@pytest.mark.usefixtures("x64")
def test_batch_norm_at_test_time():
    x, w, b = (jnp.asarray(MISC[f"bn_{name}"], jnp.float64) for name in ("x", "w", "b"))
    mean, sigma = jnp.asarray(MISC["bn_test_moments"], jnp.float64).T
    variables = {
        "params": {"scale": w, "bias": b},
        "batch_stats": {"mean": mean, "sigma": sigma},
    }
    y: Any = BatchNorm().apply(variables, x, train=False)
    assert_close("batch norm, test time", y, MISC["bn_y_test_f64"])


@pytest.mark.usefixtures("x64")
def test_average_pooling():
    x = jnp.asarray(MISC["pool_x"], jnp.float64)
    y, vjp = jax.vjp(lambda x: average_pool(positions(x)), x)
    (dx,) = vjp(jnp.asarray(MISC["pool_dy"][:, 0, 0], jnp.float64))
    assert_close("average pooling", y, MISC["pool_y_f64"][:, 0, 0])
    assert_close("average pooling, gradient", dx, MISC["pool_dx_f64"])


@pytest.mark.usefixtures("x64")
def test_loss_and_errors():
    labels = jnp.asarray(MISC["loss_labels_1based"] - 1, jnp.int32)
    x = jnp.asarray(MISC["loss_x"], jnp.float64)
    loss, dx = jax.value_and_grad(cross_entropy)(x, labels)
    assert_close("loss", loss, MISC["loss_sum_f64"], DOUBLE)
    assert_close("loss, gradient", dx, MISC["loss_dx_f64"])
    for i in range(len(labels)):  # image 1 ties at the top, image 2 everywhere
        errors = count_errors(jnp.asarray(MISC["loss_x"][i : i + 1]), labels[i : i + 1])
        assert errors["top1_errors"] == MISC["top1error_each"][i], i
        assert errors["top5_errors"] == MISC["top5error_each"][i], i
