import runpy
import sys
from pathlib import Path

import pytest

from gmsop_jax.analysis.scaling import Counts, Machine

ROOT = Path(__file__).parents[2]


def test_the_documented_tables_are_the_counted_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "scaling.py"), run_name="__main__")
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text()


COUNTS = Counts(parameters=1000, channels=10, batch_norms=2, num_candidates=4, activations=500, flops=1e6)


def test_bytes_by_hand():
    assert COUNTS.bytes_reduced() == 4 * (1000 + 70 + 8 + 5)
    assert COUNTS.bytes_per_device(2) == 4 * (3000 + 20 + 1000)


def test_efficiency_by_hand():
    machine = Machine(flops=1e9, bandwidth=1e6, latency=1e-4)
    assert machine.efficiency(COUNTS, 1, 8) == 1
    # 8 ms of work; 2 · 3/4 · 4332 B at 1 MB/s; 12 reductions of 2 rounds of 0.1 ms
    assert machine.efficiency(COUNTS, 4, 8) == pytest.approx(8 / (8 + 6.498 + 2.4))
