import json
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gmsop_jax
from gmsop_jax.config import model_defaults
from gmsop_jax.errors import CheckpointError
from gmsop_jax.inference import export
from gmsop_jax.inference.predict import make_predict_step
from gmsop_jax.models import create_model
from gmsop_jax.models.network import HEADS

ROOT = pathlib.Path(__file__).parents[2]


def _blocks(file: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / file).read_text(), re.S)


@pytest.fixture(scope="module")
def stablehlo(trained_run, tmp_path_factory):
    return export.export_stablehlo(trained_run, tmp_path_factory.mktemp("export") / "stablehlo")


@pytest.fixture(scope="module")
def safetensors(trained_run, tmp_path_factory):
    return export.export_safetensors(trained_run, tmp_path_factory.mktemp("export") / "safetensors")


def test_stablehlo_agrees_with_the_original(stablehlo):
    assert set(stablehlo.differences) == {"logits", "probabilities", "gate_weights", "features"}
    assert max(stablehlo.differences.values()) < 1e-4
    artefact = jax.export.deserialize(bytearray(stablehlo.files[0].read_bytes()))
    assert artefact.platforms == ("cpu", "cuda", "tpu")
    assert artefact.call(np.zeros((7, 28, 28, 3), np.uint8))["gate_weights"].shape == (7, 4)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_exports_with_any_batch_size(head):
    m = model_defaults()
    m.update(head=head, num_classes=3, blocks_per_stage=1, stage_widths=(4,), stage_strides=(2,), stem_width=4)
    m.update(num_candidates=4, num_selected=2, candidate_widths=(5,), gate_widths=(4,), dispatch="gather")
    model = create_model(m)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    images = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 8, 8, 3), jnp.uint8)
    step = make_predict_step(model, mean_rgb=(1.0, 2.0, 3.0))
    artefact = jax.export.export(jax.jit(step), platforms=export.PLATFORMS)(variables, images)
    assert {str(x.shape[0]) for x in artefact.out_avals} == {"b"}


def test_stablehlo_runs_without_this_package(stablehlo):
    folder = stablehlo.files[0].parent
    code = _blocks("export.md")[0].replace("runs/quickstart/export/stablehlo", str(folder))
    blocked = f"import sys; sys.modules['gmsop_jax'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    assert done.stdout.split()[0] in json.loads((folder / "model.json").read_text())["classes"]


def test_safetensors_contain_the_same_numbers(trained_run, safetensors):
    _, variables, info = gmsop_jax.load(trained_run)
    assert set(safetensors.differences.values()) == {0.0}
    arrays = load_file(safetensors.files[0])
    kernel = variables["params"]["head"]["classifier"]["kernel"]
    np.testing.assert_array_equal(arrays["params.head.classifier.kernel"], kernel)
    assert len(arrays) == len(jax.tree.leaves(variables))
    description = json.loads(safetensors.files[1].read_text())
    assert description["classes"] == list(info.inputs.classes)
    assert description["shapes"]["params.head.classifier.kernel"] == list(kernel.shape)


def test_the_documented_code_loads_safetensors(safetensors):
    code = _blocks("export.md")[1].replace("runs/quickstart/export/safetensors", str(safetensors.files[0].parent))
    names: dict = {}
    exec(code, names)
    assert set(names["variables"]) == {"params", "batch_stats"}


def test_the_compute_dtype_is_kept(safetensors, tmp_path):
    folder = shutil.copytree(safetensors.files[0].parent, tmp_path / "copy")
    description = json.loads((folder / "model.json").read_text())
    description["model"]["compute_dtype"] = "bfloat16"
    (folder / "model.json").write_text(json.dumps(description))
    assert export.load_safetensors(folder)[0].backbone.dtype == "bfloat16"


def test_mismatched_files_are_refused(safetensors, tmp_path):
    folder = shutil.copytree(safetensors.files[0].parent, tmp_path / "copy")
    arrays = load_file(folder / "model.safetensors")
    arrays.pop("params.head.classifier.bias")
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="different arrays"):
        export.load_safetensors(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="no readable"):
        export.load_safetensors(folder)


def test_a_copy_that_differs_is_refused(trained_run, tmp_path, monkeypatch):
    model, variables, _ = gmsop_jax.load(trained_run)
    other = jax.tree.map(lambda leaf: leaf + 0.01, variables)
    monkeypatch.setattr(export, "load_safetensors", lambda folder: (model, other))
    with pytest.raises(export.ExportError, match="differ by"):
        export.export_safetensors(trained_run, tmp_path)


def _tool(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "tools" / "export.py"), run_name="__main__")
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_tool(trained_run, tmp_path, monkeypatch, capsys):
    assert _tool(monkeypatch, trained_run, "--format", "safetensors", "--output", tmp_path / "out") == 0
    assert "model.safetensors: " in (out := capsys.readouterr().out)
    assert "largest differences from the original on random images: " in out
    assert _tool(monkeypatch, tmp_path / "nothing", "--format", "stablehlo") == 2
    assert "error: there is no checkpoint at" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert _tool(monkeypatch, trained_run, "--format", "safetensors", "--output", tmp_path / "file") == 2
    assert "can't write to" in capsys.readouterr().err
