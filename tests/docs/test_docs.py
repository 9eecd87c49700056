import ast
import json
import pathlib
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

import gmsop_jax
from gmsop_jax import config, main
from gmsop_jax.analysis import summary
from gmsop_jax.analysis.published import find_published
from gmsop_jax.nnx import from_linen

ROOT = pathlib.Path(__file__).parents[2]
make_docs = runpy.run_path(str(ROOT / "tools" / "make_docs.py"))


def test_configuration_reference_is_that_of_the_code():
    """After a change of config/fields.py run tools/make_docs.py."""
    assert (ROOT / "docs" / "configuration.md").read_text("utf-8") == make_docs["configuration_reference"]()


def test_source_tree_is_that_of_the_code():
    """After adding a module or changing the first line of its docstring, run tools/make_docs.py."""
    assert make_docs["source_tree"]() in (ROOT / "docs" / "code.md").read_text("utf-8")


def test_reference_has_every_field():
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    assert set(re.findall(r"^\| `([\w.]+)`", text, re.M)) == set(dict(config.flatten(config.default_config())))


def test_a_field_without_description_is_an_error(monkeypatch):
    monkeypatch.setitem(config.FIELDS, "train.batch_size", config.Field(256, ""))
    with pytest.raises(make_docs["DocsError"], match=r"give a description to .*train\.batch_size"):
        make_docs["configuration_reference"]()


def test_site_builds_without_warnings(tmp_path):
    make_docs["build"](tmp_path)
    assert "Newton–Schulz" in (tmp_path / "api" / "gmsop_jax" / "ops.html").read_text("utf-8")
    assert 'href="results.html"' in (tmp_path / "index.html").read_text("utf-8")
    assert 'href="index.html"' in (tmp_path / "own-model.html").read_text("utf-8")
    for page in tmp_path.glob("*.html"):
        for target in re.findall(r'(?:href|src)="([\w/.-]+\.(?:html|svg))"', page.read_text("utf-8")):
            assert (tmp_path / target).exists(), (page.name, target)


def test_dead_links_are_reported(tmp_path, monkeypatch):
    (tmp_path / "page.md").write_text("[here](page.md) [there](gone.md#part) [web](https://example.org/x.md)")
    monkeypatch.setitem(make_docs["check_links"].__globals__, "ROOT", tmp_path)
    with pytest.raises(make_docs["DocsError"], match=r"page\.md: gone\.md$"):
        make_docs["check_links"]([tmp_path / "page.md"])


def test_python_of_the_prediction_guide_runs(trained_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(trained_run)
    rng = np.random.default_rng(0)
    for name in ("shoe.jpg", "other.png"):
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)).save(name)
    arguments = ["--mode", "predict", "--checkpoint", "runs/first", "--input", "shoe.jpg", "other.png"]
    assert main.main([*arguments, "--features", "out.npz"]) == 0
    nearest, in_python = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "predict.md").read_text(), re.S)
    predicted = capsys.readouterr().out.splitlines()[1].split()[1]
    exec(nearest, {})
    assert capsys.readouterr().out.startswith("['shoe.jpg'")
    exec(in_python, {})
    assert capsys.readouterr().out.startswith(predicted)


def test_python_of_the_page_about_own_models_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-model.md").read_text("utf-8"), re.S):
        exec(block, names)
    assert names["loss"] < 0.5 * np.log(4)  # the head learns the number of tokens
    for head in ("restored", "same_head"):
        logits, _ = names[head](names["tokens"], where=names["mask"])
        np.testing.assert_allclose(logits, names["logits"], atol=1e-4)


def test_python_of_the_page_about_data_runs(fashion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "fashion-mnist").symlink_to(fashion)
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text("utf-8"), re.S)
    names: dict = {}
    exec(block, names)
    shapes = [f"'{name}': {array.dtype} {list(array.shape)}" for name, array in names["batch"].items()]
    assert f"# {{{', '.join(shapes)}}}" in block


PAGES_WITH_PYTHON = {
    page.relative_to(ROOT / "docs").as_posix()
    for page in (ROOT / "docs").rglob("*.md")
    if "```python" in page.read_text("utf-8")
}
PAGES_WITH_THEIR_OWN_TEST = {"data.md", "export.md", "own-model.md", "predict.md", "training.md"}


@pytest.mark.parametrize("page", sorted(PAGES_WITH_PYTHON - PAGES_WITH_THEIR_OWN_TEST))
def test_python_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text("utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(block, {})


def test_python_about_a_trained_network_runs(trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(trained_run)
    names: dict = {"gmsop_jax": gmsop_jax, "from_linen": from_linen}
    for page in ("README.md", "docs/own-model.md"):
        [block] = re.findall(r"```py\n(.*?)```", (ROOT / page).read_text("utf-8"), re.S)
        exec(block, names)
    model, variables, images = names["model"], names["variables"], np.zeros((1, 28, 28, 3), np.float32)
    of_backbone = {name: collection["backbone"] for name, collection in variables.items()}
    logits, _ = model.apply(variables, images)
    np.testing.assert_allclose(
        names["head"](model.backbone.apply(of_backbone, images))[0], logits, rtol=1e-4, atol=1e-5
    )


def test_the_picture_of_the_method(trained_run, tmp_path, monkeypatch, capsys):
    def draw(*arguments) -> object:
        monkeypatch.setattr(sys, "argv", ["draw_method.py", str(trained_run), *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(ROOT / "tools" / "draw_method.py"), run_name="__main__")
        return exit_.value.code

    assert draw("--image", 1, "--output", tmp_path / "a.svg") == 0
    assert draw("--image", 1, "--output", tmp_path / "b.svg") == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert draw("--image", 1000, "--output", tmp_path / "c.svg") == 2
    assert "--image 1000 is outside 0…199" in capsys.readouterr().err


@pytest.mark.parametrize("coefficients", ["newton_schulz", "minimax"])
def test_the_picture_shows_what_the_network_does(coefficients, trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    stored["model"]["coefficients"] = coefficients
    (run / "config.json").write_text(json.dumps(stored))
    steps = runpy.run_path(str(ROOT / "tools" / "draw_method.py"))["follow"](run, 0)
    weights = steps.weights[steps.selected]
    np.testing.assert_allclose(np.tensordot(weights, steps.roots, 1), steps.fused, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", summary.all_configurations(), ids=lambda path: pathlib.Path(path).name)
def test_published_figures_are_those_of_the_configurations(path):
    published = find_published(config.load(path))
    file, argument = config.split_argument(path)
    docstring = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    if published is None:
        assert argument or "Published" not in docstring
    else:
        errors = [error for error in (published.top1_error, published.top5_error) if error is not None]
        for error in errors:
            assert f"{error:.1f}" in docstring or f"{error:.2f}" in docstring
