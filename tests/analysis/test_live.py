"""What a run writes for TensorBoard during training."""

import io
import struct

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from gmsop_jax import main
from gmsop_jax.training.writer import profile_steps


@pytest.fixture(scope="module")
def values(trained_run):
    """(step, value) of every summary in the run's events, which are length-framed records."""
    found = []
    for file in trained_run.glob("events.out.tfevents.*"):
        stream = io.BytesIO(file.read_bytes())
        while header := stream.read(12):
            event = Event.FromString(stream.read(struct.unpack("<Q", header[:8])[0]))
            stream.read(4)
            found += [(event.step, value) for value in event.summary.value]
    return found


def test_scalars(values):
    tags = {value.tag for _, value in values if value.HasField("simple_value")}
    assert {"train/loss", "train/balance_loss", "train/learning_rate", "eval/top1_error"} <= tags


def test_resolved_configuration_as_text(values):
    [text] = [value.tensor.string_val[0].decode() for _, value in values if value.tag.startswith("config")]
    assert '"num_candidates": 4' in text
    assert all(line.startswith("    ") for line in text.splitlines())  # a code block in Markdown


def test_a_picture_of_candidate_use_for_each_epoch(values):
    pictures = [(step, value.image) for step, value in values if value.tag == "eval/candidate_use"]
    assert [step for step, _ in pictures] == [5, 10]
    image = np.asarray(Image.open(io.BytesIO(pictures[0][1].encoded_image_string)))
    assert image.shape == (250, 500, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 2


def test_profile_of_the_requested_steps(trained_run):
    [file] = (trained_run / "plugins" / "profile").glob("*/*.xplane.pb")
    assert file.stat().st_size > 1000


def test_a_profile_ends_with_the_run(tmp_path):
    """Steps beyond the run's end leave a whole profile of those that were done."""
    with profile_steps(tmp_path, range(2, 100)) as profiled:
        with profiled(1):
            pass
        assert not list(tmp_path.iterdir())
        with profiled(2):
            pass
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("text", ["5", "5:5", "7:5", "0:3", "a:b", "-1:3"])
def test_wrong_steps_are_refused(text, capsys):
    assert main.main(["--config", "configs/quickstart.py", f"--profile={text}"]) == 2
    assert "is not START:STOP" in capsys.readouterr().err
