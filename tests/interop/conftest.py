import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from gmsop_jax.config import model_defaults
from gmsop_jax.models import create_model

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture
def goldens():
    return GOLDENS


@pytest.fixture(scope="session")
def checkpoint_path():
    """A checkpoint that the authors' training script wrote."""
    return GOLDENS / "ckpt/ResNet18-SR-SOP/net-epoch-5.mat"


@pytest.fixture(scope="session")
def maker():
    """The script that made the stored values of PyTorch's networks, as a module."""
    spec = importlib.util.spec_from_file_location("make_torch", GOLDENS / "make_torch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def small_model():
    """A function from a head's name to the (configuration, variables) of a small network."""
    made = {}

    def make(head="gmsop", **fields):
        key = (head, *sorted(fields.items()))
        if key not in made:
            config = model_defaults()
            config.update(
                {
                    "head": head,
                    "num_classes": 3,
                    "blocks_per_stage": 1,
                    "stage_widths": (4, 6),
                    "stage_strides": (1, 1) if head in ("srsop", "gmsop") else (1, 2),
                    "stem_width": 5,
                    "num_candidates": 3,
                    "num_selected": 2,
                    "candidate_widths": (5, 3),
                    "gate_widths": (4, 3),
                    "gate_gradient": "masked",
                    **fields,
                }
            )
            images = np.zeros((1, 8, 8, 3), np.float32)
            shapes = jax.eval_shape(create_model(config).init, jax.random.key(0), images)
            draw = np.random.default_rng(0)
            made[key] = config, jax.tree.map(lambda leaf: draw.random(leaf.shape, np.float32), shapes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def assert_same():
    """A function that compares two trees bit for bit."""

    def compare(actual, expected):
        actual = jax.tree_util.tree_leaves_with_path(actual)
        expected = jax.tree_util.tree_leaves_with_path(expected)
        assert [path for path, _ in actual] == [path for path, _ in expected]
        for (path, a), (_, b) in zip(actual, expected, strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), path
            assert a.tobytes() == b.tobytes(), path

    return compare
