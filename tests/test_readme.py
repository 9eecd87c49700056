import pathlib
import re

import jax.numpy as jnp
import pytest

from gmsop_jax.ops import newton_schulz_sqrt

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_examples_run_and_the_stated_errors_are_right():
    text = README.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 4
    names: dict = {}
    for block in blocks:
        names.pop("loss", None)
        exec(block, names)
        if "train_step" in block:  # one loop each with Linen, NNX and functions
            assert names["loss"] < 2.0  # log(10) = 2.3 for a guess
    assert names["aux"]["features"].shape == (40, 32 * 33 // 2)
    assert names["vector"].shape == (8, 2080)
    stated = re.search(
        r"differs from Σ by (\S+) % after 3 iterations, by (\S+) % after 5, and by\s+(\S+) % after 10", text
    )
    assert stated
    for num_iters, percent in zip((3, 5, 10), stated.groups(), strict=True):
        root, sigma = newton_schulz_sqrt(names["sigma"], num_iters=num_iters), names["sigma"]
        error = 100 * jnp.linalg.norm(root @ root - sigma) / jnp.linalg.norm(sigma)
        assert float(error) == pytest.approx(float(percent), rel=0.03)


def test_the_files_that_it_names_are_there():
    text = README.read_text()
    named = re.findall(r"`(\w+\.py)`|\]\(([\w/]+\.md)\)|((?:configs|tools)/\w+\.py)", text)
    missing = []
    for name in {part for match in named for part in match if part}:
        places = (name, f"configs/{name}", f"gmsop_jax/{name}")
        if not any((README.parent / place).exists() for place in places):
            missing.append(name)
    assert not missing
