import dataclasses
import functools
import json
import logging
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import gmsop_jax
from gmsop_jax import models
from gmsop_jax.config import ConfigDict, load, model_defaults
from gmsop_jax.errors import CheckpointError, ConfigError
from gmsop_jax.inference import evaluate, export
from gmsop_jax.inference.model_card import command
from gmsop_jax.inference.predict import make_predict_step
from gmsop_jax.main import main
from gmsop_jax.models import create_model
from gmsop_jax.models.network import HEADS
from gmsop_jax.nnx import from_linen
from gmsop_jax.training.parallel import create_mesh, replicated
from gmsop_jax.training.transfer import read_source

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
    step = make_predict_step(model, mean_rgb=(1.0, 2.0, 3.0), flip_average=False)
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
    assert [file.name for file in safetensors.files] == ["model.safetensors", "config.json", "README.md"]


def test_an_exported_folder_opens_as_a_run_does(trained_run, safetensors, tmp_path, capsys):
    folder = shutil.copytree(safetensors.files[0].parent, tmp_path / "hub")
    _, variables, info = gmsop_jax.load(trained_run)
    _, copied, about = gmsop_jax.load(folder)
    assert jax.tree.structure(copied) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, copied, variables)
    assert (about.step, about.metrics, about.inputs) == (info.step, info.metrics, info.inputs)
    assert about.config.model.to_dict() == info.config.model.to_dict()
    Image.fromarray(np.zeros((28, 28, 3), np.uint8)).save(tmp_path / "black.png")
    assert main(["predict", "--checkpoint", str(folder), "--input", str(tmp_path / "black.png"), "--top", "1"]) == 0
    predicted = capsys.readouterr().out
    assert (
        main(["predict", "--checkpoint", str(trained_run), "--input", str(tmp_path / "black.png"), "--top", "1"]) == 0
    )
    assert predicted == capsys.readouterr().out
    assert main(["evaluate", "--checkpoint", str(folder), f"--config.data.dir={info.config.data.dir}"]) == 0
    assert info.metrics is not None
    assert f"top-1 error {info.metrics['top1_error']:.2f} %" in capsys.readouterr().out
    source = read_source(str(folder), info.config.model.pixel_scale, replicated(create_mesh()))
    np.testing.assert_array_equal(
        source.variables["params"]["head"]["classifier"]["kernel"],
        variables["params"]["head"]["classifier"]["kernel"],
    )


def _configuration(command: str) -> ConfigDict:
    _, _, _, name, *flags = shlex.split(command.replace("\\\n", ""))
    return load(name, [flag.removeprefix("--config.") for flag in flags])


def test_the_model_card_names_data_recipe_result_command_and_licence(trained_run, safetensors, tmp_path, monkeypatch):
    _, _, info = gmsop_jax.load(trained_run)
    card = safetensors.files[2].read_text()
    assert card.startswith("---\nlicense: unknown\nlibrary_name: gmsop_jax\n")
    assert info.metrics is not None
    for text in ("fashion-mnist", "10 classes (t-shirt/top,", "28×28", f"{info.metrics['top1_error']:.2f} %"):
        assert text in card
    assert str(trained_run.parent) not in card + safetensors.files[1].read_text()  # no names of the user's folders
    again = _configuration(re.findall(r"```sh\n(gmsop train .*?)```", card, re.S)[0])
    again.data.dir, again.model.num_classes = info.config.data.dir, info.config.model.num_classes
    assert again.to_dict() == info.config.to_dict()


def test_the_command_of_a_network_of_own_images_does_not_ask_for_the_embedded_ones(trained_run):
    _, _, info = gmsop_jax.load(trained_run)
    info.config.data.auto_convert = True
    assert _configuration(command(info)).data.auto_convert
    own = dataclasses.replace(info, inputs=dataclasses.replace(info.inputs, dataset="image-folder"))
    data = _configuration(command(own)).data
    assert (data.source, data.auto_convert) == ("image-folder", False)


def test_a_repository_is_downloaded_by_its_name(trained_run, safetensors, tmp_path, monkeypatch, capsys):
    asked = []
    folder, data_dir = safetensors.files[0].parent, gmsop_jax.load(trained_run)[2].config.data.dir
    before = sorted(file.name for file in folder.iterdir())

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "owner/absent":
            raise OSError("404 Client Error\nlong explanation")
        return str(safetensors.files[0].parent)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"no folder owner/network; .* pip install 'gmsop-jax\[hub\]'"):
        gmsop_jax.load("owner/network")
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert gmsop_jax.load("owner/network")[2].inputs.classes[0] == "t-shirt/top"
    config = gmsop_jax.load("owner/network")[2].config
    config.data.dir = str(data_dir)
    evaluate.run(config, "owner/network")  # writes nothing into the cache of downloads
    printed = capsys.readouterr()
    assert "top-1 error" in printed.out
    assert "owner/network is a network on the Hugging Face Hub, so the result is not written to a file" in printed.err
    assert main(["export", "owner/network", "--format", "safetensors"]) == 2
    assert "--output is needed, because owner/network is a network on the Hugging Face Hub" in capsys.readouterr().err
    assert sorted(file.name for file in folder.iterdir()) == before
    with pytest.raises(CheckpointError, match=r"no folder owner/absent, and no such .*OSError: 404 Client Error\)$"):
        gmsop_jax.load("owner/absent")
    (tmp_path / "runs").mkdir()  # the folder `runs` exists, so this is a mistyped path
    with pytest.raises(CheckpointError, match="no checkpoint at runs/quikstart"):
        gmsop_jax.load("runs/quikstart")
    assert asked == [(name, ["model.safetensors", "config.json"]) for name in ("owner/network", "owner/absent")]


def test_an_exported_folder_is_not_taken_for_a_run(safetensors, capsys):
    folder = str(safetensors.files[0].parent)
    assert main(["report", folder]) == 2
    assert "belongs to an exported network; give the working directory of a training run" in capsys.readouterr().err


def test_the_working_directory_of_a_run_is_not_overwritten(trained_run):
    before = (trained_run / "config.json").read_bytes()
    with pytest.raises(export.ExportError, match="is the working directory of a run"):
        export.export_safetensors(trained_run, trained_run)
    assert (trained_run / "config.json").read_bytes() == before


def test_exports_of_earlier_versions_open(safetensors, tmp_path):
    folder = shutil.copytree(safetensors.files[0].parent, tmp_path / "old")
    description = json.loads((folder / "config.json").read_text())
    description["model"] = description.pop("config")["model"]
    (folder / "config.json").unlink()
    (folder / "model.json").write_text(json.dumps(description))
    assert set(export.load_safetensors(folder)[1]) == {"params", "batch_stats"}


def test_the_documented_code_loads_safetensors(safetensors):
    code = _blocks("export.md")[1].replace("runs/quickstart/export/safetensors", str(safetensors.files[0].parent))
    names: dict = {}
    exec(code, names)
    assert set(names["variables"]) == {"params", "batch_stats"}


def test_the_compute_dtype_is_kept(safetensors, tmp_path):
    folder = shutil.copytree(safetensors.files[0].parent, tmp_path / "copy")
    description = json.loads((folder / "config.json").read_text())
    description["config"]["compute_dtype"] = description["config"]["model"]["compute_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(description))
    assert export.load_safetensors(folder)[0].backbone.dtype == "bfloat16"


def test_mismatched_files_are_refused(safetensors, tmp_path):
    folder = shutil.copytree(safetensors.files[0].parent, tmp_path / "copy")
    arrays = load_file(folder / "model.safetensors")
    arrays.pop("params.head.classifier.bias")
    save_file(arrays, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="different arrays"):
        export.load_safetensors(folder)
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read"):
        export.load_safetensors(folder)
    shutil.copy(safetensors.files[0], folder)
    description = json.loads((folder / "config.json").read_text())
    broken = [description | item for item in ({"step": "x"}, {"metrics": 3}, {"config": 3}, {"config": {"seed": "x"}})]
    for text in ("", "[]", "{}", *map(json.dumps, broken)):
        (folder / "config.json").write_text(text)
        with pytest.raises((CheckpointError, ConfigError), match=r"config\.json|stored configuration"):
            export.load_safetensors(folder)


@pytest.mark.filterwarnings("default")  # those of jax2onnx
def test_onnx_agrees_with_the_original(trained_run, tmp_path):
    pytest.importorskip("jax2onnx")
    exported = export.export_onnx(trained_run, tmp_path)
    assert [file.name for file in exported.files] == ["model.onnx", "model.json"]
    assert set(exported.differences) == set(export.OUTPUTS)
    assert max(exported.differences.values()) < 1e-4


BANK: dict[str, Any] = {"num_candidates": 4, "candidate_widths": (5, 3)}
GATED: dict[str, Any] = {**BANK, "num_selected": 2, "gate_widths": (4,), "gate_init": "random"}
ONNX_HEADS: dict[str, Any] = {
    "gap": models.GAPHead(5, (4,), True),
    "sop": models.CovarianceHead(5),
    "srsop": models.SecondOrderHead(5),
    "dropcov": models.DropCovHead(5, (4,), True),
    "sot": models.CrossCovarianceHead(5, num_heads=2, head_width=4),
    "avesop": models.MixtureHead(5, **BANK),
    "concatgap": models.MixtureHead(5, **BANK, order=1, combine="concatenate"),
    "gmgap": models.GatedMixtureHead(5, **GATED, order=1, dispatch="gather"),
    "gmsop": models.GatedMixtureHead(5, **GATED, dispatch="gather"),
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("with_nnx", [False, True], ids=["linen", "nnx"])
@pytest.mark.parametrize("name", ONNX_HEADS)
def test_onnx_of_a_head_takes_any_batch(name, with_nnx):
    to_onnx = pytest.importorskip("jax2onnx").to_onnx
    head, x = ONNX_HEADS[name], np.random.default_rng(0).normal(size=(3, 4, 4, 6)).astype(np.float32)
    variables = head.init(jax.random.key(0), x)
    expected = head.apply(variables, x)[0]
    function = from_linen(head, variables) if with_nnx else functools.partial(head.apply, variables)
    proto = to_onnx(lambda x: function(x)[0], [("b", 4, 4, 6)], input_names=["x"])
    session = pytest.importorskip("onnxruntime").InferenceSession(proto.SerializeToString())
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("package", ["ops", "models", "nnx"])
def test_no_code_reads_shapes_by_jax(package):
    """jax2onnx replaces these functions by operations, whose results are traced."""
    for file in (ROOT / "gmsop_jax" / package).glob("*.py"):
        assert not re.findall(r"jnp\.(?:shape|ndim|size)\(", file.read_text("utf-8")), file


def test_onnx_is_compared_in_its_runtime(trained_run, tmp_path, monkeypatch):
    """With stand-ins for jax2onnx, which only stores the function, and for ONNX Runtime, which calls it."""
    stored, logger = [], logging.getLogger("onnx_ir")
    level = logger.level

    def to_onnx(function, inputs, input_names, output_names):
        assert logger.level == logging.ERROR
        assert str(inputs[0].shape) == "(b, 28, 28, 3)"
        assert (input_names, output_names) == (["images"], list(export.OUTPUTS))
        stored.append(jax.jit(function))
        return types.SimpleNamespace(SerializeToString=lambda: b"onnx")

    class InferenceSession:
        error = 0.0

        def __init__(self, file, options, providers):
            assert options.log_severity_level == 3
            assert pathlib.Path(file).read_bytes() == b"onnx"

        def run(self, names, inputs):
            return [np.asarray(output) + self.error for output in stored[-1](inputs["images"])]

    runtime = types.SimpleNamespace(InferenceSession=InferenceSession, SessionOptions=types.SimpleNamespace)
    monkeypatch.setitem(sys.modules, "jax2onnx", types.SimpleNamespace(to_onnx=to_onnx))
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    assert max(export.export_onnx(trained_run, tmp_path).differences.values()) < 1e-4
    monkeypatch.setattr(InferenceSession, "error", 0.1)
    with pytest.raises(export.ExportError, match="differ by"):
        export.export_onnx(trained_run, tmp_path)

    def refuse(*args, **options):
        raise NotImplementedError("no such operation\nPlease see a page\n")

    monkeypatch.setattr(sys.modules["jax2onnx"], "to_onnx", refuse)
    with pytest.raises(export.ExportError, match=r"'gmsop' \(NotImplementedError: no such operation\); use --format"):
        export.export_onnx(trained_run, tmp_path)
    assert logger.level == level  # the converter is silenced only while it runs
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(export.ExportError, match="needs jax2onnx: pip install"):
        export.export_onnx(trained_run, tmp_path)


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
