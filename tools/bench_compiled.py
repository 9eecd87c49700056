"""Memory and kernels of training steps on an NVIDIA H100, for `benchmark.py compiled`; no GPU is needed.

XLA compiles for the description of a GPU below, with the options of `gmsop train`. On a real GPU, it would use the
first setting of each kernel that compiles; here it uses its default settings. Both read and write the same arrays.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from bench_accelerator import step_config
from bench_step import make_batch, make_step
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from gmsop_jax.errors import UserError
from gmsop_jax.training.parallel import OPTIONS

BYTES_PER_SECOND = 3.35e12  # of the memory of an H100 SXM, by its data sheet
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 85899345920
  memory_bandwidth: 3352000000000
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 9 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100"
"""
# What `auto` and the default precision are on an H100; the process that compiles has only a CPU.
_DEFAULTS = {"model.dispatch": "group", "model.pool_precision": "BF16_BF16_F32_X6"}
_BFLOAT16 = {"compute_dtype": "bfloat16"}
# configuration and changes to it; the batch is that of the configuration
_STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("imagenet64_gap", {}),
    ("imagenet64_srsop", {}),
    ("imagenet64_gmgap", {}),
    ("imagenet64_gmsop", {}),
    ("imagenet64_gmsop", _BFLOAT16),
    ("imagenet64_gmsop", {"model.num_candidates": 128}),
    ("imagenet64_gmsop", {"model.dispatch": "gather"}),
    ("imagenet64_wrn_gmgap", {}),
    ("imagenet64_wrn_gmsop", {}),
    ("imagenet64_wrn_gmsop", _BFLOAT16),
)

_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}  # move no data
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.-]+) = (.*?) ([a-z][a-z-]*)\((.*?)\)(?:,|$)")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The kernels of a program.

    Attributes:
      kernels: their number.
      num_bytes: the sizes of their operands and results. An operand that a kernel reads in part counts as a whole.
    """

    kernels: int
    num_bytes: int


def compiled_rows() -> list[dict[str, Any]]:
    """Compiles training steps for an H100, and returns their memory and traffic.

    Raises:
      UserError: if JAX's plugin for CUDA is not installed.
    """
    return [_compile_step(*step) for step in _STEPS]


def compile_for_h100(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles a function for an H100. It may overwrite its first argument, as training steps do.

    Args:
      function: the function.
      *arguments: trees of arrays or shapes.

    Raises:
      UserError: if JAX's plugin for CUDA is not installed.
    """
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin's check of the driver needs a device
    try:
        topology = topologies.get_topology_desc(platform="cuda", topology="1x1x1", target_config=_H100)
    except NotImplementedError as error:
        raise UserError(
            "compiling for an H100 needs JAX's plugin for CUDA, but no GPU; install it with: pip install -e '.[cuda12]'"
        ) from error
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("device",)), PartitionSpec())
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), arguments)
    return jax.jit(function, donate_argnums=0).lower(*shapes).compile(OPTIONS["gpu"])


def traffic(program: str) -> Traffic:
    """Counts the kernels of a compiled program and what they read and write.

    The kernels inside loops are not counted, so this says little about programs such as those of `dispatch=loop`.
    """
    sizes: dict[str, int] = {}
    kernels = total = 0
    for line in program[program.index("\nENTRY ") :].splitlines():
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        name, result, operation, operands = found.groups()
        sizes[name] = _num_bytes(result)
        if operation not in _FREE:
            kernels += 1
            total += sizes[name] + sum(sizes[operand] for operand in set(re.findall(r"%([\w.-]+)", operands)))
    return Traffic(kernels, total)


def _compile_step(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    config = step_config(name, {**_DEFAULTS, **changes}, toy=False)
    batch = config.train.batch_size
    step, init = make_step(config)
    compiled = compile_for_h100(step, jax.eval_shape(init), make_batch(config, batch))
    memory, moved = compiled.memory_analysis(), traffic(compiled.as_text())
    return {
        "step": ", ".join([f"`{name}`", *(f"`{field}={value}`" for field, value in changes.items())]),
        "images": batch,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "kernels": moved.kernels,
        "traffic_gb": moved.num_bytes / 1e9,
        "ms_at_full_bandwidth": moved.num_bytes / BYTES_PER_SECOND * 1e3,
    }


def _num_bytes(shape: str) -> int:
    """The size of an array, or of a tuple of arrays, such as `(f32[8,128]{1,0}, s32[])`."""
    return sum(
        math.prod(map(int, filter(None, sides.split(",")))) * int(bits or 8) // 8
        for bits, sides in _ARRAY.findall(shape)
    )


def compiled_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in Markdown."""
    lines = [
        "| step | images | state, GB | temporary memory, GB | kernels | GB read and written | ms at full bandwidth |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['step']} | {row['images']} | {row['state_gb']:.2f} | {row['temporary_gb']:.2f} |"
            f" {row['kernels']} | {row['traffic_gb']:.1f} | {row['ms_at_full_bandwidth']:.1f} |"
        )
    return "\n".join(lines)
