import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.training.step import update_average


def test_three_steps_by_hand():
    # d = 1/10, 2/11, 3/12, below the decay
    average = {"a": jnp.array([8.0])}
    for step, (d, new) in enumerate(((0.1, 1.0), (2 / 11, -3.0), (0.25, 5.0))):
        expected = d * float(average["a"][0]) + (1 - d) * new
        average = update_average(average, {"a": jnp.array([new])}, jnp.int32(step), 0.999)
        np.testing.assert_allclose(average["a"], [expected], rtol=1e-6)
    assert average["a"].dtype == jnp.float32


@pytest.mark.parametrize(("step", "d"), [(0, 0.1), (80, 0.9), (81, 0.9), (10**6, 0.9)])
def test_the_decay_is_the_maximum(step, d):
    average = update_average(jnp.float32(1.0), jnp.float32(0.0), jnp.int32(step), 0.9)
    assert float(average) == pytest.approx(d, rel=1e-6)


def test_what_is_left_of_the_start_after_ten_steps():
    average = jnp.float32(1.0)
    for step in range(10):
        average = update_average(average, jnp.float32(0.0), jnp.int32(step), 0.999)
    assert float(average) == pytest.approx(1.08e-5, rel=0.01)
