import pytest

from gmsop_jax.training.divergence import check_evaluation
from gmsop_jax.training.metrics import NonFiniteError


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e20])
def test_a_state_whose_evaluation_diverged_is_not_saved(loss):
    with pytest.raises(NonFiniteError, match=r"evaluation loss (is not finite|diverged to 1e\+20)"):
        check_evaluation(7, {"loss": loss})
    check_evaluation(7, {"loss": 700.0})
