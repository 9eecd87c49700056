import dataclasses
import json
import logging

import pytest

from gmsop_jax.errors import CheckpointError
from gmsop_jax.training.inputs import Inputs

INPUTS = Inputs("some", ("a", "b"), (1.0, 2.0, 3.0), (8, 8), {"train": "2 images"})


def test_round_trips(tmp_path):
    INPUTS.save(tmp_path)
    assert Inputs.load(tmp_path) == INPUTS


def test_another_order_of_the_images_is_reported_once(tmp_path, caplog):
    """Earlier releases stored no version of the order."""
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    earlier = dataclasses.asdict(INPUTS)
    del earlier["order"]
    (tmp_path / "inputs.json").write_text(json.dumps(earlier))
    with caplog.at_level(logging.WARNING):
        INPUTS.save(tmp_path)
        assert "in another order (version 1; this is version 2)" in caplog.text
        caplog.clear()
        INPUTS.save(tmp_path)
        assert not caplog.text


@pytest.fixture
def trained(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    INPUTS.save(tmp_path)
    return tmp_path


def test_other_names_of_classes_are_reported_and_stored(trained, caplog):
    renamed = dataclasses.replace(INPUTS, classes=("a", "B"))
    with caplog.at_level(logging.WARNING):
        renamed.save(trained)
    expected = f"the names of 1 of 2 classes differ from those that {trained} was trained with ('b' is now 'B')"
    assert expected in caplog.text
    assert Inputs.load(trained) == renamed


def test_one_of_two_classes_of_the_same_name_may_be_renamed(tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    dataclasses.replace(INPUTS, classes=("crane", "crane")).save(tmp_path)
    renamed = dataclasses.replace(INPUTS, classes=("crane", "crane (machine)"))
    renamed.save(tmp_path)
    assert Inputs.load(tmp_path) == renamed


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("b", "a"), "order of the classes: 'a' is in another position"),
        (("b", "x"), "order of the classes: 'b' is in another position"),
        (("a", "b", "c"), "classes: 2 → 3"),
    ],
)
def test_another_order_or_number_of_classes_is_refused(trained, classes, message):
    with pytest.raises(CheckpointError, match=message):
        dataclasses.replace(INPUTS, classes=classes).save(trained)
    assert Inputs.load(trained) == INPUTS
