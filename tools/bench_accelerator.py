"""Parts of `benchmark.py accelerator`: correctness, speed and memory on an accelerator, row by row.

Each part runs in a process of its own, so that no other part uses the device's memory. Every row is written as soon as
it is measured. If a row fails, or even crashes its process, the other rows are still measured. A later call measures
only what is missing.
"""

# pyright: reportMissingImports=false
import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import bench_data
import jax
import jax.numpy as jnp
import numpy as np
from bench_ops import POSITIONS, WIDTH, pooling_flops, selected_case
from bench_roots import METHODS, case_name, root_case
from bench_step import JaxStep, step_flops, torch_step
from bench_timing import Case, Program, normal, torch_device, with_gradient

from gmsop_jax import config as configs
from gmsop_jax import ops
from gmsop_jax.config import ConfigDict
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.prepare import prepare_data
from gmsop_jax.errors import UserError
from gmsop_jax.files import write_json
from gmsop_jax.interop.matconvnet import from_params
from gmsop_jax.models import create_model
from gmsop_jax.ops.dispatch import Dispatch
from gmsop_jax.training.devices import use_compilation_cache
from gmsop_jax.training.loop import train_and_evaluate
from gmsop_jax.training.parallel import create_mesh
from gmsop_jax.training.setup import prepare

Row = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Row]]]  # the name of a row, and the function that measures it

ROOT = pathlib.Path(__file__).resolve().parents[1]
GOLDENS = ROOT / "tests" / "goldens"
SECONDS = 480  # time limit for one call

_PRECISIONS = ("highest", "BF16_BF16_F32_X6", "BF16_BF16_F32_X3", "TF32_TF32_F32_X3", "TF32_TF32_F32")
_DISPATCHES: tuple[Dispatch, ...] = ("gather", "group", "loop")
_BFLOAT16 = {"compute_dtype": "bfloat16"}
# name of a step → (configuration, batch, overrides); the PyTorch peer computes the first one. `compiler_options`
# replaces the options of `gmsop train`; {} allows kernels that are not deterministic, which XLA selects by timing.
_STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ResNet-18 GM-SOP": ("imagenet64_gmsop", 256, {}),
    "ResNet-18 GM-SOP, bfloat16": ("imagenet64_gmsop", 256, _BFLOAT16),
    "ResNet-18 GM-SOP, N = 128": ("imagenet64_gmsop", 256, {"model.num_candidates": 128}),
    "ResNet-18 GM-SOP, pooling in highest precision": ("imagenet64_gmsop", 256, {"model.pool_precision": "highest"}),
    "ResNet-18 GM-SOP, pooling in three passes": (
        "imagenet64_gmsop",
        256,
        {"model.pool_precision": "BF16_BF16_F32_X3"},
    ),
    "ResNet-18 GM-SOP, everything in highest precision": (
        "imagenet64_gmsop",
        256,
        {"model.pool_precision": "highest", "default_matmul_precision": "highest"},
    ),
    "ResNet-18 GM-SOP, kernels selected by timing": ("imagenet64_gmsop", 256, {"compiler_options": {}}),
    "ResNet-18 GM-SOP, gather": ("imagenet64_gmsop", 256, {"model.dispatch": "gather"}),
    "ResNet-18 GM-SOP, group": ("imagenet64_gmsop", 256, {"model.dispatch": "group"}),
    "ResNet-18 GM-SOP, loop": ("imagenet64_gmsop", 256, {"model.dispatch": "loop"}),
    "ResNet-18 GM-SOP, batch 150": ("imagenet64_gmsop", 150, {}),
    "WRN-36-2 GM-SOP": ("imagenet64_wrn_gmsop", 256, {}),
    "WRN-36-2 GM-SOP, batch 150, bfloat16": ("imagenet64_wrn_gmsop", 150, _BFLOAT16),
    "ResNet-18 GM-GAP": ("imagenet64_gmgap", 256, {}),
    "ResNet-18 SR-SOP": ("imagenet64_srsop", 256, {}),
    "ResNet-18 SR-SOP, bfloat16": ("imagenet64_srsop", 256, _BFLOAT16),
    "WRN-36-2 GM-GAP": ("imagenet64_wrn_gmgap", 256, {}),
}
_TOY_MODEL = {
    "blocks_per_stage": 1,
    "stage_widths": (8, 12),
    "stage_strides": (2, 2),
    "gate_widths": (6,),
    "candidate_widths": (5,),
    "num_candidates": 4,
    "num_selected": 2,
}


# ---- running the parts


def measure_all(
    out: pathlib.Path, *, toy: bool, isolated: bool = True, seconds: float = SECONDS
) -> dict[str, dict[str, Row]]:
    """Measures the rows that `out` does not contain yet, and writes each into it.

    Args:
      out: the JSON file with the rows of each part. A row that failed has the field `error`, and is measured again.
      toy: whether to use tiny sizes.
      isolated: whether to run each part in a new process.
      seconds: time after which no further row is measured.

    Returns: the contents of `out`.

    Raises:
      UserError: if `out` contains measurements of another device, or of other versions of the libraries.
    """
    results: dict[str, dict[str, Row]] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    deadline, previous = time.monotonic() + seconds, results.pop("device", {})
    for part in PARTS:
        rows = results[part] = {name: row for name, row in results.get(part, {}).items() if "error" not in row}
        for name, row in (_run_in_process if isolated else _run_here)(part, toy, set(rows), deadline):
            rows[name] = row
            print(f"{part}: {name}: {_show_row(row)}", flush=True)
            if part == "device" and row != previous.get(name, row):
                raise UserError(f"{out} contains measurements of another device or other versions; give another --out")
            write_json(out, results)
    return results


def run_part(part: str, toy: bool, done: set[str], deadline: float) -> Iterator[tuple[str, Row | None]]:
    """Yields each missing row of a part twice: without its values when it starts, and then with them."""
    for name, measure in PARTS[part](toy):
        if name in done:
            continue
        if time.monotonic() > deadline:
            return
        yield name, None
        try:
            yield name, measure()
        except Exception as error:  # the other rows are still measured, and the table shows the error
            yield name, {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}


def _run_here(part: str, toy: bool, done: set[str], deadline: float) -> Iterator[tuple[str, Row]]:
    for name, row in run_part(part, toy, done, deadline):
        if row is not None:
            yield name, row


def _run_in_process(part: str, toy: bool, done: set[str], deadline: float) -> Iterator[tuple[str, Row]]:
    """Runs a part in a new process; if a row crashes it, the remaining rows run in another process."""
    skipped, environment = set(done), {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    while (left := deadline - time.monotonic()) > 0:
        command = [sys.executable, __file__, json.dumps([part, toy, sorted(skipped), left])]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        timer = threading.Timer(left, process.kill)
        timer.start()
        started = "(start of the process)"
        try:
            for line in process.stdout or ():
                if line.startswith(_MARK):
                    started, row = json.loads(line.removeprefix(_MARK))
                    if row is not None:
                        skipped.add(started)
                        yield started, row
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.communicate()  # closes the pipe
        if status == 0 or time.monotonic() > deadline:
            return
        yield started, {"error": f"the process ended with status {status}"}
        if started in skipped or started.startswith("("):
            return
        skipped.add(started)


_MARK = "benchmark row: "


def _serve(arguments: str) -> None:
    """Runs a part in this process, and prints its rows."""
    part, toy, done, seconds = json.loads(arguments)
    use_compilation_cache()
    for item in run_part(part, toy, set(done), time.monotonic() + seconds):
        print(_MARK + json.dumps(item), flush=True)


# ---- tables


def table(results: dict[str, dict[str, Row]]) -> str:
    """All rows as Markdown, with a table for each part."""
    device = results.get("device", {}).get("device", {})
    lines = [", ".join(f"{name} {value}" for name, value in device.items()), ""]
    everything = {name: row for rows in results.values() for name, row in rows.items()}
    products = [row for row in results.get("ceilings", {}).values() if "gflop" in row]
    fastest = max((row["gflop"] / row["ms"] for row in products), default=0)
    for part, rows in results.items():
        if part == "device" or not rows:
            continue
        rows = {name: _with_ratios(row, everything, fastest) for name, row in rows.items()}
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        lines += [f"| {part} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
        lines += [f"| {name} | " + " | ".join(_show(row.get(c)) for c in columns) + " |" for name, row in rows.items()]
        lines.append("")
    return "\n".join(lines)


def _with_ratios(row: Row, everything: dict[str, Row], fastest: float) -> Row:
    """Adds the share of the fastest matrix product, and the speed-up over PyTorch."""
    row = dict(row)
    peer = everything.get(row.pop("peer", ""), {})
    if fastest and row.get("gflop") and "ms" in row:
        row["share of the fastest product"] = f"{row['gflop'] / row['ms'] / fastest:.0%}"
    if "ms" in row and "ms" in peer:
        row["times faster than PyTorch"] = peer["ms"] / row["ms"]
    return row


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return "–".join(map(_show, value))
    return "" if value is None else str(value).replace("|", "/")


def _show_row(row: Row) -> str:
    return ", ".join(f"{key} {_show(value)}" for key, value in row.items() if key != "peer")


# ---- the parts


def _device(toy: bool) -> Rows:
    def versions() -> Row:
        names = ("jax", "jaxlib", "torch")
        installed = {name: importlib.metadata.version(name) for name in names if _is_installed(name)}
        devices = jax.devices()
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
        row = {"device": f"{len(devices)} × {devices[0].device_kind}", "Python": platform.python_version(), **installed}
        return {**row, "memory": f"{memory / 2**30:.0f} GiB"} if memory else row

    yield "device", versions


def _is_installed(package: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(package))
    return False


def _ceilings(toy: bool) -> Rows:
    """The peak performance of the device: large products, batches of small ones, and a copy."""
    side, batch, numbers = (128, 8, 1 << 16) if toy else (8192, 4096, 1 << 28)
    for name, dtype, precision in (
        ("float32, highest precision", jnp.float32, "highest"),
        ("float32, default precision", jnp.float32, None),
        ("bfloat16", jnp.bfloat16, None),
    ):
        for size, shape in ((f"{side}²", (side, side)), (f"{batch} × {WIDTH}²", (batch, WIDTH, WIDTH))):
            yield (
                f"product {size}, {name}",
                lambda shape=shape, dtype=dtype, precision=precision: _time_product(shape, dtype, precision),
            )
    yield "copy", lambda: _time(Program(jnp.negative, jnp.ones(numbers)), mb=8 * numbers / 1e6)


def _time_product(shape: tuple[int, ...], dtype: Any, precision: Any) -> Row:
    x = normal(*shape).astype(dtype)
    flops = 2 * x.size * shape[-1]
    return _time(Program(lambda a, b: jnp.matmul(a, b, precision=precision), x, x), gflop=flops / 1e9)


def _layers(toy: bool) -> Rows:
    """Pooling and its gradient against values that the authors' code computed in float64."""
    for path in sorted(GOLDENS.glob("layers/cov_*.npz"))[: 1 if toy else None]:
        yield path.stem, lambda path=path: _compare_pooling(path)


def _compare_pooling(path: pathlib.Path) -> Row:
    values, errors = _load(path), []
    x = jnp.asarray(values["x"])
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    for n in sorted(int(key[2]) for key in values if key.startswith("ns") and key.endswith("_out_f64")):
        y, pullback = jax.vjp(lambda x, n=n: ops.second_order_pool(x, n), x)
        (dx,) = pullback(jnp.asarray(_row_order(values["dvec"]), jnp.float32))
        errors.append((_error(y, _row_order(values[f"ns{n}_out_f64"])), _error(dx, values[f"ns{n}_dx_f64"])))
    error, error_of_gradient = np.max(errors, axis=0)
    return {"relative error": float(error), "of the gradient": float(error_of_gradient)}


def _networks(toy: bool) -> Rows:
    """Whole networks against values that the authors' code computed in float64."""
    for path in sorted(GOLDENS.glob("nets/*.npz"))[: 1 if toy else None]:
        yield path.stem, lambda path=path: _compare_network(path)


def _compare_network(path: pathlib.Path) -> Row:
    values = _load(path)
    params = {name.removeprefix("param/"): value for name, value in values.items() if name.startswith("param/")}
    config, variables = from_params(params, num_selected=int(values["test/mask"][0].sum()))
    images = jnp.asarray(values["test/x_uint8"].astype(np.float32) - values["rgb_mean"])
    logits, aux = jax.jit(create_model(config).apply)(variables, images)
    return {
        "relative error of the logits": _error(logits, values["test/logits_f64"]),
        "of the gate's weights": _error(aux["gate_weights"], values["test/gate_weights_f64"]),
        "same selection": bool(np.array_equal(np.asarray(aux["gate_weights"]) > 0, values["test/mask"])),
    }


def _load(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as stored:
        return dict(stored)


def _row_order(vector: np.ndarray) -> np.ndarray:
    """Reorders upper triangles from MATLAB's order, column by column, to row by row."""
    d = int((8 * vector.shape[-1] + 1) ** 0.5) // 2
    columns, rows = np.tril_indices(d)
    matrix = np.zeros((*vector.shape[:-1], d, d), vector.dtype)
    matrix[..., rows, columns] = vector
    return matrix[..., *np.triu_indices(d)]


def _error(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value; `expected` may be only a sample of the values."""
    actual, expected = np.asarray(actual, np.float64).ravel(), np.asarray(expected, np.float64).ravel()
    if actual.size != expected.size:
        actual = actual[(np.arange(expected.size) * 2654435761 + 12345) % actual.size]  # see tests/goldens/README.md
    return float(np.abs(actual - expected).max() / (np.abs(expected).max() or 1))


def _gradients(toy: bool) -> Rows:
    """Gradients against their definitions."""

    def straight_through() -> Row:
        logits, cotangent = normal(64, 16), normal(65, 16)[1:]
        ours = jax.vjp(lambda h: ops.top_k_gate(h, 8)[0], logits)[1](cotangent)[0]
        return {"relative error": _error(ours, jax.vjp(jax.nn.softmax, logits)[1](cotangent)[0])}

    def dispatches() -> Row:
        results = []
        for dispatch in _DISPATCHES:
            case: Any = selected_case(2 if toy else 16, 16, 8, dispatch)
            results.append(jax.tree.leaves(case.run()))
        first, *others = results
        return {"relative error": max(_error(*pair) for other in others for pair in zip(other, first, strict=True))}

    yield "straight-through gate against the dense softmax", straight_through
    yield "dispatches against each other, values and gradients", dispatches


def _repeatability(toy: bool) -> Rows:
    """Three steps in this process, twice, and on a mesh of all devices."""
    config, batch = step_config("imagenet64_gmsop", {}, toy), 4 if toy else 64

    @functools.cache
    def after_three_steps(run: str) -> np.ndarray:
        step = JaxStep(config, batch, create_mesh() if run == "on all devices" else None)
        for _ in range(3):
            step()
        return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(step.state.params)])

    def twice() -> Row:
        first, second = after_three_steps("first"), after_three_steps("second")
        checksum = hashlib.sha256(first.tobytes()).hexdigest()[:16]
        return {"identical bits": bool(np.array_equal(first, second)), "checksum of the parameters": checksum}

    def sharded() -> Row:
        error = _error(after_three_steps("on all devices"), after_three_steps("first"))
        return {"devices": jax.device_count(), "relative error": error}

    yield "two runs", twice
    yield "all devices against one", sharded


def _pooling(toy: bool) -> Rows:
    """Pooling, forward and backward, with each precision of its products."""
    precisions = ("highest",) if jax.default_backend() == "cpu" else _PRECISIONS
    for precision in (None, *precisions):
        name = f"pooling, {precision or 'default'} precision"
        yield name, lambda precision=precision: _time_pooling(precision, 2 if toy else 2048)
    yield "pooling, kernels selected by timing", lambda: _time_pooling(None, 2 if toy else 2048, {})


def _time_pooling(precision: str | None, batch: int, options: dict[str, Any] | None = None) -> Row:
    pool = functools.partial(ops.second_order_pool, precision=precision)
    x, cotangent = normal(batch, POSITIONS, WIDTH), normal(batch, WIDTH * (WIDTH + 1) // 2)
    program, gflop = (
        Program(with_gradient(pool), (x,), cotangent, options=options),
        batch * pooling_flops(POSITIONS, WIDTH) / 1e9,
    )
    row = _time(program, gflop=gflop, peer="pooling, PyTorch, highest precision")
    few = np.asarray(x[:2]), np.asarray(cotangent[:2])
    found = with_gradient(pool)((x[:2],), cotangent[:2])
    with jax.enable_x64(True):
        x, cotangent = (jnp.asarray(array, jnp.float64) for array in few)
        expected = jax.device_get(with_gradient(ops.second_order_pool)((x,), cotangent))
    row["relative error"], row["of the gradient"] = jax.tree.leaves(jax.tree.map(_error, found, expected))
    return row


def _roots(toy: bool) -> Rows:
    """Square roots against other libraries."""
    for width in (16,) if toy else (64, 128, 256):
        for method in METHODS:
            for gradient in (False, True) if width <= method.widest_gradient else (False,):
                name = case_name(method.name, width, gradient=gradient)
                arguments = method, width, 2 if toy else 256
                yield name, lambda args=arguments, gradient=gradient: _time_case(root_case(*args, gradient=gradient))


def _mixture(toy: bool) -> Rows:
    """The 8 selected candidates of N, forward and backward, with each dispatch."""
    for n in (4, 8) if toy else (16, 128):
        for dispatch in _DISPATCHES:
            case = functools.partial(selected_case, 1 if toy else 256, n, 2 if toy else 8, dispatch)
            yield f"mixture, N = {n}, {dispatch}", lambda case=case: _time_case(case())


def _steps(toy: bool) -> Rows:
    """Training steps on one batch."""
    steps = list(_STEPS.items())[: 1 if toy else None]
    for name, (config_name, batch, overrides) in steps:
        yield f"step, {name}", lambda args=(config_name, batch, overrides): _time_step(*args, toy=toy)


def _time_step(config_name: str, batch: int, overrides: dict[str, Any], *, toy: bool) -> Row:
    batch, others = 4 if toy else batch, dict(overrides)
    precision, options = others.pop("default_matmul_precision", None), others.pop("compiler_options", None)
    with jax.default_matmul_precision(precision):
        step = JaxStep(step_config(config_name, others, toy), batch, options=options)
        row = _time(step, peak_mb=step.program.peak_mb)
    row["images/s"] = batch / row["ms"] * 1e3
    if config_name == "imagenet64_gmsop" and not toy:
        peer = "bfloat16" if overrides == _BFLOAT16 else f"{precision or 'default'} precision"
        row |= {"gflop": batch * step_flops() / 1e9, "peer": f"step, PyTorch, {peer}" if batch == 256 else ""}
    return row


def step_config(name: str, overrides: dict[str, Any], toy: bool) -> ConfigDict:
    """A shipped configuration with 1,000 classes and other values of some fields; `toy` shrinks images and network."""
    config = configs.load(name)
    config.model.num_classes = 1000
    for field, value in overrides.items():
        section, _, key = field.rpartition(".")
        (config[section] if section else config)[key] = value
    if toy:
        config.data.image_size, config.model.num_classes = 16, 10
        config.model.update(_TOY_MODEL)
    return config


def _torch(toy: bool) -> Rows:
    """The same pooling and the same step in PyTorch, eager and compiled, channels-last."""
    if not _is_installed("torch"):
        yield "PyTorch", lambda: importlib.import_module("torch").__dict__  # raises an error that the table shows
        return
    import torch

    device, compiler = torch_device(), "aot_eager" if toy else "inductor"

    def set_precision(precision: str) -> None:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = precision != "highest"
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def finish(row: Row) -> Row:
        return {**row, "peak_mb": torch.cuda.max_memory_allocated() / 1e6} if device == "cuda" else row

    def pool(precision: str, backend: str) -> Row:
        import torch_peer

        set_precision(precision)
        batch = 2 if toy else 2048
        x = torch.randn(batch, POSITIONS, WIDTH, device=device, requires_grad=True)
        cotangent = torch.randn(batch, WIDTH * (WIDTH + 1) // 2, device=device)
        function = torch_peer.second_order_pool
        function = torch.compile(function, backend=backend) if backend else function

        def run() -> None:
            torch.autograd.grad(function(x), x, cotangent)
            torch_peer.synchronize(device)

        return finish(_time(run, gflop=batch * pooling_flops(POSITIONS, WIDTH) / 1e9))

    def step(precision: str, backend: str, dtype: Any = None) -> Row:
        set_precision(precision)
        batch = 2 if toy else 256
        with torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            row = _time(torch_step(batch, backend))
        return finish({**row, "images/s": batch / row["ms"] * 1e3, "gflop": batch * step_flops() / 1e9})

    for backend in ("", compiler):
        kind = f", torch.compile ({backend})" if backend else ""
        for label, precision in (("highest", "highest"), ("default", "high")):
            yield f"pooling, PyTorch{kind}, {label} precision", lambda p=precision, b=backend: pool(p, b)
            yield f"step, PyTorch{kind}, {label} precision", lambda p=precision, b=backend: step(p, b)
        yield f"step, PyTorch{kind}, bfloat16", lambda b=backend: step("high", b, torch.bfloat16)


def _training(toy: bool) -> Rows:
    """Whole runs, with their input pipeline."""

    def quickstart() -> Row:
        config = configs.load("quickstart")
        if toy:
            config.model.update(_TOY_MODEL)
            config.train.update(num_epochs=1, learning_rates=((0.05, 1),), batch_size=500)
        with tempfile.TemporaryDirectory() as folder:
            config.data.dir = f"{folder}/data"
            prepare_data(config.data)
            result = train_and_evaluate(config, f"{folder}/run")
        return {"top-1 error in percent": result["last_top1_error"], "seconds": result["wall_seconds"]}

    def full_width() -> Row:
        config = step_config("imagenet64_gmsop", {}, toy)
        config.train.batch_size, config.model.num_classes = 4 if toy else 256, 0  # the classes of the data
        with tempfile.TemporaryDirectory() as folder:
            bench_data.make(pathlib.Path(folder, "source"), 20 if toy else 20_000)
            config.data.update(dir=f"{folder}/data", image_size=0)
            convert("imagenet64", pathlib.Path(folder, "source"), pathlib.Path(config.data.dir), progress=False)
            run = prepare(config, pathlib.Path(folder, "run"))
            batches: Any = run.batches(0)
            state = run.initial_state()
            batch = next(batches)
            state, _ = jax.block_until_ready(run.train_step(state, batch))
            steps = 2 if toy else 60
            seconds = []
            for source in (iter(lambda: batch, None), batches):  # one batch repeated, and the pipeline
                started = time.perf_counter()
                for _ in range(steps):
                    state, _ = run.train_step(state, next(source))
                jax.block_until_ready(state)
                seconds.append(time.perf_counter() - started)
            batches.close()
        per_second = [steps * config.train.batch_size / time for time in seconds]
        return {
            "images/s": per_second[1],
            "images/s of one batch repeated": per_second[0],
            "share of the time spent waiting for data": f"{max(0.0, 1 - seconds[0] / seconds[1]):.0%}",
        }

    yield "quickstart", quickstart
    yield "ResNet-18 GM-SOP with its input pipeline", full_width


PARTS: dict[str, Callable[[bool], Rows]] = {
    "device": _device,
    "ceilings": _ceilings,
    "layers": _layers,
    "networks": _networks,
    "gradients": _gradients,
    "repeatability": _repeatability,
    "pooling": _pooling,
    "steps": _steps,
    "PyTorch": _torch,
    "training": _training,
    "mixture": _mixture,
    "roots": _roots,
    "repeatability, another process": _repeatability,
}


# ---- timing


def _time_case(case: Case, **fields: Any) -> Row:
    return _time(case.run, gflop=case.flops / 1e9, **fields)


def _time(run: Callable[[], Any], **fields: Any) -> Row:
    """The median and quartiles of as many calls as fit into 2 seconds (3 to 20), after two warm-up calls."""
    run()
    run()
    times: list[float] = []
    while len(times) < 20 and (len(times) < 3 or sum(times) < 2):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    quartiles = (np.percentile(times, (25, 75)) * 1e3).tolist()
    row = {"ms": float(np.median(times)) * 1e3, "quartiles_ms": quartiles, **fields}
    if isinstance(run, Program):
        row["peak_mb"] = run.peak_mb
    return row


if __name__ == "__main__":
    _serve(sys.argv[1])
