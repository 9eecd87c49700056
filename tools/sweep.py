"""Trains configurations with several seeds and writes one table of the results.

python tools/sweep.py configs/heads.py --seeds 0 1 2 --output runs/heads
python tools/sweep.py … --part 3/8          the fourth of eight shares, as a job array runs them
python tools/sweep.py … --gather            only the table of what is finished

Started again it goes on where it was.
"""

import argparse
import pathlib
import sys

from gmsop_jax.analysis import sweep
from gmsop_jax.errors import ArgumentParser, run_command
from gmsop_jax.files import write_atomic


def main() -> int:
    """Parses the command line and runs the sweep; returns 1 if a run failed."""
    parser = ArgumentParser(
        description="Trains configurations with several seeds, one table of the results; run again to resume.",
        epilog="--config.field=value sets a field of every run",
        takes_overrides=True,
    )
    parser.add_argument("configs", nargs="+", help="file.py or file.py:argument; a file with ROWS stands for all rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs/sweep"))
    parser.add_argument("--part", default="0/1", type=_part, metavar="I/N", help="every N-th run from the I-th, from 0")
    parser.add_argument("--gather", action="store_true", help="only write the table")
    options = parser.parse_args()
    jobs = sweep.plan_sweep(options.configs, options.seeds, options.output, options.overrides)
    part, parts = options.part
    options.output.mkdir(parents=True, exist_ok=True)
    failed = [] if options.gather else sweep.run(jobs[part::parts])
    table = sweep.table(jobs)
    write_atomic(options.output / "table.md", table)
    print(f"{table}{options.output / 'table.md'}")
    return 1 if failed else 0


def _part(text: str) -> tuple[int, int]:
    index, separator, count = text.partition("/")
    if not (separator and index.isdigit() and count.isdigit() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 ≤ I < N, such as 0/4")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(run_command(main))
