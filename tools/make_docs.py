"""Builds the documentation: the configuration reference, the guides and the API reference as HTML.

python tools/make_docs.py --output build/docs

Any warning is an error: a docstring that can't be read, a field without description, a dead link.
"""

import argparse
import ast
import html
import io
import os
import pathlib
import re
import sys
import tokenize
import warnings

import pdoc
from pdoc.render_helpers import to_html

from gmsop_jax import config as configs
from gmsop_jax.data import cli
from gmsop_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "configuration.md"
_INTRODUCTION = """# Configuration

<!-- made by tools/make_docs.py from gmsop_jax/config.py -->

A configuration is a Python file with a function `get_config()` that starts from
`gmsop_jax.config.default_config()`; those in `configs/` are examples. On the command line `--config.field=value` sets a
field, as in `--config.train.batch_size=64`; tuples are written as in Python,
`"--config.train.learning_rates=((0.1, 20), (0.01, 5))"`. An unknown field, a value of another type or out of range is
refused before anything is done. The defaults are GM-SOP-16-8 + ResNet-18 on 64×64 ImageNet.
"""
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} – gmsop_jax</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ max-width: 50rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.55 system-ui, sans-serif; }}
pre {{ overflow-x: auto; padding: .6rem .8rem; border: 1px solid #8884; border-radius: 6px; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; }}
th, td {{ padding: .25rem .6rem; border: 1px solid #8884; text-align: left; vertical-align: top; }}
img {{ max-width: 100%; background: white; }}
</style>
<nav>{navigation}</nav>
{body}
</html>
"""


class DocsError(UserError):
    """Something in the documentation is wrong."""


def comments(source: str) -> dict[str, str]:
    """Trailing comments of the assignments to fields in `model_defaults` and `default_config`.

    Raises:
      DocsError: if a field has none.
    """
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0]] = token.string.removeprefix("#").strip()
    found = {}
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef) or function.name not in ("model_defaults", "default_config"):
            continue
        for statement in function.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Attribute):
                name = ast.unparse(statement.targets[0]).split(".", 1)[1]
                prefix = "model." if function.name == "model_defaults" else ""
                found[prefix + name] = lines.get(statement.end_lineno or 0, found.get(prefix + name, ""))
    missing = [name for name, _ in configs.flatten(configs.default_config()) if not found.get(name)]
    if missing:
        raise DocsError(f"gmsop_jax/config.py: {', '.join(missing)} have no trailing comment")
    return found


def configuration_reference() -> str:
    """The Markdown text of docs/configuration.md."""
    described = comments((ROOT / "gmsop_jax" / "config.py").read_text("utf-8"))
    defaults = dict(configs.flatten(configs.default_config()))
    sections: dict[str, list[str]] = {}
    for name in (name for name in described if name in defaults):
        section, _, _ = name.rpartition(".")
        text = described[name].replace("|", "\\|")
        sections.setdefault(section, []).append(f"| `{name}` | `{defaults[name]!r}` | {text} |")
    parts = [_INTRODUCTION]
    for section in sections:
        title = f"## config.{section}" if section else "## config"
        parts.append(
            "\n".join([title, "", "| field | default | meaning |", "|---|---|---|", *sections[section]]) + "\n"
        )
    return "\n".join(parts)


def check_links(pages: list[pathlib.Path]) -> None:
    """Raises DocsError if a link to a file, from any of the Markdown pages, leads nowhere."""
    dead = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    if dead:
        raise DocsError("dead links:\n  " + "\n  ".join(dead))


def build(output: pathlib.Path) -> None:
    """Writes the site: index.html (the README), the other Markdown pages, and the API reference in api/.

    Raises:
      DocsError: at a dead link, a field without description, or a warning of pdoc's.
    """
    others = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    check_links([ROOT / "README.md", *others])
    os.environ.setdefault("PDOC_ALLOW_EXEC", "1")  # importing h5py asks the system what it is
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*Import of ArrayTree failed", UserWarning)  # within optax's own types
        pdoc.render.configure(docformat="google", show_source=False, footer_text="gmsop_jax")
        try:
            pdoc.pdoc("gmsop_jax", output_directory=output / "api")
        except (UserWarning, RuntimeWarning) as warning:
            raise DocsError(f"the API reference: {warning}") from warning
    pages = {"index": ROOT / "README.md", **{page.stem: page for page in others}}
    links = [f'<a href="{name}.html">{_title(page)}</a>' for name, page in pages.items()]
    navigation = " · ".join([*links, '<a href="api/gmsop_jax.html">API</a>'])
    for name, page in pages.items():
        body = to_html(page.read_text("utf-8"))
        body = re.sub(r'(href|src)="(?:docs/)?([\w-]+)\.(md|svg)"', _address, body)
        text = _PAGE.format(title=html.escape(_title(page)), navigation=navigation, body=body)
        (output / f"{name}.html").write_text(text, "utf-8")
    for picture in (ROOT / "docs").glob("*.svg"):
        (output / picture.name).write_bytes(picture.read_bytes())


def _title(page: pathlib.Path) -> str:
    return page.read_text("utf-8").split("\n", 1)[0].removeprefix("# ")


def _address(match: re.Match[str]) -> str:
    attribute, name, ending = match.groups()
    return f'{attribute}="{name}.{"html" if ending == "md" else ending}"'


def main() -> None:
    """Parses the command line and builds."""
    parser = argparse.ArgumentParser(description="Builds the documentation.")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "docs", help="folder for the HTML")
    args = parser.parse_args()
    REFERENCE.write_text(configuration_reference(), "utf-8")
    args.output.mkdir(parents=True, exist_ok=True)
    build(args.output)
    print(f"{args.output / 'index.html'}: {sum(1 for _ in args.output.rglob('*.html'))} pages")


if __name__ == "__main__":
    sys.exit(cli.run(main))
