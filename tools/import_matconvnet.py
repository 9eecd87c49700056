"""Makes a working directory from a checkpoint of the authors' MatConvNet script.

python tools/import_matconvnet.py net-epoch-60.mat --output runs/released
python -m gmsop_jax.main --mode evaluate --workdir runs/released
"""

import hashlib
import pathlib
import sys

from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.interop.matconvnet_run import ImportedRun, import_checkpoint

RELEASED = {
    "cf9bcf22e416773052358870f7786e05": "ResNet-18",
    "b4c60d7955d93e6145071a5157e2a2af": "ResNet-18-SR-SOP",
    "f80738566ffe9cabb7a1e88ea6c79dcf": "GM-GAP-16-8 + ResNet-18",
    "ae26d1ccf77a568ceccaa878acc4d230": "GM-GAP-16-8 + WRN-36-2",
    "6f0db9de2cbe233278ba8acca67a6f78": "GM-SOP-16-8 + ResNet-18",
    "d89ea02e557d087622eb1ea617d516be": "GM-SOP-16-8 + WRN-36-2",
}

# (head, blocks per stage, width factor) → name and parameters in the published table, 1000 classes
PUBLISHED = {
    ("gap", 2, 1): ("ResNet-18", "0.9M"),
    ("srsop", 2, 1): ("ResNet-18-SR-SOP", "9.0M"),
    ("gmgap", 2, 1): ("GM-GAP-16-8 + ResNet-18", "2.3M"),
    ("gmgap", 4, 2): ("GM-GAP-16-8 + WRN-36-2", "8.7M"),
    ("gmsop", 2, 1): ("GM-SOP-16-8 + ResNet-18", "10.3M"),
    ("gmsop", 4, 2): ("GM-SOP-16-8 + WRN-36-2", "15.7M"),
}


def main() -> None:
    """Parses the command line, imports the checkpoint, and prints the next steps."""
    parser = ArgumentParser(
        description="Makes a working directory from a MatConvNet checkpoint (net-epoch-N.mat).",
        epilog="--config.field=value sets a field of the configuration, as in --config.data.dir=data/imagenet64",
        takes_overrides=True,
    )
    parser.add_argument("file", help="net-epoch-N.mat, MATLAB v7 or v7.3")
    parser.add_argument("--output", required=True, help="working directory to create")
    options = parser.parse_args()
    file = pathlib.Path(options.file)
    run = import_checkpoint(file, options.output, options.overrides)
    print(f"{file}: {_origin(file)}")
    report(run, options.output)


def _origin(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    if digest in RELEASED:
        return f"the released {RELEASED[digest]} (md5 {digest})"
    return f"not one of the six released files (md5 {digest})"


def report(run: ImportedRun, output: str) -> None:
    """Prints what was imported and the next steps."""
    counts = count_parts(run.checkpoint.variables["params"])
    for part, count in counts.items():
        print(f"  {part:12} {count:12,}")
    model = run.config.model
    name, published = PUBLISHED.get((model.head, model.blocks_per_stage, model.width_factor), (None, None))
    compared = f"  (published: {published} for {name}, 1000 classes)" if name else "  (no published network)"
    print(f"  {'parameters':12} {sum(counts.values()):12,}{compared}")
    print(f"epoch {run.epoch}, step {run.step}, {model.num_classes} classes")
    if run.checkpoint.momentum is None:
        print("the file has no optimiser state: further training starts with momentum 0")
    if run.mean_rgb_difference is not None and run.mean_rgb_difference > 0.01:
        print(
            f"warning: the mean colour of the data set {run.config.data.dir} differs from the file's by up to"
            f" {run.mean_rgb_difference:.3g} of 255; the network was trained with {run.checkpoint.mean_rgb}"
        )
    print(f"evaluate:   python -m gmsop_jax.main --mode evaluate --workdir {output}")
    if run.epoch < run.config.train.num_epochs:
        print(f"train on:   python -m gmsop_jax.main --config {output}/config.py --workdir {output}")
    else:
        more = f"--config {output}/config.py --workdir {output} --config.train.num_epochs=…"
        print(f"all {run.config.train.num_epochs} epochs are done; more: python -m gmsop_jax.main {more}")


def count_parts(params: dict) -> dict[str, int]:
    """Counts the trained parameters of each part of a network, which excludes batch norm's moments."""
    head = params["head"]
    mixture = head.get("mixture", {})
    parts = {
        "backbone": params["backbone"],
        "gate": mixture.get("gate", {}),
        "candidates": {name: leaf for name, leaf in mixture.items() if name != "gate"},
        "batch norm": head.get("bn", {}),
        "classifier": head["classifier"],
    }
    return {name: _count(tree) for name, tree in parts.items() if tree}


def _count(tree) -> int:
    return sum(map(_count, tree.values())) if isinstance(tree, dict) else tree.size


if __name__ == "__main__":
    sys.exit(run_command(main))
