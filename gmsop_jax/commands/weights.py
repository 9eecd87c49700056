"""The commands that export and import networks."""

import hashlib
import os
import pathlib
from collections.abc import Sequence

from gmsop_jax.analysis.published import find_published
from gmsop_jax.errors import ArgumentParser
from gmsop_jax.files import open_file
from gmsop_jax.inference.export import export_onnx, export_safetensors, export_stablehlo
from gmsop_jax.interop.matconvnet_run import ImportedRun, import_checkpoint
from gmsop_jax.interop.torch_run import ImportedWeights, import_weights
from gmsop_jax.training import exported
from gmsop_jax.training.restore import folder_of

RELEASED = {  # MD5 checksum of each file that the authors released: the name of the network
    "cf9bcf22e416773052358870f7786e05": "ResNet-18",
    "b4c60d7955d93e6145071a5157e2a2af": "ResNet-18-SR-SOP",
    "f80738566ffe9cabb7a1e88ea6c79dcf": "GM-GAP-16-8 + ResNet-18",
    "ae26d1ccf77a568ceccaa878acc4d230": "GM-GAP-16-8 + WRN-36-2",
    "6f0db9de2cbe233278ba8acca67a6f78": "GM-SOP-16-8 + ResNet-18",
    "d89ea02e557d087622eb1ea617d516be": "GM-SOP-16-8 + WRN-36-2",
}


def run_export(arguments: Sequence[str]) -> None:
    """Exports a network and compares it with the original: `gmsop export runs/quickstart --format stablehlo`."""
    parser = ArgumentParser(prog="gmsop export", description="Exports a trained network.")
    parser.add_argument(
        "run", type=pathlib.Path, help="working directory, the folder of one step in it, or an exported network"
    )
    parser.add_argument(
        "--format", choices=("safetensors", "stablehlo", "onnx"), required=True, help="format of the exported network"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, help="output folder (default: export/FORMAT in the working directory)"
    )
    parser.add_argument("--license", help="safetensors: licence of the weights for the model card, such as cc-by-4.0")
    args = parser.parse_args(arguments)
    folder = folder_of(args.run)
    if not args.output and exported.is_on_hub(args.run):
        parser.error(f"--output is needed, because {args.run} is a network on the Hugging Face Hub")
    output = args.output or folder / "export" / args.format
    if args.format == "safetensors":
        written = export_safetensors(args.run, output, license_name=args.license or "unknown")
    elif args.license:
        parser.error("--license is written into the model card, which only --format safetensors creates")
    else:
        written = {"stablehlo": export_stablehlo, "onnx": export_onnx}[args.format](args.run, output)
    for file in written.files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    largest = ", ".join(f"{name} {difference:.2g}" for name, difference in written.differences.items())
    print(f"largest differences from the original on random images: {largest}")


def run_import(arguments: Sequence[str]) -> None:
    """Creates a working directory from imported weights: `gmsop import resnet50.safetensors --output runs/resnet50`.

    A MATLAB file is a checkpoint of the authors' MatConvNet code; any other file contains PyTorch weights of a ResNet
    or ResNeXt.
    """
    parser = ArgumentParser(
        prog="gmsop import",
        description="Creates a working directory from a MatConvNet checkpoint (net-epoch-N.mat), or from the PyTorch"
        " weights of a ResNet or ResNeXt with 34, 50 or 101 layers.",
        epilog="--config.field=value sets a field of the configuration, as in --config.data.dir=data/imagenet",
        takes_overrides=True,
    )
    parser.add_argument(
        "file", help=".mat (MATLAB v7 or v7.3), .safetensors, or a file written by torch.save (which needs PyTorch)"
    )
    parser.add_argument("--output", required=True, help="working directory to create")
    group = parser.add_argument_group("options for PyTorch weights")
    group.add_argument(
        "--classes", metavar="FILE", help="text file with the class names, one per line (default: 0, 1, …)"
    )
    group.add_argument(
        "--triangle",
        choices=("row", "column"),
        help="order of a second-order classifier's columns; `column` is MATLAB's (default: row)",
    )
    options = parser.parse_args(arguments)
    if not _is_matlab(options.file):
        weights = import_weights(
            options.file, options.output, options.overrides, classes=options.classes, triangle=options.triangle or "row"
        )
        _report_torch(weights, options.file, options.output)
        return
    if options.classes or options.triangle:
        parser.error(f"--classes and --triangle apply to PyTorch weights; {options.file} is a MatConvNet checkpoint")
    run = import_checkpoint(options.file, options.output, options.overrides)
    print(f"{options.file}: {_origin(options.file)}")
    _report_matconvnet(run, options.output)


def _is_matlab(file: str) -> bool:
    """Returns whether a file is a MATLAB file, according to its extension or its first bytes."""
    if file.lower().endswith(".mat") or not os.path.isfile(file):
        return file.lower().endswith(".mat")
    with open_file(file) as stream:
        return stream.read(6) == b"MATLAB"


def _report_torch(run: ImportedWeights, file: str, output: str) -> None:
    """Prints what was imported and the next steps."""
    model = run.config.model
    print(
        f"{file}: {model.backbone}, head {model.head}, {model.num_classes} classes, {run.num_parameters:,} parameters"
    )
    print(f"evaluate:   gmsop evaluate --workdir {output} --config.data.dir=…")
    print(f"predict:    gmsop predict --checkpoint {output} --input PHOTOS")
    head = "srsop" if model.head == "gap" else model.head
    new = f"--config imagenet:{model.backbone},{head} --config.train.init_from={output}"
    print(f"fine-tune:  gmsop train {new} --config.data.dir=… --workdir …")


def _origin(file: str) -> str:
    with open_file(file) as stream:
        digest = hashlib.file_digest(stream, "md5").hexdigest()
    if digest in RELEASED:
        return f"the released {RELEASED[digest]} (md5 {digest})"
    return f"not one of the six released files (md5 {digest})"


def _report_matconvnet(run: ImportedRun, output: str) -> None:
    """Prints what was imported and the next steps."""
    counts = count_parts(run.checkpoint.variables["params"])
    for part, count in counts.items():
        print(f"  {part:12} {count:12,}")
    model = run.config.model
    published = find_published(run.config, num_classes=1000)
    compared = "no published network"
    if published and published.parameters:
        compared = f"published: {published.parameters} for {published.name}, 1000 classes"
    print(f"  {'parameters':12} {sum(counts.values()):12,}  ({compared})")
    print(f"epoch {run.epoch}, step {run.step}, {model.num_classes} classes")
    if run.checkpoint.momentum is None:
        print("the file has no optimiser state: further training starts with momentum 0")
    if run.mean_rgb_difference is not None and run.mean_rgb_difference > 0.01:
        print(
            f"warning: the mean colour of the data set {run.config.data.dir} differs by up to"
            f" {run.mean_rgb_difference:.3g} of 255 from the network's, {run.checkpoint.mean_rgb}"
        )
    print(f"evaluate:   gmsop evaluate --workdir {output}")
    if run.epoch < run.config.train.num_epochs:
        print(f"continue:   gmsop train --config {output}/config.py --workdir {output}")
    else:
        more = f"--config {output}/config.py --workdir {output} --config.train.num_epochs=…"
        print(f"all {run.config.train.num_epochs} epochs are done; to train longer: gmsop train {more}")


def count_parts(params: dict) -> dict[str, int]:
    """Counts the parameters in each part of the tree `params`."""
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
