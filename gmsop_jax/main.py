"""Command line: `python -m gmsop_jax.main --config FILE [--mode …] [--config.field=value …]`."""

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from gmsop_jax import config as configs
from gmsop_jax.errors import DataError, UserError
from gmsop_jax.training import parallel


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    0: done; 2: an error that the user can mend, told in a line; 130: stopped by Ctrl-C and 75: by
    SIGTERM, both with the state saved.
    """
    try:
        return _run(_parse(sys.argv[1:] if arguments is None else arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "status", 2)
    except KeyboardInterrupt:  # before the first step, or a second one while the first is being obeyed
        print("error: stopped by Ctrl-C; checkpoints written before are kept", file=sys.stderr)
        return 130


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gmsop_jax.main",
        description="Trains, evaluates or uses a network with second-order pooling.",
        epilog="--config.field=value sets a field of the configuration, as in --config.train.batch_size=64",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="configuration, like configs/quickstart.py")
    parser.add_argument("--workdir", metavar="DIR", help="results; runs/<config name> by default")
    parser.add_argument("--mode", choices=("train", "evaluate", "predict"), default="train")
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="working directory or step to evaluate or predict with; its best by default",
    )
    _add_predict_options(parser)
    _add_process_options(parser)
    parser.add_argument(
        "--profile",
        metavar="START:STOP",
        type=_steps,
        default=range(0),
        help="training steps, counted from 1, to trace for TensorBoard's profiler",
    )
    options, rest = parser.parse_known_args(arguments)
    options.overrides = []
    for item in rest:
        if not item.startswith("--config."):
            parser.error(f"unrecognized argument {item}")
        options.overrides.append(item.removeprefix("--config."))
    if options.mode == "predict":
        if not (options.checkpoint or options.workdir):
            parser.error("--mode predict needs --checkpoint, the working directory of a training run")
        if not options.input:
            parser.error("--mode predict needs --input: images, folders, or .txt files that list images")
    elif not (options.config or (options.mode == "evaluate" and (options.checkpoint or options.workdir))):
        parser.error("--config is needed; start with --config configs/quickstart.py")
    return options


def _add_predict_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("with --mode predict")
    group.add_argument("--input", metavar="PATH", nargs="+", help="images, folders, or .txt files that list images")
    group.add_argument("--top", type=int, default=5, help="most probable classes of each image (default: 5)")
    group.add_argument("--features", metavar="FILE", help=".npz file for the pooled features and gate weights")
    group.add_argument("--format", choices=("table", "json", "csv"), default="table")


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where a run has several processes")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process; auto asks the cluster")
    group.add_argument("--num-processes", metavar="N", type=int)
    group.add_argument("--process-id", metavar="I", type=int, help="from 0; the first one writes the results")


def _steps(text: str) -> range:
    start, separator, stop = text.partition(":")
    if not (separator and start.isdigit() and stop.isdigit() and 1 <= int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is not START:STOP with 1 ≤ START < STOP, such as 100:110")
    return range(int(start), int(stop))


def _run(options: argparse.Namespace) -> int:
    config = _load_config(options)
    parallel.use_cpu_devices(config.parallel.cpu_devices, _split_rows(config))
    parallel.start_processes(options.coordinator, options.num_processes, options.process_id)
    workdir = options.workdir or f"runs/{configs.run_name(options.config or 'run')}"
    if options.mode == "predict":
        from gmsop_jax.inference import predict_output

        _use_compilation_cache()
        return predict_output.run(
            options.checkpoint or workdir,
            options.input,
            top=options.top,
            features=options.features,
            output_format=options.format,
            batch_size=config.eval.batch_size,
        )
    parallel.first_process_does(lambda: _prepare_data(config))
    _use_compilation_cache()
    if options.mode == "evaluate":
        from gmsop_jax.training.evaluation import evaluate_checkpoint

        result = evaluate_checkpoint(config, options.checkpoint or workdir)
        print(
            f"step {result['step']}, {config.eval.split}: top-1 error {result['top1_error']:.2f} %,"
            f" top-5 error {result['top5_error']:.2f} %, loss {result['loss']:.4f}"
        )
        return 0
    from gmsop_jax.training.loop import train_and_evaluate

    result = train_and_evaluate(config, workdir, profile=options.profile)
    print(
        f"top-1 error {result['top1_error']:.2f} %, top-5 error {result['top5_error']:.2f} % (step"
        f" {result['best_step']}, the best; last {result['last_top1_error']:.2f} %) after"
        f" {result['wall_seconds']:.0f} s; results in {workdir}"
    )
    return 0


def _split_rows(config) -> tuple[int, int]:
    """Rows that go over the devices at a time: of a sub-batch, in pairs if they are mixed, and of evaluation."""
    t = config.train
    return t.batch_size // t.sub_batches // (2 if t.mixup_alpha else 1), config.eval.batch_size


def _load_config(options: argparse.Namespace):
    if options.config:
        return configs.load(options.config, options.overrides)
    from gmsop_jax.training.checkpoint import read_config

    config = configs.from_json(read_config(options.checkpoint or options.workdir))
    for item in options.overrides:
        configs.override(config, item)
    configs.validate(config)
    return config


def _prepare_data(config) -> None:
    """Converts the embedded sample if the configuration asks for it; says how to get data otherwise."""
    directory = pathlib.Path(config.data.dir)
    if (directory / "dataset.json").exists():
        return
    if config.data.auto_convert:
        from gmsop_jax.conversion.convert import convert

        try:
            convert(config.data.source, None, directory)
        except UserError as error:
            raise DataError(f"config.data.dir = {str(directory)!r} can't be prepared: {error}") from error
    elif not directory.exists():
        raise DataError(
            f"no data set at {directory.absolute()} (config.data.dir). Make it with\n"
            f"  python tools/convert.py {config.data.source} --input DOWNLOADS --output {directory}\n"
            "or name another with --config.data.dir=DIR. Without any data, try\n"
            "  python -m gmsop_jax.main --config configs/quickstart.py"
        )


def _use_compilation_cache() -> None:
    """Keeps compiled programs for the next start, where JAX_COMPILATION_CACHE_DIR says if it is set."""
    import jax

    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "gmsop_jax"))


if __name__ == "__main__":
    sys.exit(main())
