"""Counts the cost of a training step on many devices: parameters, bytes sent, memory, bound on efficiency.

python tools/scaling.py --docs docs/scaling.md
python tools/scaling.py --flops 2e14 --bandwidth 4.5e11 --latency 5e-6
"""

import sys
from pathlib import Path

from sections import write_section

from gmsop_jax import config as configs
from gmsop_jax.analysis.scaling import Machine, count, planned_bytes
from gmsop_jax.config import ConfigDict
from gmsop_jax.errors import ArgumentParser, run_command

DEVICES = tuple(2**i for i in range(11))
_NETWORKS = (("gap", "GAP"), ("srsop", "SR-SOP"), ("gmsop", "GM-SOP-16-8"), ("wrn_gmsop", "GM-SOP, WRN"))


def cases() -> dict[str, tuple[ConfigDict, int]]:
    """The networks of the tables: name → (model, side of an image)."""
    folder = Path(__file__).parents[1] / "configs"
    models = {
        f"ImageNet-64, {title}": (_model(folder / f"imagenet64_{name}.py", 1000), 64) for name, title in _NETWORKS
    }
    return {**models, "Places365, GM-SOP-16-8": (_model(folder / "imagenet64_gmsop.py", 365), 100)}


def _model(file: Path, num_classes: int) -> ConfigDict:
    model = configs.load(file).model
    model.num_classes = num_classes
    model.dispatch = "gather"  # the choice on accelerators for small batches
    return model


def tables(machine: Machine, planned: dict[str, float], per_device: int = 256, whole: int = 256) -> str:
    """The tables of docs/scaling.md, as Markdown.

    Args:
      machine: the speed of a device and of its connection.
      planned: temporary memory per image of each network, in MiB.
      per_device, whole: images on each device, and on all devices together.
    """
    lines = [
        "| network | parameters | bytes all-reduced | all-reduces, at most | memory per image | MFLOP per image |",
        "|---|---|---|---|---|---|",
    ]
    counted = {name: count(model, side) for name, (model, side) in cases().items()}
    for name, c in counted.items():
        lines.append(
            f"| {name} | {c.parameters:,} | {c.bytes_reduced():,} B |"
            f" {c.most_reductions} | {planned[name]:.1f} MiB | {c.flops / 1e6:,.0f} |"
        )
    for name in ("ImageNet-64, GM-SOP-16-8", "Places365, GM-SOP-16-8"):
        c = counted[name]
        lines += [
            f"\n{name}:\n",
            f"| devices | sent per device | memory, {per_device} images per device | bound "
            f"| memory, {whole} images in total | bound |",
            "|---|---|---|---|---|---|",
        ]
        for devices in DEVICES:
            sent = 2 * (devices - 1) / devices * c.bytes_reduced() / 1e6
            cells = [f"{devices:,}", f"{sent:.1f} MB"]
            for images in (per_device, whole / devices):
                memory = c.bytes_of_state / 2**30 + images * planned[name] / 2**10
                bound = machine.efficiency(c, devices, images)
                cells += [f"{memory:.2f} GiB", f"{bound:.1%}"] if images >= 1 else ["–", "–"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def planned_memory() -> dict[str, float]:
    """The temporary memory per image that XLA plans for each network, in MiB with one decimal."""
    return {name: round(planned_bytes(model, side) / 2**20, 1) for name, (model, side) in cases().items()}


def main() -> None:
    """Prints the tables."""
    parser = ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flops", type=float, default=2e13, help="sustained FLOP/s of a device (default: 2e13)")
    parser.add_argument("--bandwidth", type=float, default=5e10, help="bytes/s that a device sends (default: 5e10)")
    parser.add_argument("--latency", type=float, default=1e-5, help="latency of a message in seconds (default: 1e-5)")
    parser.add_argument("--docs", metavar="PAGE", type=Path, help="put the tables into this page")
    options = parser.parse_args()
    text = tables(Machine(options.flops, options.bandwidth, options.latency), planned_memory())
    print(text)
    if options.docs:
        write_section(options.docs, "tables", text)


if __name__ == "__main__":
    sys.exit(run_command(main))
