"""Builds the documentation: the configuration reference, the guides and the API reference as HTML.

python tools/make_docs.py --output build/docs

Any warning is an error: a docstring that can't be read, a field without description, a dead link.
"""

import ast
import html
import os
import pathlib
import re
import sys
import warnings

import pdoc
from pdoc.render_helpers import to_html

from gmsop_jax import config as configs
from gmsop_jax.errors import ArgumentParser, UserError, run_command

ROOT = pathlib.Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "configuration.md"
CODE = ROOT / "docs" / "code.md"
_TREE_MARKS = ("<!-- tree: python tools/make_docs.py -->", "<!-- end of tree -->")
_INTRODUCTION = """# Configuration

<!-- made by tools/make_docs.py from gmsop_jax/config/fields.py -->

A configuration is a Python file with a function `get_config()` that starts from
`gmsop_jax.config.default_config()`; see `configs/` for examples. `--config` takes the path of such a file, or the name
of one that comes with the package, such as `quickstart` or `imagenet:resnet50,gmsop`. `--config.field=value` sets a
field, as in `--config.train.batch_size=64`. Write tuples as in Python:
`"--config.train.learning_rates=((0.1, 20), (0.01, 5))"`. Unknown fields, and values that are not allowed, are reported
before anything else happens. The defaults are those of GM-SOP-16-8 on ResNet-18 for 64×64 ImageNet.
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
    """An error in the documentation."""


def configuration_reference() -> str:
    """The Markdown text of docs/configuration.md.

    Raises:
      DocsError: if a field has no description.
    """
    if missing := [name for name, field in configs.FIELDS.items() if not field.meaning]:
        raise DocsError(f"gmsop_jax/config/fields.py: give a description to {', '.join(missing)}")
    sections: dict[str, list[str]] = {}
    for name, field in configs.FIELDS.items():
        choices = (True, False) if isinstance(field.default, bool) else field.allowed.choices
        values = ", ".join(f"`{choice!r}`" for choice in choices) or field.allowed.description
        meaning = field.meaning.replace("|", "\\|")
        row = f"| `{name}` | `{field.default!r}` | {values} | {meaning} |"
        sections.setdefault(name.rpartition(".")[0], []).append(row)
    parts = [_INTRODUCTION]
    for section, rows in sections.items():
        title = f"## config.{section}" if section else "## config"
        parts.append(
            "\n".join([title, "", "| field | default | values | meaning |", "|---|---|---|---|", *rows]) + "\n"
        )
    return "\n".join(parts)


def source_tree() -> str:
    """A list of the package's modules, each with the first line of its docstring."""
    package = ROOT / "gmsop_jax"
    lines = []
    for file in sorted(package.rglob("*.py"), key=lambda file: (file.parent, file.name != "__init__.py", file)):
        name = file.relative_to(package)
        folder = file.name == "__init__.py"
        path = f"{name.parent.as_posix()}/" if folder else name.as_posix()
        summary = (ast.get_docstring(ast.parse(file.read_text("utf-8"))) or "").split("\n", 1)[0].rstrip(".")
        indent = "  " * (len(name.parts) - 1 - folder)
        if name != pathlib.Path("__init__.py"):
            lines.append(f"{indent}- `{path}`: {summary}")
    return "\n".join(lines)


def write_source_tree() -> None:
    """Puts `source_tree()` between the marks in docs/code.md."""
    before, start, rest = CODE.read_text("utf-8").partition(_TREE_MARKS[0])
    _, end, after = rest.partition(_TREE_MARKS[1])
    CODE.write_text(f"{before}{start}\n{source_tree()}\n{end}{after}", "utf-8")


def check_links(pages: list[pathlib.Path]) -> None:
    """Raises DocsError if a Markdown page links to a file that does not exist."""
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
      DocsError: for a dead link or a warning from pdoc.
    """
    others = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    results = sorted((ROOT / "docs" / "results").glob("*.md"))
    check_links([ROOT / "README.md", *others, *results])
    os.environ.setdefault("PDOC_ALLOW_EXEC", "1")  # importing h5py starts a subprocess, which pdoc blocks by default
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", ".*Import of ArrayTree failed", UserWarning)  # within optax's own types
        pdoc.render.configure(docformat="google", show_source=False, footer_text="gmsop_jax")
        try:
            pdoc.pdoc("gmsop_jax", output_directory=output / "api")
        except (UserWarning, RuntimeWarning) as warning:
            raise DocsError(f"the API reference: {warning}") from warning
    pages = {"index": ROOT / "README.md"}
    pages |= {page.stem: page for page in others}
    pages |= {"results" if page.stem == "README" else page.stem: page for page in results}
    links = [f'<a href="{name}.html">{_title(page)}</a>' for name, page in pages.items()]
    navigation = " · ".join([*links, '<a href="api/gmsop_jax.html">API</a>'])
    for name, page in pages.items():
        body = to_html(page.read_text("utf-8"))
        body = re.sub(r'(href|src)="(\.\./|docs/)?(results/)?([\w-]+)\.(md|svg)', _address, body)
        text = _PAGE.format(title=html.escape(_title(page)), navigation=navigation, body=body)
        (output / f"{name}.html").write_text(text, "utf-8")
    for picture in (ROOT / "docs").rglob("*.svg"):
        (output / picture.name).write_bytes(picture.read_bytes())


def _title(page: pathlib.Path) -> str:
    return page.read_text("utf-8").split("\n", 1)[0].removeprefix("# ")


def _address(match: re.Match[str]) -> str:
    attribute, above, folder, name, ending = match.groups()
    if name == "README":
        name = "results" if folder else "index" if above == "../" else name
    return f'{attribute}="{name}.{"html" if ending == "md" else ending}'


def main() -> None:
    """Parses the command line and builds."""
    parser = ArgumentParser(description="Builds the documentation.")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "build" / "docs", help="folder for the HTML")
    args = parser.parse_args()
    REFERENCE.write_text(configuration_reference(), "utf-8")
    write_source_tree()
    args.output.mkdir(parents=True, exist_ok=True)
    build(args.output)
    print(f"{args.output / 'index.html'}: {sum(1 for _ in args.output.rglob('*.html'))} pages")


if __name__ == "__main__":
    sys.exit(run_command(main))
