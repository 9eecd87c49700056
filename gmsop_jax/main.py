"""The command line: `gmsop COMMAND …`, or without a command `--config FILE [--mode …]`."""

import importlib
import signal
import sys
from collections.abc import Sequence

import gmsop_jax
from gmsop_jax.commands.run import MODES, run_mode
from gmsop_jax.errors import UserError, did_you_mean, run_command

# The rest is imported late: it takes seconds, in which a mistake in the flags or a signal should have its effect too.

COMMANDS = {  # each has its function run_… in a module of gmsop_jax.commands
    "convert": ("data", "convert a data set to shards"),
    "merge": ("data", "join the parts that several `convert --shard-range` wrote"),
    "inspect": ("data", "describe a data set and draw a contact sheet"),
    "verify": ("data", "compare a data set with its manifest"),
    "report": ("study", "write an HTML page about one run or several"),
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

    Returns: the exit status: 0 if all went well; 2 after an error that the user can fix, which is printed in one line;
      130 after Ctrl-C and 75 ("start me again") after SIGTERM or SIGHUP. Training saves its state first.
    """
    return run_command(lambda: _run_command(sys.argv[1:] if arguments is None else list(arguments)))


def console() -> int:
    """Runs the command line of the process, for `gmsop` and `python -m gmsop_jax`; returns the exit status."""
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:  # in the background, it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # before and after the command, Ctrl-C leaves no traceback
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
