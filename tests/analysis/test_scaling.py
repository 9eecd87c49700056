import re
import runpy
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gmsop_jax import config as configs
from gmsop_jax.analysis import scaling
from gmsop_jax.analysis.scaling import Counts, Machine, planned_bytes
from gmsop_jax.config.fields import model_defaults
from gmsop_jax.models import create_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")


def published_mib() -> list[float]:
    """The memory per image in the first table."""
    return [float(number) for number in re.findall(r"^\| \w+.*\| ([\d.]+) MiB \|.*\|$", PAGE, re.M)]


def test_the_documented_tables_are_the_counted_ones(monkeypatch, capsys):
    """What XLA plans is taken from the page, because compiling takes long."""
    planned = [mib * 2**20 for mib in published_mib()]
    assert len(planned) == 5
    monkeypatch.setattr(scaling, "planned_bytes", lambda model, side: planned.pop(0))
    monkeypatch.setattr(sys, "argv", ["scaling.py"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "scaling.py"), run_name="__main__")
    assert capsys.readouterr().out in PAGE


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_documented_memory_is_the_planned_one():
    model = configs.load("imagenet64_gap").model
    model.num_classes = 1000
    assert planned_bytes(model, 64) / 2**20 == pytest.approx(published_mib()[0], rel=0.1)


@pytest.mark.usefixtures("optimized")
def test_planned_memory_of_a_small_network():
    """The slope does not depend on the batch, and is less than automatic differentiation would store."""
    model = model_defaults()
    model.update(head="srsop", num_classes=8, blocks_per_stage=1, stage_widths=(8, 16), stage_strides=(1, 2))
    model.update(stem_width=8, gate_widths=(4,))
    planned = planned_bytes(model, 16)
    assert planned_bytes(model, 16, rows=16) == pytest.approx(planned, rel=0.1)
    network = create_model(model)

    def residuals(rows):
        images = jnp.zeros((rows, 16, 16, 3))
        variables = jax.eval_shape(network.init, jax.random.key(0), images)

        def pullback(variables):
            def logits(params):
                variables_ = {**variables, "params": params}
                return network.apply(variables_, images, train=True, mutable=["batch_stats"])[0][0]

            return jax.vjp(logits, variables["params"])[1]

        return sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pullback, variables)))

    bound = residuals(2) - residuals(1)
    assert 0.3 * bound < planned < bound


COUNTS = Counts(parameters=1000, channels=10, batch_norms=2, num_candidates=4, flops=1e6)


def test_bytes_by_hand():
    assert COUNTS.bytes_reduced() == 4 * (1000 + 70 + 8 + 5)
    assert COUNTS.bytes_of_state == 4 * (3000 + 20)


def test_efficiency_by_hand():
    machine = Machine(flops=1e9, bandwidth=1e6, latency=1e-4)
    assert machine.efficiency(COUNTS, 1, 8) == 1
    # 8 ms of work; 2 · 3/4 · 4332 B at 1 MB/s; 12 reductions of 2 rounds of 0.1 ms
    assert machine.efficiency(COUNTS, 4, 8) == pytest.approx(8 / (8 + 6.498 + 2.4))
