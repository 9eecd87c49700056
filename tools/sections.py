"""Writes tables into the pages of the documentation, between the marks of a section."""

import pathlib
import re

from gmsop_jax.errors import UserError
from gmsop_jax.files import write_atomic


def write_section(page: pathlib.Path, name: str, text: str) -> None:
    """Replaces what a Markdown page has between `<!-- name: COMMAND -->` and `<!-- end of name -->`.

    Raises:
      UserError: if the page has no such marks.
    """
    marks = re.compile(rf"(<!-- {name}: .* -->\n)[\s\S]*?(<!-- end of {name} -->)")
    old = page.read_text("utf-8")
    new, found = marks.subn(lambda mark: f"{mark[1]}\n{text.strip()}\n\n{mark[2]}", old)
    if not found:
        lines = f"'<!-- {name}: COMMAND -->' and '<!-- end of {name} -->'"
        raise UserError(f"{page} has no lines {lines}; add them where the table belongs")
    write_atomic(page, new)
