import dataclasses
import json
import logging

from gmsop_jax.training.inputs import Inputs

INPUTS = Inputs("some", ("a", "b"), (1.0, 2.0, 3.0), (8, 8), {"train": "2 images"})


def test_round_trips(tmp_path):
    INPUTS.save(tmp_path)
    assert Inputs.load(tmp_path) == INPUTS


def test_another_order_of_the_images_is_said_once(tmp_path, caplog):
    """Releases before the order had a version wrote none."""
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
