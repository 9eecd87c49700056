import json
import runpy
import sys
from pathlib import Path

import bench_timing
import pytest
from bench_timing import Case

ROOT = Path(__file__).parents[1]


def test_share_and_speedup_by_hand(capsys):
    def case(name: str, seconds: float, flops: float, bytes_: float = 0, versus: str = "") -> Case:
        return Case(name, lambda: None, flops, bytes_, versus, [seconds])

    product, copy = case(f"{bench_timing.CEILING}product", 2, 8e9), case(f"{bench_timing.CEILING}copy", 1, 0, 1e6)
    rows = bench_timing.report([product, copy, case("ours", 1, 2e9, 1e5, "peer"), case("peer", 3, 2e9)])
    assert rows[2]["share_of_ceiling"] == 0.5  # 2 GFLOP at 4 GFLOP/s take 0.5 s of the second
    assert rows[2]["times_faster_than"] == {"peer": 3.0}
    assert rows[3]["times_faster_than"] == {}
    assert capsys.readouterr().out.splitlines()[3].endswith("50%  3.00× peer")


def test_each_case_runs_in_turn():
    order: list[str] = []
    cases = [Case(name, lambda name=name: order.append(name)) for name in ("a", "b")]
    bench_timing.measure(cases, 2)
    assert "".join(order) == "ababab"
    assert [len(case.seconds) for case in cases] == [2, 2]  # without the first round


def test_tool_at_toy_size(tmp_path, monkeypatch, capsys):
    arguments = ["ops", "--pool-batch", "1", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "benchmark.py"), run_name="__main__")
    rows = json.loads((tmp_path / "out.json").read_text())["ops"]
    assert [row["name"] for row in rows[3:]] == ["pooling 1 × (256 × 128)", "pooling 1 × (256 × 128), plain JAX"]
    assert all(row["ms"] > 0 for row in rows)
    assert "plain JAX" in capsys.readouterr().out
