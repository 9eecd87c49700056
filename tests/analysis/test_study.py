import dataclasses
import json
from typing import Any, cast

import numpy as np
import pytest

from gmsop_jax.analysis.report import charts
from gmsop_jax.analysis.report.published import find_published
from gmsop_jax.analysis.report.runs import describe_network
from gmsop_jax.analysis.report.study import Study, study_run
from gmsop_jax.config import default_config
from gmsop_jax.errors import DataError
from gmsop_jax.models.network import HEADS


@pytest.fixture
def study():
    """Five images of three classes (none of the last), three candidates of which each selects up to two."""
    return Study(
        classes=("a", "b", "c"),
        split="val",
        total=5,
        labels=np.array([0, 0, 0, 1, 1]),
        predicted=np.array([0, 1, 1, 0, 1]),
        confidence=np.array([0.9, 0.8, 0.7, 0.6, 0.5]),
        gate_weights=np.array([[0.5, 0.5, 0], [0.25, 0.75, 0], [1, 0, 0], [0, 0.5, 0.5], [0, 0.9, 0.1]]),
        reader=cast(Any, None),
        positions=np.arange(5),
    )


def test_confusion_and_worst_pairs(study):
    assert study.confusion.tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 0]]
    assert study.worst_pairs(5) == [(0, 1), (1, 0)]
    assert study.worst_pairs(1) == [(0, 1)]


def test_use_by_class(study):
    use = study.by_class(study.gate_weights)
    np.testing.assert_allclose(use[0], [1.75 / 3, 1.25 / 3, 0])
    np.testing.assert_allclose(use[1], [0, 0.7, 0.3])
    assert np.isnan(use[2]).all()


def test_entropy(study):
    np.testing.assert_allclose(study.entropy[[0, 2, 3]], [1, 0, 1])
    assert study.entropy[1] == pytest.approx(2 - 0.75 * np.log2(3))


def test_together(study):
    # candidate 0 is selected by images 0, 1, 2, two of which select 1; 1 by 0, 1, 3, 4; 2 by 3, 4
    np.testing.assert_allclose(study.together, [[1, 2 / 3, 0], [0.5, 1, 0.5], [0, 1, 1]])


def test_heaviest(study):
    assert study.heaviest(1, 3) == [4, 1, 0]
    assert study.heaviest(2, 3) == [3, 4]  # the others give it no weight


def test_a_candidate_that_no_image_selects_is_left_out(study):
    idle = dataclasses.replace(study, gate_weights=np.pad(study.gate_weights, [(0, 0), (0, 1)]))
    assert np.isnan(idle.together[3]).all()
    cells = charts.together(idle).spec["data"]["values"]
    assert {cell["candidate"] for cell in cells} == {"0", "1", "2"}
    assert idle.heaviest(3, 5) == []


def test_only_the_most_confused_of_many_classes_are_shown(study):
    many = dataclasses.replace(study, classes=tuple(f"c{i}" for i in range(100)), labels=np.array([7, 7, 7, 50, 99]))
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


def test_study_agrees_with_evaluation(trained_run):
    study = study_run(trained_run, None, 10_000)
    records = [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]
    best = min((r for r in records if r["kind"] == "eval"), key=lambda r: (r["top1_error"], -r["step"]))
    assert 100 * np.mean(study.labels != study.predicted) == pytest.approx(best["top1_error"])
    np.testing.assert_allclose(study.gate_weights.mean(0), best["candidate_use"], atol=1e-5)
    assert study.image(3).shape == (28, 28, 3)


def test_a_sample_of_a_large_split(trained_run):
    study = study_run(trained_run, None, 70)
    assert len(study.labels) == len(set(study.positions.tolist())) == 70
    assert study.total == 200
    whole = study_run(trained_run, None, 200)
    np.testing.assert_array_equal(study.labels, whole.labels[study.positions])
    np.testing.assert_allclose(study.confidence, whole.confidence[study.positions], atol=1e-5)


def test_missing_data_is_reported(trained_run, tmp_path):
    with pytest.raises(DataError, match="no data set at"):
        study_run(trained_run, tmp_path, 10)
