import functools
import json
import os
import runpy
import sys
import time
from pathlib import Path

import bench_accelerator
import bench_timing
import benchmark
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_compiled import Traffic, compile_for_h100, compiled_table, traffic
from bench_lowering import count, lower, lowering_rows, lowering_table
from bench_roots import METHODS, case_name, covariances, root_case, root_table
from bench_timing import Case, Worker

from gmsop_jax.errors import UserError

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


def test_processor_time_does_not_count_waiting():
    waiting = Case("waiting", lambda: time.sleep(0.2))
    bench_timing.measure([waiting], 1, time.process_time)
    assert waiting.median < 0.2


def test_a_worker_measures_in_its_own_process():
    worker = Worker(functools.partial, time.sleep, 0.2)
    assert worker() >= 0.2
    assert worker(time.process_time) < 0.2
    dying = Case("dying", Worker(functools.partial, os._exit, 1))
    with pytest.raises(EOFError):
        bench_timing.measure([dying], 1)


def test_tool_at_toy_size(tmp_path, monkeypatch, capsys):
    arguments = ["ops", "--pool-batch", "1", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "tools" / "benchmark.py"), run_name="__main__")
    rows = json.loads((tmp_path / "out.json").read_text())["ops"]
    assert [row["name"] for row in rows[3:]] == ["pooling 1 × (256 × 128)", "pooling 1 × (256 × 128), plain JAX"]
    assert all(row["ms"] > 0 for row in rows)
    assert "plain JAX" in capsys.readouterr().out


def test_the_table_of_roots():
    def row(method, gradient: bool, ms: float):
        name = case_name(method.name, 8, gradient=gradient)
        return {"name": name, "ms": ms, "quartiles_ms": [ms - 1, ms + 1]}

    ours, *_, eigh, _, sqrtm = METHODS
    rows = [row(ours, False, 2.0), row(ours, True, 4.0), row(eigh, False, 5.0), row(eigh, True, 6.0)]
    assert root_table([*rows, row(sqrtm, False, 30.0)]).splitlines() == [
        "| method | d = 8, root | with gradient |",
        "|---|---|---|",
        f"| {ours.name} | 2 (1–3), 1× | 4 (3–5), 1× |",
        f"| {eigh.name} | 5 (4–6), 2.5× | 6 (5–7), 1.5× |",
        f"| {sqrtm.name} | 30 (29–31), 15× | – |",
    ]


def test_tables_of_the_page_by_hand():
    def row(name: str, ratios: dict[str, float]):
        numbers = {"gflop": 5.1, "ms": 29.04, "quartiles_ms": [28.7, 30.0], "share_of_ceiling": 0.51}
        return {"name": name, **numbers, "times_faster_than": ratios}

    steps = {"rows": [row("copy", {}), row("step", {"peer": 1.5})], "peak_mb": {"jax": 458.3, "torch": 669.6}}
    reading = {"plain chain": [1000.0, 900.0, 1100.0], "pipeline": [21_000.0, 20_000.0, 22_000.0]}
    found = benchmark.sections({"ops": [row("copy", {})], "mixture": [], "step": steps, "pipeline": reading})
    assert found["speed"].splitlines()[2:] == [
        "| copy | 5.1 | 29 (28.7–30) | 51% |  |",
        "| step | 5.1 | 29 (28.7–30) | 51% | 1.50× peer |",
        "",
        "Peak memory of the step: jax 458 MB, torch 670 MB.",
    ]
    assert found["reading"].splitlines()[-1] == "| pipeline | 21,000 (20,000–22,000) | 21.0× |"
    assert benchmark.sections({"ops": []}) == {}


@pytest.mark.parametrize("name", ["speed", "roots", "reading", "lowering", "compiled", "accelerator"])
def test_the_page_has_every_section(tmp_path, name):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text("utf-8"), "utf-8")
    benchmark.write_section(page, name, "new text")
    assert page.read_text("utf-8").count("\n\nnew text\n\n<!-- end of") == 1


def test_roots_that_are_exact_equal_each_other():
    sigma = covariances(4, 2)
    exact = [method.root(sigma) for method in METHODS if method.name.startswith(("matrix_power", "jnp", "jax"))]
    assert len(exact) == 3
    for root in exact:
        np.testing.assert_allclose(root @ root, sigma, rtol=1e-4, atol=1e-5)
    value, (gradient,) = root_case(METHODS[0], 4, 2, gradient=True).run()
    assert value.shape == gradient.shape == (2, 4, 4)


def test_counts_of_the_program_for_a_gpu_by_hand():
    counts = count(lower("gather", 2, 3, 1))
    layers = 2 * 64 * (512 * 256 + 256 * 128)  # of one pair
    sums = 2 * 3 * (512 * 256 + 256 * 128)  # of the weights' gradients of one pair, by candidate
    assert counts["gflop"] == pytest.approx(2 * (3 * layers + sums) / 1e9)
    assert counts["copied_gb"] == pytest.approx(2 * 4 * (512 * 256 + 256 * 128) / 1e9)
    assert counts["scatters"] == 0


def test_scatters_of_numbers_are_counted():
    def program(dtype) -> str:
        return jax.jit(lambda x, i: x.at[i].add(1)).lower(jnp.zeros((8, 2), dtype), jnp.zeros(3, int)).as_text()

    assert count(program("float32"))["scatters"] == 1
    assert count(program("int32"))["scatters"] == 0


def test_documented_counts_of_the_program_for_a_gpu():
    """After a change of the dispatches run `python tools/benchmark.py lowering --docs docs/performance.md`."""
    assert lowering_table(lowering_rows()) in (ROOT / "docs" / "performance.md").read_text("utf-8")


def test_traffic_of_a_compiled_program_by_hand():
    program = jax.jit(jnp.matmul).lower(jnp.zeros((8, 4)), jnp.zeros((4, 2))).compile().as_text()
    assert program is not None
    assert traffic(program) == Traffic(kernels=1, num_bytes=4 * (32 + 8 + 16))


def test_traffic_counts_tuples_and_repeated_operands_once_and_small_types_by_their_size():
    program = """HloModule m

%fused (p: bf16[8]) -> bf16[8] {
  ROOT %n = bf16[8]{0} negate(%p)
}

ENTRY %main (a: bf16[8], b: pred[8]) -> bf16[8] {
  %a = bf16[8]{0} parameter(0)
  %b = pred[8]{0} parameter(1)
  %f = (bf16[8]{0}, s32[2,3]{1,0}) fusion(%a, %a, %b), kind=kLoop, calls=%fused
  %g = bf16[8]{0} get-tuple-element(%f), index=0
  ROOT %c = bf16[8]{0} copy(%g), metadata={op_name="x(y)"}
}
"""
    assert traffic(program) == Traffic(kernels=2, num_bytes=(16 + 24 + 16 + 8) + (16 + 16))


def test_compiling_for_a_gpu_without_its_plugin_says_what_to_install(monkeypatch):
    def no_plugin(**_):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", no_plugin)
    with pytest.raises(UserError, match=r"plugin for CUDA.*pip install -e '\.\[cuda12\]'"):
        compile_for_h100(jnp.sin, jnp.zeros(3))


def test_table_of_compiled_steps():
    numbers = {"images": 256, "state_gb": 0.086, "temporary_gb": 4.32, "kernels": 636}
    row = {"step": "`gmsop`", **numbers, "traffic_gb": 38.5, "ms_at_full_bandwidth": 11.49}
    assert compiled_table([row]).splitlines()[2] == "| `gmsop` | 256 | 0.09 | 4.32 | 636 | 38.5 | 11.5 |"


QUICK = ("device", "ceilings", "layers", "gradients")


@pytest.fixture
def quick_parts(monkeypatch):
    """Some parts, and a part whose rows fail until it is repaired."""
    broken = [True]

    def part(toy):
        def row():
            if broken[0]:
                raise RuntimeError("out of\nmemory")
            return {"ms": 2.0, "gflop": 1.0, "peer": "theirs"}

        yield "fails", row
        yield "theirs", lambda: {"ms": 3.0}

    parts = {name: bench_accelerator.PARTS[name] for name in QUICK}
    monkeypatch.setattr(bench_accelerator, "PARTS", {**parts, "broken": part})
    return broken


def test_accelerator_continues_and_repeats_what_failed(quick_parts, tmp_path, capsys):
    out = tmp_path / "out.json"
    first = bench_accelerator.measure_all(out, toy=True, isolated=False)
    assert first["broken"] == {"fails": {"error": "RuntimeError: out of memory"}, "theirs": {"ms": 3.0}}
    assert json.loads(out.read_text()) == first
    assert first["layers"]["cov_s_4x4_c4"]["relative error"] < 1e-5
    quick_parts[0] = False
    capsys.readouterr()
    second = bench_accelerator.measure_all(out, toy=True, isolated=False)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed] == ["device", "broken"]  # only what was missing
    assert second["ceilings"] == first["ceilings"]
    text = bench_accelerator.table(second)
    assert "| fails | 2 | 1 | " in text
    assert " | 1.5 |" in text  # times faster than PyTorch

    page = tmp_path / "page.md"
    page.write_text("a\n<!-- accelerator: tools/benchmark.py -->\nold\n<!-- end of accelerator -->\nb\n")
    benchmark.write_section(page, "accelerator", text)
    assert page.read_text().startswith("a\n<!-- accelerator: tools/benchmark.py -->\n\ndevice ")
    assert page.read_text().endswith("|\n\n<!-- end of accelerator -->\nb\n")
    assert "old" not in page.read_text()
    with pytest.raises(UserError, match=r"page\.md has no lines '<!-- roots: "):
        benchmark.write_section(page, "roots", text)


def test_accelerator_refuses_another_device_and_stops_in_time(quick_parts, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps({"device": {"device": {"device": "8 × TPU"}}}))
    with pytest.raises(UserError, match=r"out\.json contains measurements of another device"):
        bench_accelerator.measure_all(out, toy=True, isolated=False)
    assert not any(bench_accelerator.measure_all(tmp_path / "none", toy=True, isolated=False, seconds=-1).values())


def test_a_part_runs_in_a_process_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_accelerator, "PARTS", {"device": None})
    results = bench_accelerator.measure_all(tmp_path / "out.json", toy=True)
    assert "1 × cpu" in results["device"]["device"]["device"]


@pytest.mark.slow
def test_the_other_parts_run(monkeypatch, tmp_path):
    tested = (*QUICK, "training", "repeatability, another process")  # other tests train
    parts = {name: part for name, part in bench_accelerator.PARTS.items() if name not in tested}
    monkeypatch.setattr(bench_accelerator, "PARTS", parts)
    results = bench_accelerator.measure_all(tmp_path / "out.json", toy=True, isolated=False)
    assert all(results.values())
    errors = [row["error"] for rows in results.values() for row in rows.values() if "error" in row]
    assert not [error for error in errors if not error.startswith("ModuleNotFoundError")]
