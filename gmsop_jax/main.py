"""The command line: `gmsop COMMAND …`, or without a command `--config FILE [--mode …]`."""

import importlib
import signal
import sys
from collections.abc import Sequence

import gmsop_jax
from gmsop_jax.commands.run import MODES, run_mode
from gmsop_jax.errors import UserError, did_you_mean, run_command

# Everything else is imported late, because it takes seconds; flags are checked and signals handled before that.

COMMANDS = {  # name: (the module of gmsop_jax.commands that defines `run_<name>`, summary)
    "convert": ("data", "convert a data set to shards"),
    "merge": ("data", "join the parts written by `convert --shard-range`"),
    "inspect": ("data", "describe a data set and draw a contact sheet"),
    "verify": ("data", "compare a data set with its manifest"),
    "report": ("study", "write an HTML report about one or more runs"),
    "sweep": ("study", "train several configurations with several seeds"),
    "summary": ("study", "count the parameters and multiply-adds of networks"),
    "export": ("weights", "write a trained network as safetensors, StableHLO or ONNX"),
    "import": ("weights", "turn PyTorch or MatConvNet weights into a run"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. In a notebook, call `main(["train", "--config", "quickstart"])`.

    Args:
      arguments: a command of `MODES` or `COMMANDS` and its flags, by default those of the process. Without a command,
        `--mode` names one of `MODES` (default: train).

    Returns: the exit status: 0 on success; 1 if `predict` could not read a file or a run of `sweep` failed; 2 after an
      error that the user can fix, which is printed in one line; 130 after Ctrl-C; and 75 (EX_TEMPFAIL: try again) after
      SIGTERM or SIGHUP. Training saves its state first.
    """
    return run_command(lambda: _run_command(sys.argv[1:] if arguments is None else list(arguments)))


def console() -> int:
    """Runs the command line of the process, for `gmsop` and `python -m gmsop_jax`; returns the exit status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # a background job ignores SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback if Ctrl-C comes before or after the command
    return main()


def _run_command(arguments: list[str]) -> int | None:
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in COMMANDS:
        module = importlib.import_module(f"gmsop_jax.commands.{COMMANDS[name][0]}")
        return getattr(module, f"run_{name}")(rest)
    if name in MODES:
        return run_mode(rest, name)
    if name in ("-h", "--help") or not name:
        print(_overview())
        return 0 if name else UserError.status
    if name == "--version":
        print(f"gmsop_jax {gmsop_jax.__version__}")
        return 0
    if not name.startswith("-"):
        known = [*MODES, *COMMANDS]
        raise UserError(f"there is no command {name!r}; {did_you_mean(name, known, otherwise='see gmsop --help')}")
    return run_mode(arguments)


def _overview() -> str:
    commands = MODES | {name: summary for name, (_, summary) in COMMANDS.items()}
    lines = [f"  {name:10}{summary}" for name, summary in commands.items()]
    return "\n".join(
        [
            "usage: gmsop COMMAND …\n\nSecond-order pooling in JAX. The commands are:",
            *lines,
            "\nStart with `gmsop train --config quickstart`; `gmsop COMMAND --help` lists a command's flags.",
            "`--config FILE [--mode train|evaluate|predict] …` without a command works too.",
        ]
    )


if __name__ == "__main__":
    sys.exit(console())
