"""Makes a working directory from PyTorch weights of a ResNet, torchvision's or iSQRT-COV's.

python tools/import_torch.py resnet50.safetensors --output runs/resnet50
python -m gmsop_jax.main --mode predict --checkpoint runs/resnet50 --input PHOTOS
"""

import sys

from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.interop.torch_run import ImportedWeights, import_weights


def main() -> None:
    """Parses the command line, imports the weights, and prints the next steps."""
    parser = ArgumentParser(
        description="Makes a working directory from the weights of a ResNet or ResNeXt with 50 or 101 layers.",
        epilog="--config.field=value sets a field of the configuration, as in --config.data.dir=data/imagenet",
        takes_overrides=True,
    )
    parser.add_argument("file", help=".safetensors, or a file of torch.save (needs PyTorch)")
    parser.add_argument("--output", required=True, help="working directory to create")
    parser.add_argument("--classes", metavar="FILE", help="the classes' names, one a line (default: 0, 1, …)")
    parser.add_argument(
        "--triangle",
        choices=("row", "column"),
        default="row",
        help="order of a second-order classifier's columns; column: MATLAB's (default: row)",
    )
    options = parser.parse_args()
    run = import_weights(
        options.file, options.output, options.overrides, classes=options.classes, triangle=options.triangle
    )
    report(run, options.file, options.output)


def report(run: ImportedWeights, file: str, output: str) -> None:
    """Prints what was imported and the next steps."""
    model = run.config.model
    print(
        f"{file}: {model.backbone}, head {model.head}, {model.num_classes} classes, {run.num_parameters:,} parameters"
    )
    print(f"evaluate:   python -m gmsop_jax.main --mode evaluate --workdir {output} --config.data.dir=…")
    print(f"predict:    python -m gmsop_jax.main --mode predict --checkpoint {output} --input PHOTOS")
    new = f"--config configs/imagenet.py:{model.backbone},srsop --config.train.init_from={output}"
    print(f"fine-tune:  python -m gmsop_jax.main {new} --config.data.dir=… --workdir …")


if __name__ == "__main__":
    sys.exit(run_command(main))
