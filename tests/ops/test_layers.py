import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.ops import dropout

KEY = jax.random.key(0)


@pytest.mark.usefixtures("unchecked_types")
@pytest.mark.parametrize("rate", [1, 1.0, 1.5, -0.1, float("nan"), np.float32(2)])
def test_dropout_refuses_rates_outside_its_range(rate):
    with pytest.raises(ValueError, match=r"rate of dropout must be a number in \[0, 1\), got "):
        dropout(jnp.ones((2, 3)), rate, KEY)
    with pytest.raises(ValueError, match="rate of dropout"):
        jax.jit(lambda x: dropout(x, rate, KEY))(jnp.ones((2, 3)))


@pytest.mark.usefixtures("unchecked_types")
def test_dropout_takes_a_traced_rate():
    x = jnp.ones((4, 50))
    np.testing.assert_array_equal(jax.jit(dropout)(x, 0.25, KEY), dropout(x, 0.25, KEY))
    np.testing.assert_array_equal(dropout(x, 0, KEY), x)
