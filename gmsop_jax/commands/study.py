"""The commands that study networks and runs: report, sweep and summary."""

import argparse
import pathlib
import sys
from collections.abc import Sequence

from tqdm import tqdm

from gmsop_jax.analysis import summary, sweep
from gmsop_jax.analysis.study import Study, StudyData, StudyRunner, load_study
from gmsop_jax.config import split_argument
from gmsop_jax.conversion.convert import convert
from gmsop_jax.conversion.sources import Options
from gmsop_jax.data.manifest import FILE_NAME, Manifest
from gmsop_jax.errors import ArgumentParser, ConfigError, UserError
from gmsop_jax.files import write_atomic, write_output
from gmsop_jax.training.devices import keep_freed_memory


def run_report(arguments: Sequence[str]) -> None:
    """Writes an HTML report about one or more runs: `gmsop report runs/quickstart`."""
    parser = ArgumentParser(
        prog="gmsop report", description="Writes a self-contained HTML report about one or more runs."
    )
    parser.add_argument("workdir", nargs="+", type=pathlib.Path, help="working directory of a training run")
    parser.add_argument("--output", type=pathlib.Path, help="the HTML file (default: report.html in the first folder)")
    parser.add_argument("--data", type=pathlib.Path, help="folder of the data set (default: as in the configuration)")
    parser.add_argument(
        "--max-images", type=int, default=5000, help="maximum number of images per split (default: 5000)"
    )
    args = parser.parse_args(arguments)
    if args.max_images < 1:
        raise ConfigError(f"--max-images must be at least 1, got {args.max_images}")
    try:
        from gmsop_jax.analysis.report import build_report
    except ImportError as error:
        raise UserError(f"the report needs {error.name}: pip install 'gmsop-jax[report]'") from error
    page = build_report(args.workdir, data=args.data, max_images=args.max_images)
    output = args.output or args.workdir[0] / "report.html"
    try:
        write_output(output, page)
    except OSError as error:
        raise UserError(f"the report can't be written to {output} ({error.strerror}); give another --output") from error
    if output.is_file() and not output.is_symlink():
        print(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def run_sweep(arguments: Sequence[str]) -> int:
    """Trains configurations with several seeds, and writes one table: `gmsop sweep heads --seeds 0 1 2`.

    A configuration file that defines a study is executed as one: `gmsop sweep configs/studies/elpv.py`.

    Returns: 1 if a run failed, and otherwise 0.
    """
    parser = ArgumentParser(
        prog="gmsop sweep",
        description="Trains configurations with several seeds, and writes one table of the results. Run the same"
        " command again to resume.",
        epilog="--config.field=value sets a field of every run",
        takes_overrides=True,
    )
    parser.add_argument("configs", nargs="+", help="configurations; a file that defines ROWS means all its rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of each configuration (default: 0 1 2)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs/sweep"),
        help="folder of the working directories (default: runs/sweep)",
    )
    part = "execute every N-th run, starting at run I, counted from 0"
    parser.add_argument("--part", default="0/1", type=_part, metavar="I/N", help=part)
    parser.add_argument("--gather", action="store_true", help="only write the table of the finished runs")
    group = parser.add_argument_group("for studies, which choose their seeds and hyperparameters themselves")
    group.add_argument("--input", help="the downloaded file or folder, needed until it is converted")
    group.add_argument(
        "--data-dir", type=pathlib.Path, default=pathlib.Path("data"), help="folder of the data sets (default: data)"
    )
    group.add_argument(
        "--results",
        type=pathlib.Path,
        default=pathlib.Path("results"),
        help="folder of the raw results (default: results)",
    )
    options = parser.parse_args(arguments)
    studies = {path: study for path in options.configs if (study := load_study(path))}
    if studies:
        if len(studies) < len(options.configs) or options.overrides:
            raise ConfigError("studies can't be combined with other configurations or with --config.field=value")
        if options.seeds or options.gather or options.part != (0, 1):
            raise ConfigError("--seeds, --part and --gather do not apply to studies; omit them")
        for path, study in studies.items():
            _execute_study(study, path, options)
        return 0
    jobs = sweep.plan_sweep(options.configs, options.seeds or [0, 1, 2], options.output, options.overrides)
    part, parts = options.part
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [] if options.gather else sweep.run(jobs[part::parts])
    table = sweep.table(jobs)
    write_atomic(options.output / "table.md", table)
    print(f"{table}{options.output / 'table.md'}")
    return 1 if failed else 0


def _execute_study(study: Study, path: str, options: argparse.Namespace) -> None:
    """Converts the data sets of a study that do not exist yet, and executes its runs."""
    for data in study.data:
        prepare_data(data, options.data_dir / data.name, options.input)
    file, _ = split_argument(path)
    keep_freed_memory()
    StudyRunner(study, file, data_dir=options.data_dir, output=options.output, results=options.results).execute()
    print(f"all runs of {study.name} are finished; their results are in {options.results / study.name}")


def prepare_data(data: StudyData, folder: pathlib.Path, input_path: str | None) -> None:
    """Converts a data set of a study. If it is already converted, `input_path` may be None.

    Raises:
      ConfigError: if the folder contains a data set of another source or with other options.
      DataError: as raised by `convert` and `Manifest.load`.
    """
    if input_path is not None or not (folder / FILE_NAME).exists():
        convert(data.source, input_path, folder, options=Options(**data.options))
        return
    provenance = Manifest.load(folder).provenance
    needed = {"source": data.source, "options": dict(data.options), "seed": 0, "limit": None, "codec": "raw"}
    for name, value in needed.items():
        if provenance.get(name) != value:
            raise ConfigError(
                f"{folder} was converted with the {name} {provenance.get(name)}, but the study needs {value}; delete"
                " that folder and run the study with --input, or give another --data-dir"
            )


def _part(text: str) -> tuple[int, int]:
    index, separator, count = text.partition("/")
    if not (separator and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 ≤ I < N, such as 0/4")
    return int(index), int(count)


def run_summary(arguments: Sequence[str]) -> None:
    """Prints the costs of networks: `gmsop summary imagenet64_gmsop imagenet:resnet50,srsop`."""
    parser = ArgumentParser(
        prog="gmsop summary",
        description="Counts parameters, features and multiply-adds; '= x' and '≠ x' compare with the published x.",
    )
    parser.add_argument("configs", nargs="*", help="configurations: names, file.py or file.py:argument")
    parser.add_argument("--all", action="store_true", help="every configuration of the package")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    options = parser.parse_args(arguments)
    paths = [*options.configs, *(summary.all_configurations() if options.all else [])]
    if not paths:
        parser.error("give one or more configurations, or --all")
    rows = summarize_all(paths)
    print(summary.markdown(rows, summary.HEADER) if options.markdown else summary.text(rows), end="")
    different = [f"{row.name}: {', '.join(row.differences)}" for row in rows if row.differences]
    networks = "1 network" if len(rows) == 1 else f"{len(rows)} networks"
    print(f"\n{networks}; counts that differ from the published ones: {'; '.join(different) or 'none'}")


def summarize_all(paths: Sequence[str]) -> list[summary.Row]:
    """Summarises configurations, with a progress bar on a terminal."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return [summary.summarize(path) for path in tqdm(paths, leave=False, disable=not terminal)]
