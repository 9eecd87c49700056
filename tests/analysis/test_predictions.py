import dataclasses
import json
import shutil
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gmsop_jax
from gmsop_jax.analysis.published import describe_network, find_published
from gmsop_jax.analysis.report import charts
from gmsop_jax.analysis.report.predictions import Predictions, predict_split
from gmsop_jax.config import default_config
from gmsop_jax.errors import DataError
from gmsop_jax.models import create_model
from gmsop_jax.models.network import HEADS
from gmsop_jax.training.step import normalize


@pytest.fixture
def predictions():
    """Five images of three classes (none of the last), three candidates of which each selects up to two."""
    return Predictions(
        classes=("a", "b", "c"),
        split="val",
        total=5,
        labels=np.array([0, 0, 0, 1, 1]),
        predicted=np.array([0, 1, 1, 0, 1]),
        confidence=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
        gate_weights=np.array([[0.5, 0.5, 0], [0.25, 0.75, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0.9, 0.1]]),
        mirrored_confidence=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
        mirrored_weights=np.zeros((5, 3)),
        errors=None,
        reader=cast(Any, None),
        positions=np.arange(5),
    )


def test_confusion(predictions):
    assert predictions.confusion.tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]


def test_use_by_class(predictions):
    use = predictions.by_class(predictions.gate_weights)
    np.testing.assert_allclose(use[0], [1.75 / 3, 1.25 / 3, 0])
    np.testing.assert_allclose(use[1], [0, 0.7, 0.3])
    assert np.isnan(use[2]).all()


def test_entropy(predictions):
    np.testing.assert_allclose(predictions.entropy[[0, 2, 3]], [1, 0, 1])
    assert predictions.entropy[1] == pytest.approx(2 - 0.75 * np.log2(3))


def test_together(predictions):
    # candidate 0 is selected by images 0, 1, 2, two of which select 1; 1 by 0, 1, 3, 4; 2 by 3, 4
    np.testing.assert_allclose(predictions.together, [[1, 2 / 3, 0], [0.5, 1, 0.5], [0, 1, 1]])


def test_a_candidate_that_no_image_selects_is_left_out(predictions):
    idle = dataclasses.replace(predictions, gate_weights=np.pad(predictions.gate_weights, [(0, 0), (0, 1)]))
    assert np.isnan(idle.together[3]).all()
    cells = charts.together(idle).spec["data"]["values"]
    assert {cell["candidate"] for cell in cells} == {"0", "1", "2"}


def test_only_the_most_confused_of_many_classes_are_shown(predictions):
    many = dataclasses.replace(
        predictions, classes=tuple(f"c{i}" for i in range(100)), labels=np.array([7, 7, 7, 50, 99])
    )
    chart = charts.confusion(many, most=2)
    assert {cell["true"] for cell in chart.spec["data"]["values"]} == {"c7", "c50"}
    assert "2 classes with the most errors" in chart.title
    shown = [bar["class"] for bar in charts.entropy(many, 2, most=2).spec["data"]["values"]]
    assert shown == ["c99", "c50"]


def test_published_rows():
    config = default_config()
    row = find_published(config)
    assert row is not None
    assert (row.top1_error, row.top5_error) == (38.48, 17.38)
    config.model.num_selected = 4
    assert find_published(config) is None
    config.model.head = "srsop"
    row = find_published(config)
    assert row is not None
    assert row.top1_error == 40.56


@pytest.mark.parametrize("head", HEADS)
def test_every_head_has_a_description(head):
    config = default_config()
    config.model.head = head
    assert describe_network(config.model).endswith(" on ResNet-18")


def test_description_of_a_head():
    config = default_config()
    config.model.update(head="srsop", projection_widths=(256, 64), blocks_per_stage=1, stage_widths=(8, 16))
    assert describe_network(config.model) == "SR-SOP of 64 channels on 1 block × (8, 16)"
    config.model.update(head="avegap", num_candidates=4)
    assert describe_network(config.model) == "Ave-GAP-4 on 1 block × (8, 16)"


def test_published_results_belong_to_their_data_set():
    """Photos of 10 classes are not ImageNet, even if the configuration was made for ImageNet."""
    config = default_config()
    assert find_published(config, num_classes=1000, image_size=(64, 64)) is not None
    assert find_published(config, num_classes=10, image_size=(64, 64)) is None
    assert find_published(config, num_classes=1000, image_size=(32, 32)) is None


@pytest.fixture(scope="module")
def predicted(trained_run):
    return predict_split(trained_run, None, 10_000)


def test_predictions_agree_with_the_last_evaluation(predicted, trained_run):
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r["kind"] == "eval"][-1]
    assert 100 * np.mean(predicted.labels != predicted.predicted) == pytest.approx(last["top1_error"])
    np.testing.assert_allclose(predicted.gate_weights.mean(0), last["candidate_use"], atol=1e-5)
    assert predicted.image(3).shape == (28, 28, 3)


def test_errors_with_other_weights_agree_with_the_network(predicted, trained_run):
    errors, weights = predicted.errors, predicted.gate_weights
    np.testing.assert_array_equal(errors.gate, predicted.labels != predicted.predicted)
    np.testing.assert_array_equal(errors.top_k[1], errors.gate)
    largest = weights.argmax(1)
    np.testing.assert_array_equal(errors.alone[largest, np.arange(len(largest))], errors.top_k[0])
    for i in range(4):
        unused = weights[:, i] == 0
        np.testing.assert_array_equal(errors.without[i][unused], errors.gate[unused])
    # The same networks with another k, without the shortcut through the logits of each candidate.
    _, variables, info = gmsop_jax.load(trained_run / "checkpoints" / "10")
    images = normalize(jnp.stack([predicted.image(row) for row in range(50)]), info.inputs.mean_rgb)
    for k in (1, 4):
        info.config.model.num_selected = k
        logits, _ = jax.jit(create_model(info.config.model).apply)(variables, images)
        np.testing.assert_array_equal(errors.top_k[k - 1][:50], logits.argmax(1) != predicted.labels[:50])


def test_errors_with_other_weights_of_a_run_with_mirror_images(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["eval"]["flip_average"] = True
    (run / "config.json").write_text(json.dumps(config))
    mirrored = predict_split(run, None, 64)
    assert mirrored.errors is not None
    np.testing.assert_array_equal(mirrored.errors.gate, mirrored.labels != mirrored.predicted)


def test_a_sample_of_a_large_split(predicted, trained_run):
    sample = predict_split(trained_run, None, 70)
    assert len(sample.labels) == len(set(sample.positions.tolist())) == 70
    assert sample.total == 200
    np.testing.assert_array_equal(sample.labels, predicted.labels[sample.positions])
    np.testing.assert_allclose(sample.confidence, predicted.confidence[sample.positions], atol=1e-5)


def test_missing_data_is_reported(trained_run, tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        predict_split(trained_run, tmp_path, 10)


def test_other_data_with_the_same_classes_is_refused(trained_run, fashion):
    with pytest.raises(DataError, match=r"is not the one that .* was evaluated on"):
        predict_split(trained_run, fashion, 10)
