"""The commands that run a network: train, evaluate and predict.

Most modules are imported late: importing them takes seconds, and mistakes in flags should be reported immediately.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from gmsop_jax.errors import ArgumentParser

MODES = {
    "train": "train a network, or resume training it",
    "evaluate": "evaluate a trained network on a split of its data set",
    "predict": "predict the classes of image files",
}


def run_mode(arguments: Sequence[str], mode: str = "") -> int:
    """Runs a mode of `MODES`; without one, the flag `--mode` selects it. Returns the exit status."""
    options = _parse(arguments, mode)

    from gmsop_jax import config as configs
    from gmsop_jax.conversion.prepare import prepare_data
    from gmsop_jax.training import devices, interrupt, processes

    processes.start_processes(options.coordinator, options.num_processes, options.process_id)
    with processes.ending_together():
        config = _load_config(options)
        devices.use_cpu_devices(config)
        devices.use_compilation_cache()
        devices.keep_freed_memory()
        processes.check_same({"--mode": options.mode})
    workdir = options.workdir or f"runs/{configs.run_name(options.config or 'run')}"
    if options.mode == "predict":
        from gmsop_jax.inference import predict_output

        return predict_output.run(
            options.checkpoint or workdir,
            options.input,
            top=options.top,
            features=options.features,
            output_format=options.format,
            batch_size=config.eval.batch_size,
        )
    with interrupt.tolerating_closed_streams():
        processes.first_process_does(lambda: prepare_data(config.data))
        if options.mode == "evaluate":
            from gmsop_jax.inference import evaluate

            evaluate.run(config, options.checkpoint or workdir)
            return 0
        from gmsop_jax.training.loop import train_and_evaluate

        result = train_and_evaluate(config, workdir, profile=options.profile)
        print(f"{_summary(result)}; {result['wall_seconds']:.0f} s; results in {workdir}")
    return 0


def _parse(arguments: Sequence[str], mode: str = "") -> argparse.Namespace:
    """Parses the flags of a mode of `MODES`; without one, accepts `--mode` and the flags of all modes."""
    parser = ArgumentParser(
        prog=f"gmsop {mode}" if mode else "gmsop",
        description=f"{MODES[mode].capitalize()}." if mode else "Train, evaluate or use a network.",
        epilog="--config.field=value sets a field of the configuration, as in --config.train.batch_size=64",
        takes_overrides=True,
    )
    parser.add_argument(
        "--config", metavar="FILE", type=_path, help="a configuration: a file, or a name such as quickstart"
    )
    parser.add_argument("--workdir", metavar="DIR", type=_path, help="folder of the run (default: runs/<config name>)")
    if mode:
        parser.set_defaults(mode=mode, checkpoint=None, profile=range(0))
    else:
        parser.add_argument("--mode", choices=MODES, default="train", help="what to do (default: train)")
    if mode != "train":
        parser.add_argument(
            "--checkpoint",
            metavar="DIR",
            type=_path,
            help="working directory (to use its last step), the folder of one step in it, or an exported network",
        )
    if mode in ("predict", ""):
        _add_predict_options(parser)
    if mode in ("train", ""):
        parser.add_argument(
            "--profile",
            metavar="START:STOP",
            type=_steps,
            default=range(0),
            help="trace the training steps START to STOP − 1, counted from 1, for TensorBoard's profiler",
        )
    _add_process_options(parser)
    parser.add_argument("unexpected", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.unexpected:
        flags = {"train": "--config", "evaluate": "--checkpoint", "predict": "--checkpoint or --input"}
        if {"train": options.config, "evaluate": options.checkpoint}.get(options.mode):
            parser.error(f"unrecognized arguments: {' '.join(options.unexpected)}")
        parser.error(f"{options.unexpected[0]} is not preceded by a flag; expected {flags[options.mode]}")
    _check_needed(parser, options, f"gmsop {mode}" if mode else f"--mode {options.mode}")
    return options


def _check_needed(parser: ArgumentParser, options: argparse.Namespace, command: str) -> None:
    if options.mode == "train" and not options.config:
        parser.error("--config is needed; start with --config quickstart")
    trained = options.checkpoint or options.workdir or (options.mode == "evaluate" and options.config)
    if options.mode != "train" and not trained:
        parser.error(f"{command} needs --checkpoint, the working directory of a training run")
    if options.mode == "predict" and not options.input:
        parser.error(f"{command} needs --input: images, folders, or .txt files that list images")


def _add_predict_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options for predictions")
    group.add_argument(
        "--input", metavar="PATH", nargs="+", type=_path, help="images, folders, or .txt files that list images"
    )
    group.add_argument("--top", type=int, default=5, help="number of most probable classes to print (default: 5)")
    group.add_argument(
        "--features", metavar="FILE", type=_path, help="save the pooled features and gate weights in this .npz file"
    )
    group.add_argument(
        "--format", choices=("table", "json", "csv"), default="table", help="format of the output (default: table)"
    )


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options for a run of several processes")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of the first process, or auto to ask the cluster"
    )
    group.add_argument("--num-processes", metavar="N", type=int, help="number of processes")
    group.add_argument("--process-id", metavar="I", type=int, help="this process, 0 to N − 1; 0 writes the results")


def _path(text: str) -> str:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return text


def _steps(text: str) -> range:
    start, separator, stop = text.partition(":")
    if not (separator and start.isdigit() and stop.isdigit() and 1 <= int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP with 1 ≤ START < STOP, such as 100:110")
    return range(int(start), int(stop))


def _summary(result: Mapping[str, Any]) -> str:
    from gmsop_jax.training.metrics import error_text

    errors = {name: result[f"last_{name}"] for name in ("top1_error", "top5_error")}
    text = f"{error_text(errors, result['num_classes'])} after the last epoch"
    if result["best_step"] == result["step"]:
        return text
    return f"{text} (lowest of all epochs: {result['best_top1_error']:.2f} %, step {result['best_step']})"


def _load_config(options: argparse.Namespace):
    """Loads the configuration that the flags name, or that of the run whose checkpoint is used."""
    from gmsop_jax import config as configs

    if options.config:
        return configs.load(options.config, options.overrides)
    from gmsop_jax.conversion.sources import NAMES
    from gmsop_jax.training.restore import read_description

    config, inputs = read_description(options.checkpoint or options.workdir)
    if inputs.dataset in NAMES:  # the configuration, such as the quickstart's, may name the source of other images
        config.data.source = inputs.dataset
    configs.apply_overrides(config, options.overrides)
    return config
