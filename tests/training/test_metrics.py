import jax.numpy as jnp
import numpy as np
import pytest

from gmsop_jax.training.metrics import NonFiniteError, check_metrics, count_errors, error_text, summarize


def count(logits, labels, mask=None) -> tuple[int, int, int]:
    result = count_errors(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), mask)
    return int(result["top1_errors"]), int(result["top5_errors"]), int(result["count"])


def test_counts_by_hand():
    logits = [[0, 1, 2, 3, 4, 5, 6]] * 4  # guesses 6, 5, 4, 3, 2
    assert count(logits, [6, 5, 2, 1]) == (3, 1, 4)


def test_fewer_than_five_classes():
    assert count([[0, 1, 2]] * 3, [2, 1, 0]) == (2, 0, 3)


def test_top5_is_left_out_where_it_is_always_zero():
    values = {"top1_error": 12.345, "top5_error": 0.0}
    assert error_text(values, num_classes=6) == "top-1 error 12.35 %, top-5 error 0.00 %"
    assert error_text(values, num_classes=5) == "top-1 error 12.35 %"


def test_padding_counts_nothing():
    assert count([[1, 0]] * 4, [0, 1, 1, 1], jnp.array([True, True, False, False])) == (1, 0, 2)


def test_equal_logits_are_no_hit_for_all():
    assert count([[0, 0, 0]] * 3, [0, 1, 2]) == (2, 0, 3)  # the lower class goes first


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_errors(bad):
    assert count([[bad] * 6], [0]) == (1, 1, 1)
    assert count([[0, bad, 0, 0, 0, 0]], [1]) == (1, 1, 1)


def test_ratios_are_over_images_and_not_over_batches():
    steps = [
        {"loss_sum": 6.0, "top1_errors": 2, "top5_errors": 1, "count": 3, "grad_norm": 1.0},
        {"loss_sum": 2.0, "top1_errors": 0, "top5_errors": 0, "count": 1, "grad_norm": 4.0},
    ]
    summary = summarize([{key: np.asarray(value) for key, value in step.items()} for step in steps])
    assert summary == {"loss": 2.0, "top1_error": 50.0, "top5_error": 25.0, "grad_norm": 2.5}


def test_nothing_to_summarize():
    empty = {"loss_sum": 0.0, "top1_errors": 0, "top5_errors": 0, "count": 0}
    for steps in ([], [{key: np.asarray(value) for key, value in empty.items()}]):
        with pytest.raises(ValueError, match="no images"):
            summarize(steps)


def test_messages_name_what_is_not_finite_in_words():
    metrics = {"loss_sum": np.array(np.nan), "balance_loss": np.array(1.0), "grad_norm": np.array(np.inf)}
    with pytest.raises(NonFiniteError, match="the loss and the norm of the gradient are not finite at step 3"):
        check_metrics(3, metrics)
