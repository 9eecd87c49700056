"""What the data tools share: a user's mistake is one line, not a traceback."""

import sys
from collections.abc import Callable

from gmsop_jax.errors import UserError


def run(main: Callable[[], int | None]) -> int:
    """The exit status of `main`: its own or 0; 2 after printing a UserError; 130 after Ctrl-C."""
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
