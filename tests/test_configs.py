import ast
import pathlib

import jax
import jax.numpy as jnp
import pytest

from gmsop_jax import config as configs
from gmsop_jax.models import create_model

FILES = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))
by_name = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


@by_name
def test_a_configuration_is_valid_and_says_how_it_is_run(file):
    config = configs.load(file)
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    assert f"python -m gmsop_jax.main --config configs/{file.name}" in docstring
    assert "Published:" in docstring or file.stem == "quickstart"
    assert sum(epochs for _, epochs in config.train.learning_rates) == config.train.num_epochs


@by_name
def test_its_network_takes_the_images(file):
    model_config = configs.load(file).model
    side = {"imagenet64": 64, "places365": 100}.get(file.stem.partition("_")[0], 28)
    model_config.num_classes = 365 if side == 100 else 1000
    model = create_model(model_config)
    images = jnp.zeros((2, side, side, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    logits, aux = jax.eval_shape(model.apply, variables, images)
    assert logits.shape == (2, model_config.num_classes)
    dimensions = {"gap": 128, "gap_512d": 512, "gmgap": 512, "wrn_gmgap": 512}
    expected = dimensions.get(file.stem.partition("_")[2], 528 if side == 28 else 8256)
    assert aux["features"].shape == (2, expected)


@pytest.mark.parametrize(("width", "millions"), [(512, 1.3), (8256, 10.0)])
def test_projected_baselines_have_the_published_parameters(width, millions):
    model_config = configs.load(FILES[0].with_name("imagenet64_gap.py")).model
    model_config.num_classes, model_config.projection_widths = 1000, (width,)
    model = create_model(model_config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6, 1) == millions
