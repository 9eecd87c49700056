import pathlib
import re

import jax

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_examples_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(block, names)
    root, sigma = names["root"], names["sigma"]
    assert names["vector"].shape == (8, 2080)
    assert jax.numpy.allclose(root @ root, sigma, atol=1e-5)


def test_the_files_that_it_names_are_there():
    text = README.read_text()
    named = re.findall(r"`(\w+\.py)`|\]\(([\w/]+\.md)\)|((?:configs|tools)/\w+\.py)", text)
    missing = []
    for name in {part for match in named for part in match if part}:
        places = (name, f"configs/{name}", f"gmsop_jax/{name}")
        if not any((README.parent / place).exists() for place in places):
            missing.append(name)
    assert not missing
