import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import eval_batches

import gmsop_jax
from gmsop_jax.config import from_json
from gmsop_jax.errors import CheckpointError, DataError
from gmsop_jax.files import write_checksums, write_json
from gmsop_jax.inference.evaluate import evaluate_checkpoint
from gmsop_jax.training.inputs import Inputs
from gmsop_jax.training.step import normalize


def test_load_gives_the_network_that_was_evaluated(trained_run):
    config = from_json((trained_run / "config.json").read_text())
    model, variables, info = gmsop_jax.load(trained_run)
    apply = jax.jit(model.apply)
    wrong = count = 0
    for batch in eval_batches(config.data.dir, "val", batch_size=50):
        logits, aux = apply(variables, normalize(jnp.asarray(batch["image"]), info.inputs.mean_rgb))
        wrong += int(np.sum(np.asarray(logits.argmax(-1) != batch["label"])[batch["mask"]]))
        count += int(batch["mask"].sum())
        assert aux["gate_weights"].shape == (50, info.num_candidates)
    assert info.metrics is not None
    assert 100 * wrong / count == pytest.approx(info.metrics["top1_error"])


def test_load_needs_no_data_set(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["dir"] = "/nowhere"
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    _, variables, info = gmsop_jax.load(tmp_path / "run")
    assert info.inputs.classes[0] == "t-shirt/top"
    assert info.inputs.image_size == (28, 28)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(variables))


def test_load_of_one_step(trained_run):
    first = min(int(p.name) for p in (trained_run / "checkpoints").iterdir() if p.name.isdigit())
    assert gmsop_jax.load(trained_run / "checkpoints" / str(first))[2].step == first


def test_load_of_the_last_step_even_if_another_one_is_better(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "run")
    first, last = sorted(
        (path for path in (run / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: int(p.name)
    )
    file = first / "metrics" / "metrics"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"top1_error": 0.0}))
    write_checksums(first)
    assert gmsop_jax.load(run)[2].step == int(last.name)


def test_load_agrees_with_evaluation(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = from_json((trained_run / "config.json").read_text())
    result = evaluate_checkpoint(config, tmp_path / "run")
    assert gmsop_jax.load(tmp_path / "run")[2].metrics == {
        name: value for name, value in result.items() if name not in ("step", "num_classes")
    }
    assert sum(result["candidate_use"]) == pytest.approx(1)


def test_evaluation_warns_of_images_unlike_those_of_training(trained_run, tmp_path, capsys):
    run = shutil.copytree(trained_run, tmp_path / "run")
    config, inputs = from_json((run / "config.json").read_text()), Inputs.load(run)

    def warnings(**changed) -> list[str]:
        write_json(run / "inputs.json", dataclasses.asdict(dataclasses.replace(inputs, **changed)))
        evaluate_checkpoint(config, run)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    assert warnings(classes=("robe", *inputs.classes[1:-1], "boot"), image_size=(32, 30)) == [
        "warning: class 0 of the data set is 't-shirt/top', but class 0 of the network is 'robe';"
        " 2 of 10 classes differ",
        "warning: the images have 28×28 pixels, but those that the network was trained on have 32×30",
    ]
    assert warnings(classes=tuple(map(str, range(10))), image_size=(64, 64), splits={}) == []  # imported, without names
    with pytest.raises(DataError, match=r"has 3 classes, but the data set .* has 10; give a data set with the same"):
        warnings(classes=inputs.classes[:3])


@pytest.mark.parametrize(
    "text", ["", "{}", '{"dataset": "d", "classes": ["a"], "mean_rgb": [1], "image_size": [1, 1]}']
)
def test_damaged_inputs_are_reported(trained_run, tmp_path, text):
    shutil.copytree(trained_run, tmp_path / "run")
    (tmp_path / "run" / "inputs.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"inputs\.json (is damaged|can't be read)"):
        gmsop_jax.load(tmp_path / "run")


def test_inputs_of_another_run_are_refused(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    inputs = Inputs.load(trained_run)
    changed = dataclasses.replace(inputs, classes=inputs.classes[:3])
    write_json(tmp_path / "run" / "inputs.json", dataclasses.asdict(changed))
    with pytest.raises(CheckpointError, match="10 classes, but inputs"):
        gmsop_jax.load(tmp_path / "run")


def test_a_missing_checkpoint_is_reported(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        gmsop_jax.load(tmp_path)
