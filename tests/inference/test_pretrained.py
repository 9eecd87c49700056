"""The networks in pretrained/."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import eval_batches

import gmsop_jax
from gmsop_jax.conversion.convert import convert
from gmsop_jax.inference.model_card import model_card
from gmsop_jax.models import count_parameters
from gmsop_jax.training.exported import describe
from gmsop_jax.training.step import normalize

PRETRAINED = pathlib.Path(__file__).parents[2] / "pretrained"
FOLDERS = sorted(path.parent for path in PRETRAINED.glob("*/config.json"))
FASHION, EMOJI = (sorted(PRETRAINED.glob(f"{data}_*")) for data in ("fashion_mnist", "emoji"))


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("data") / "fashion"
    convert("fashion-mnist", None, folder, progress=False)
    return folder


@pytest.mark.parametrize("folder", FASHION, ids=[folder.name for folder in FASHION])
def test_networks_for_fashion_mnist_classify(folder: pathlib.Path, fashion: pathlib.Path):
    model, variables, info = gmsop_jax.load(folder)
    apply = jax.jit(model.apply)
    wrong = count = 0
    for batch in eval_batches(fashion, "val", batch_size=250):
        logits, _ = apply(variables, normalize(jnp.asarray(batch["image"]), info.inputs.mean_rgb))
        wrong += int(np.sum(np.asarray(logits.argmax(-1) != batch["label"])[batch["mask"]]))
        count += int(batch["mask"].sum())
    assert 100 * wrong / count < 11  # 8.3 % on all test images; these are a sample of a thousand or fewer


@pytest.mark.parametrize("folder", EMOJI, ids=[folder.name for folder in EMOJI])
def test_networks_for_emoji_recognise_a_flag_and_a_smiley(folder: pathlib.Path):
    rows, columns = np.mgrid[:64, :64]
    flag = np.full((64, 64, 3), 255, np.uint8)
    flag[12:52, 2:22], flag[12:52, 42:62] = (0, 140, 69), (205, 33, 42)  # three vertical stripes; the middle is white
    smiley = np.full((64, 64, 3), 255, np.uint8)
    smiley[np.hypot(rows - 32, columns - 32) < 29] = (255, 204, 77)
    for column in (23, 41):
        smiley[np.hypot((rows - 25) / 1.4, columns - column) < 4] = (102, 69, 0)
    smiley[(np.abs(np.hypot(rows - 32, columns - 32) - 17) < 2) & (rows > 38)] = (102, 69, 0)
    model, variables, info = gmsop_jax.load(folder)
    logits, _ = model.apply(variables, normalize(jnp.asarray([flag, smiley]), info.inputs.mean_rgb))
    assert [info.inputs.classes[label] for label in logits.argmax(-1)] == ["Flags", "Smileys & Emotion"]


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_cards_and_descriptions_are_those_that_an_export_writes(folder: pathlib.Path):
    """After a change of the model card, export the networks again: `gmsop export FOLDER --format safetensors`."""
    _, variables, info = gmsop_jax.load(folder)
    card = model_card(
        info, count_parameters(variables["params"]), license_name="mit" if folder in FASHION else "cc-by-4.0"
    )
    assert (folder / "README.md").read_text("utf-8") == card
    description = json.dumps(describe(info.config, info.inputs, info.step, info.metrics))
    assert json.loads((folder / "config.json").read_text("utf-8")) == json.loads(description)


def test_networks_are_small_and_listed():
    assert FOLDERS
    listed = (PRETRAINED / "README.md").read_text()
    assert all(f"`{folder.name}`" in listed for folder in FOLDERS)
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*")) < 15e6
