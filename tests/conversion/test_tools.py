import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def tool(name: str, *arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / name, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_convert_inspect_verify(tmp_path: Path):
    converted = tool("convert.py", "fashion-mnist", "--output", "set", "--limit", "200", folder=tmp_path)
    assert (converted.returncode, converted.stderr) == (0, "")
    assert "train: 200 images in 1 shard\n" in converted.stdout
    inspected = tool("inspect_dataset.py", "set", folder=tmp_path)
    assert (inspected.returncode, inspected.stderr) == (0, "")
    assert "ankle boot" in inspected.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["set"]  # nothing in the current folder
    with Image.open(tmp_path / "set/contact_sheet.png") as sheet:
        assert sheet.size == (110 + 10 * 64, 10 * 64)
        # names at the left are dark on white, pictures of clothes at the right mostly dark
        pixels = np.asarray(sheet.convert("L"))
        assert pixels[:, :110].mean() > 200 > pixels[:, 110:].mean() > 20
    verified = tool("verify_dataset.py", "set", folder=tmp_path)
    assert (verified.returncode, verified.stderr) == (0, "")
    assert ", verified" in verified.stdout
    again = tool("convert.py", "fashion-mnist", "--output", "set", "--limit", "200", folder=tmp_path)
    assert (again.returncode, again.stderr) == (0, "")  # the sheet is no foreign file
    named = tool("inspect_dataset.py", "set", "--sheet", "other.png", folder=tmp_path)
    assert "contact sheet: other.png" in named.stdout
    assert (tmp_path / "other.png").exists()


def test_parts_and_merge(tmp_path: Path):
    for part in ("0/2", "1/2"):
        arguments = ("fashion-mnist", "--output", "set", "--shards", "3", "--shard-range", part)
        assert f"part {part} is done" in tool("convert.py", *arguments, folder=tmp_path).stdout
    merged = tool("merge_manifests.py", "set", folder=tmp_path)
    assert (merged.returncode, merged.stderr) == (0, "")
    assert "train: 5,000 images in 3 shards" in merged.stdout


@pytest.mark.slow
def test_bench_data(tmp_path: Path):
    made = tool("bench_data.py", "make", "in", "--images", "100", folder=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    converted = tool("bench_data.py", "convert", "in", "out", "--workers", "1", folder=tmp_path)
    assert "1 workers: 110 images" in converted.stdout
    assert "png: " in tool("bench_data.py", "codecs", "out", "--count", "50", folder=tmp_path).stdout
    read = tool(
        "bench_data.py", "read", "out", "--batch-size", "8", "--rounds", "1", "--seconds", "0.1", folder=tmp_path
    )
    assert "memory copy of a batch" in read.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convert.py", ("imagenet64", "--output", "set"), "error: this source needs --input"),
        ("convert.py", ("fashion-mnist", "--output", "set", "--size", "8"), "does not accept --size"),
        ("convert.py", ("fashion-mnist", "--output", "set", "--shard-range", "x"), "'x' is not i/n"),
        ("inspect_dataset.py", ("none",), "the folder does not exist"),
        ("verify_dataset.py", (".",), "the folder is empty"),
        ("merge_manifests.py", (".",), "no unfinished conversion"),
        ("bench_data.py", ("convert", "in"), "convert takes two folders"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, name: str, arguments: tuple[str, ...], message: str):
    result = tool(name, *arguments, folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
