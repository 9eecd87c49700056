import csv
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batches import eval_batches
from PIL import Image

import gmsop_jax
from gmsop_jax import main
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.sources import UnreadableImage
from gmsop_jax.errors import DataError
from gmsop_jax.inference.predict import Prediction, Predictor, Unreadable, list_files, read_image
from gmsop_jax.inference.predict_output import FeatureFile
from gmsop_jax.training.step import normalize


def _gradient(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * y // height, 255 * x // width, 0 * x + 90], -1).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """One file of each kind, and one that is not an image."""
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    picture = _gradient(40, 50)
    picture.save(images / "rgb.png")
    picture.convert("L").save(images / "gray.jpg")
    picture.convert("P").save(images / "palette.gif")
    picture.convert("RGBA").save(images / "sub" / "alpha.png")
    picture.convert("CMYK").save(images / "sub" / "print.tif")
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(images / "deep.png")
    _gradient(400, 300).save(images / "large.webp")
    _gradient(1, 1).save(images / "dot.bmp")
    (images / "broken.png").write_bytes((images / "rgb.png").read_bytes()[:100])
    (images / "notes.md").write_text("not an image")
    return images


def test_every_kind_of_file_is_read(trained_run, folder):
    results = list(Predictor(trained_run).predict([folder], batch_size=3))
    names = [result.file.removeprefix(f"{folder}/") for result in results]
    assert names == sorted(names)
    assert len(names) == 9
    unreadable = [result for result in results if isinstance(result, Unreadable)]
    assert [result.file for result in unreadable] == [str(folder / "broken.png")]
    for result in results:
        if isinstance(result, Prediction):
            assert result.probabilities.sum() == pytest.approx(1, abs=1e-5)
            assert result.gate_weights.sum() == pytest.approx(1, abs=1e-5)
            assert np.count_nonzero(result.gate_weights) == 2
            assert result.features.shape == (15,)


def test_a_prediction_equals_the_networks_output(trained_run, folder):
    model, variables, info = gmsop_jax.load(trained_run)
    image = read_image(folder / "rgb.png", info.inputs.image_size)
    logits, aux = jax.jit(model.apply)(variables, normalize(jnp.asarray(image[None]), info.inputs.mean_rgb))
    [result] = Predictor(trained_run).predict([folder / "rgb.png"])
    assert isinstance(result, Prediction)
    np.testing.assert_allclose(
        np.log(result.probabilities / result.probabilities[0]), logits[0] - logits[0, 0], atol=1e-4
    )
    np.testing.assert_allclose(result.features, aux["features"][0], rtol=1e-4, atol=1e-4)


def test_predictions_average_over_the_mirror_image_if_evaluation_does(trained_run, folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    config = json.loads((run / "config.json").read_text())
    config["eval"]["flip_average"] = True
    (run / "config.json").write_text(json.dumps(config))
    mirrored = tmp_path / "mirrored.png"
    Image.open(folder / "rgb.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    [one, other] = Predictor(run).predict([folder / "rgb.png", mirrored])
    assert isinstance(one, Prediction)
    assert isinstance(other, Prediction)
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-5)
    single = [vars(result)["features"] for result in Predictor(trained_run).predict([folder / "rgb.png", mirrored])]
    np.testing.assert_allclose(one.features, np.mean(single, axis=0), rtol=1e-4, atol=1e-6)


def test_predictions_use_the_same_centre_as_evaluation(trained_run, folder, tmp_path):
    shutil.copytree(trained_run, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["data"]["image_size"], config["eval"]["resize"] = 28, 40
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    _, _, info = gmsop_jax.load(tmp_path / "run")
    # the data set for the evaluation contains the unchanged file
    for split in ("train", "val"):
        (tmp_path / "files" / split / "class").mkdir(parents=True)
        shutil.copy(folder / "large.webp", tmp_path / "files" / split / "class")
    convert("image-folder", tmp_path / "files", tmp_path / "set", workers=1, progress=False)
    batch = next(eval_batches(tmp_path / "set", "val", batch_size=1, image_size=28, resize=info.config.eval.resize))
    predictor = Predictor(tmp_path / "run")
    outputs = predictor.outputs(batch["image"])
    [result] = predictor.predict([folder / "large.webp"])
    [other] = Predictor(trained_run).predict([folder / "large.webp"])
    assert isinstance(result, Prediction)
    assert isinstance(other, Prediction)
    np.testing.assert_array_equal(result.features, outputs["features"][0])
    assert (result.features != other.features).any()


def test_the_batch_size_does_not_change_predictions(trained_run, folder):
    predictor = Predictor(trained_run)
    one, three = (list(predictor.predict([folder], batch_size=size)) for size in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert a.file == b.file
        if isinstance(a, Prediction) and isinstance(b, Prediction):
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)


def test_read_image_crops_the_centre(tmp_path):
    tall = np.zeros((300, 100, 3), np.uint8)
    tall[100:200] = 200
    Image.fromarray(tall).save(tmp_path / "tall.png")
    assert (read_image(tmp_path / "tall.png", (8, 8)) == 200).all()


def test_read_image_rotates_by_exif(tmp_path):
    halves = Image.fromarray(np.repeat(np.array([[[0] * 3, [255] * 3]], np.uint8), 8, 0).repeat(4, 1))  # dark left
    exif = halves.getexif()
    exif[0x0112] = 6  # rotate by 90° clockwise, so that the left side becomes the top
    halves.save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png", (8, 8))
    assert upright[0].max() == 0
    assert upright[-1].min() == 255


def test_read_image_composes_transparency_over_white(tmp_path):
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", (4, 4)) == 255).all()


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImage, match="No such file"):
        read_image(tmp_path / "none.png", (8, 8))


def test_lists_and_folders_are_expanded(folder, tmp_path):
    (tmp_path / "list.txt").write_text(f"{folder / 'rgb.png'}\n\n  {folder / 'none.png'}\n")
    assert list_files([tmp_path / "list.txt"]) == [str(folder / "rgb.png"), str(folder / "none.png")]
    assert str(folder / "sub" / "print.tif") in list_files([folder])
    assert str(folder / "notes.md") not in list_files([folder])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images in"):
        list_files([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"the list .*none\.txt can't be read"):
        list_files([tmp_path / "none.txt"])


def test_the_example_of_the_docstring_runs(trained_run, folder, capsys):
    example = textwrap.dedent(str(Predictor.__doc__).split("```")[1])
    for name, path in (("runs/quickstart", trained_run), ("shoe.jpg", folder / "rgb.png"), ("more_images/", folder)):
        assert name in example
        example = example.replace(name, str(path))
    exec(example, {"Predictor": Predictor})
    assert str(folder / "rgb.png") in capsys.readouterr().out


def test_predict_does_not_wait_for_a_fifo_or_socket(trained_run, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "list.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
        names = list_files([tmp_path])
        assert [os.path.basename(name) for name in names] == ["gone.png", "pipe.png", "socket.png"]
        for name in (*names[1:], "/dev/zero", tmp_path):
            with pytest.raises(UnreadableImage, match="not a regular file"):
                read_image(name, (8, 8))
        results = list(Predictor(trained_run).predict([tmp_path]))
    reasons = [result.reason for result in results if isinstance(result, Unreadable)]
    assert reasons == ["No such file or directory", "not a regular file", "not a regular file"]
    with pytest.raises(DataError, match=r"the list .*list\.txt can't be read \(not a regular file"):
        list_files([tmp_path / "list.txt"])


def test_predict_follows_links_without_loops_and_ignores_hidden_files(folder):
    expected = list_files([folder])
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / ".git").mkdir()
    for name in (".git/x.png", "._rgb.png"):
        shutil.copy(folder / "rgb.png", folder / name)
    assert list_files([folder]) == expected
    (folder.parent / "linked").mkdir()
    (folder.parent / "linked" / "images").symlink_to(folder)
    assert len(list_files([folder.parent / "linked"])) == len(expected)


def _main(trained_run, capsys, *arguments):
    status = main.main(["--mode", "predict", "--checkpoint", str(trained_run), *map(str, arguments)])
    return status, *capsys.readouterr()


def test_json_and_features(trained_run, folder, tmp_path, capsys):
    file = tmp_path / "out.npz"
    status, out, err = _main(
        trained_run, capsys, "--input", folder, "--top", 2, "--format", "json", "--features", file,
        "--config.eval.batch_size=4",
    )  # fmt: skip
    assert status == 1
    assert f"unreadable: {folder / 'broken.png'}: " in err
    results = json.loads(out)
    assert "error" in results[0]
    readable = [result for result in results if "error" not in result]
    first, second = readable[0]["classes"]
    assert first["probability"] >= second["probability"]
    with np.load(file) as saved:
        assert list(saved["files"]) == [result["file"] for result in readable]
        assert saved["features"].shape == (8, 15)
        np.testing.assert_allclose(saved["gate_weights"], [r["gate_weights"] for r in readable], atol=1e-6)
        assert list(saved["labels"]) == [r["classes"][0]["label"] for r in readable]
        [alone] = Predictor(trained_run).predict([readable[3]["file"]])
        assert isinstance(alone, Prediction)
        np.testing.assert_allclose(saved["features"][3], alone.features, rtol=1e-4, atol=1e-4)


def test_csv_has_a_row_for_each_file(trained_run, folder, capsys):
    status, out, _ = _main(trained_run, capsys, "--input", folder, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 1
    assert len(rows) == 9
    assert rows[0]["error"]
    assert set(rows[1]) >= {"class_1", "probability_5", "gate_0", "gate_3"}
    assert float(rows[1]["probability_1"]) >= float(rows[1]["probability_2"])


def test_table(trained_run, folder, capsys):
    status, out, err = _main(trained_run, capsys, "--input", folder / "rgb.png", "--top", 3)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert len(lines) == 4
    assert lines[1].startswith(str(folder / "rgb.png"))
    assert lines[1].count(" × ") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "empty"], "error: there are no images in"),
        (["--input", "x.png", "--top", "0"], "error: --top must be at least 1"),
        (["--input", "x.png", "--features", "x.npy"], "must end in .npz"),
        (["--input", "x.png", "--features", "/nowhere/x.npz"], "can't be written to /nowhere/x.npz (No such file"),
    ],
)
def test_mistakes_are_reported_in_one_line(trained_run, tmp_path, monkeypatch, capsys, arguments, message):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    status, out, err = _main(trained_run, capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_predict_needs_input(trained_run, capsys):
    status, _, errors = _main(trained_run, capsys)
    assert status == 2
    assert "--mode predict needs --input" in errors


def test_features_are_kept_on_disk(tmp_path):
    """Five thousand rows, 40 MB, are never in memory at once; NumPy writes them in blocks of 16 MB."""
    row = np.zeros(2000, np.float32)
    tracemalloc.start()
    with FeatureFile(tmp_path / "f.npz") as file:
        for i in range(5_000):
            file.add(Prediction("x", np.full(2, 0.5), np.ones(1, np.float32), row + i))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
    with np.load(tmp_path / "f.npz") as saved:
        assert saved["features"].shape == (5_000, 2000)
        assert (saved["features"][4_999] == 4_999).all()


def test_names_that_are_not_utf_8_are_escaped(trained_run, folder, capsys):
    name = os.fsdecode(os.fsencode(folder) + b"/\xff.png")
    shutil.copy(folder / "rgb.png", name)
    for output_format in ("table", "json", "csv"):
        status, out, _ = _main(trained_run, capsys, "--input", name, "--format", output_format)
        assert status == 0
        assert r"\udcff.png" in out


@pytest.fixture(params=["closed pipe", "no stdout"])
def unread_stdout(request, monkeypatch):
    """Standard output that nobody reads."""
    if request.param == "no stdout":
        monkeypatch.setattr(sys, "stdout", None)
        yield
        return
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        yield


def test_features_are_saved_if_nobody_reads_the_output(trained_run, folder, tmp_path, capsys, unread_stdout):
    options = ["--features", tmp_path / "f.npz", "--config.eval.batch_size=1"]
    status, _, err = _main(trained_run, capsys, "--input", folder, *options)
    assert status == 1
    assert "Traceback" not in err
    with np.load(tmp_path / "f.npz") as saved:
        assert len(saved["files"]) == 8


def test_closing_the_pipe_is_not_an_error(trained_run, folder):
    command = ["-m", "gmsop_jax.main", "--mode", "predict", "--checkpoint", trained_run, "--input", folder]
    head = ["bash", "-c", '"$@" | head -n 1', "", sys.executable, *command]
    done = subprocess.run(head, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("file")
    assert "Traceback" not in done.stderr
