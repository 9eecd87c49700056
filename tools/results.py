"""Writes the pages of docs/results, and the table in the README, from the raw results of the studies.

python tools/results.py
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence

from gmsop_jax.analysis import results, results_plots
from gmsop_jax.analysis.study import load_results, load_study
from gmsop_jax.errors import ArgumentParser, UserError, run_command
from gmsop_jax.files import write_atomic

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = ROOT / "configs" / "studies"
_DOCS = ROOT / "docs" / "results"
_README_MARKS = ("<!-- results: python tools/results.py -->\n", "<!-- end of results -->\n")
_CURVE_STUDIES = ("fashion_sample_10", "fashion_sample_30", "fashion_sample_100")
# studies with a fixed weight decay → the same with a tuned one
_TUNED_STUDIES = {"emoji": "emoji_weight_decay", "fashion_sample_100": "fashion_sample_100_weight_decay"}
_NOT_IN_OVERVIEW = (*_CURVE_STUDIES[1:], *_TUNED_STUDIES.values())
_TABLE_MARK = "<!-- overview -->\n"

Collected = Mapping[str, Sequence[results.MethodResults]]  # for the title of each study

_OVERVIEW = """
The figure shows the difference between each method and average pooling, with 95 % intervals: green is better, red is
worse, and gray means that the interval contains 0. The table gives the balanced error, which is the mean of the errors
of the classes, as mean ± standard deviation over the runs; a dash means that a study does not have the method. MMAC is
the number of multiply-adds per image, in millions; it and the number of parameters are those of the first study in the
table. Unfinished studies, the two larger samples of the learning curves and the studies of weight decay are left out.

![Difference between each method and average pooling, for each study](overview.svg)

<!-- overview -->
{table}"""

_CURVES = """
## Learning curves

These studies have the same test images and the same recipe, with 10, 30 and 100 % of the training images of the
embedded sample of Fashion-MNIST. Each cell of the table gives the balanced error, and the difference from average
pooling with its 95 % interval. Training takes more steps with more images, because the number of epochs is the same.
Hyperparameters were chosen from grids of 6 points for 450 images, and of 2 points for the others.

![Difference between each method and average pooling, by number of training images](learning_curves.svg)

{table}"""

_WEIGHT_DECAY = """
## Weight decay

Weight decay can matter as much as the head: for the quickstart's GM-SOP on 5,000 images of Fashion-MNIST, 2 · 10⁻³
instead of 10⁻⁴ lowered the top-1 error from 12.0 ± 0.9 to 10.0 ± 0.5 % with the same five seeds. It is 10⁻⁴ for all
methods, except in the studies below, which repeat another study and choose the weight decay for each method. The tables
show the balanced error with 10⁻⁴ (*fixed*), the error with the chosen weight decay (*tuned*), and differences in
percentage points with 95 % intervals, paired by seed. The tuned runs were made with a later version of the package.
Where 10⁻⁴ was chosen, the errors differ by rounding alone.

{tables}"""

_INDEX = """\
# Results

Is second-order pooling better than average pooling? Is a gated mixture better than a single pooling? Under which
conditions, and at what cost? The studies below ask these questions on [data that anyone can
install](../data.md#data-sets-of-the-studies). Every study is a file in `configs/studies`, and gets a page here as soon
as it has results, whatever they are.

| study | final runs | page |
|---|---|---|
{rows}
{overview}{curves}{weight_decay}
## Protocol

- All methods of a study have the same backbone and recipe. The methods are average pooling (`gap`, and `gap_wide` with
  as many features as the second-order heads), SR-SOP (`srsop`, and `parametric_srsop` with the convolutions of one
  candidate), DropCov (`dropcov`), a mixture with equal weights for all N = 8 candidates (`avesop`), and gated mixtures
  that select K = 4 of them (`gmgap` with average pooling, `gmsop`). [Heads](../heads.md) describes them.
- Controls isolate what the gated mixture adds: SR-SOP with as many parameters (`matched_srsop`), all candidates
  selected (`gmsop_all_selected`), K candidates with equal weights for every image (`avesop_k`), and a gate that keeps
  its random initial weights (`gmsop_random_gate`).
- The learning rate, that of the classifier and, where a method has them, the dropout rate and the balance weight are
  chosen for each method from a grid. All grids of a study have the same size. The choice is made with one seed, by the
  balanced error on validation images that were set aside from the training data. Some studies reuse hyperparameters
  that another study selected; their pages say so. The test images are used only once, after the last epoch of the
  final runs. No result is that of the best epoch.
{recipe}
- In a finished study, every method was trained at least five times: with five seeds, or on five folds. The pages give
  the mean and the standard deviation over the runs, and the differences from a reference method, paired by seed and
  data set, with 95 % intervals.

## The classifier's learning rate

As in the authors' code, mixtures apply batch norm to the pooled vector before the classifier, which makes the steps of
the classifier larger. The other heads have no batch norm there. Therefore, half of the points of each grid have a tenth
of the learning rate for the classifier. The first version of the grids lacked these points; they were added after its
results on the test images were known. The table lists the methods for which one of the new points was chosen in at
least one study. For each study, it shows the balanced error on the test images at the point that was chosen among those
with the full rate, the error at the point that is chosen now, and their difference in percentage points (a dash if both
are the same point). The superseded runs are in `results/STUDY_full_rate/`.

{rates}
## Run a study

```bash
python tools/sweep.py configs/studies/fashion_sample_10.py     # run it again to resume
python tools/sweep.py configs/studies/emoji.py --input FOLDER  # a study whose data were downloaded
python tools/results.py                                        # make these pages from the raw results
```

The published runs were made with `taskset -c 0` in front of the first command, so that each run used a single core. At
the commit that a page names, and on the same kind of processor, this command reproduces the runs exactly. With another
version of the package, or another number of cores, numbers are rounded differently, and the error of a run changes
about as much as with another seed.

The result of each run is one file in `results/STUDY/`, with the configuration, the commit, the versions, the device,
the run time, and the confusion matrix of each split. A run whose file exists is not repeated; to repeat it, delete the
file and run the study again.
"""


def make_pages(raw: pathlib.Path, output: pathlib.Path) -> list[pathlib.Path]:
    """Writes an index, and one page and one plot for each study that has final results; returns the pages."""
    output.mkdir(parents=True, exist_ok=True)
    pages, rows, collected, full_rate, by_name, finished, titles = [], [], {}, {}, {}, {}, {}
    for file in sorted(STUDIES.glob("*.py")):
        study = load_study(file)
        if study is None:
            continue
        found = load_results(raw / study.name)
        methods, titles[study.name] = results.collect(study, found), study.title
        collected[study.title] = by_name[study.name] = methods
        full_rate[study.title] = results.collect(study, load_results(raw / f"{study.name}_full_rate"))
        link = "no results yet"
        if methods:
            page = output / f"{study.name}.md"
            write_atomic(page, results.page(study, found, f"configs/studies/{file.name}"))
            results_plots.plot(study, found, output / f"{study.name}.svg")
            results_plots.plot_gate(study, found, output / f"{study.name}_gate.svg")
            pages.append(page)
            link = f"[results]({page.name})"
        done = sum(len(method.runs) for method in methods)
        total = len(study.grids) * len(study.seeds) * len(study.data)
        rows.append(f"| {study.title} (`{file.name}`) | {done} of {total} | {link} |")
        if done == total and "gap" in study.grids and study.name not in _NOT_IN_OVERVIEW:
            finished[study.title] = methods
    index = output / "README.md"
    overview, rates = _make_overview(finished, output), _classifier_rates(collected, full_rate)
    curves = _make_curves([by_name.get(name, []) for name in _CURVE_STUDIES], output)
    weight_decay, recipe = _make_tuning(by_name, titles)
    texts = {"overview": overview, "curves": curves, "weight_decay": weight_decay, "recipe": recipe, "rates": rates}
    write_atomic(index, _INDEX.format(rows="\n".join(rows), **texts))
    return [index, *pages]


def _make_overview(finished: Collected, output: pathlib.Path) -> str:
    """Writes the picture that compares the studies, and returns the text around it; an empty string without results."""
    if not finished:
        return ""
    finished = dict(sorted(finished.items(), key=lambda item: -len(item[1])))  # those with most methods come first
    results_plots.plot_overview(finished, output / "overview.svg")
    return _OVERVIEW.format(table=results.overview(finished))


def _make_curves(studies: Sequence[Sequence[results.MethodResults]], output: pathlib.Path) -> str:
    """Draws the learning curves and returns the text around them; an empty string if a study has no results."""
    if not all(studies):
        return ""
    sizes = {methods[0].runs[0]["train_images"]: methods for methods in studies}
    results_plots.plot_learning_curves(sizes, output / "learning_curves.svg")
    return _CURVES.format(table=results.learning_curves(sizes))


def _make_tuning(by_name: Mapping[str, Sequence[results.MethodResults]], titles: Mapping[str, str]) -> tuple[str, str]:
    """Returns the section about a tuned weight decay, empty without results, and what the protocol says about it."""
    tables = []
    for fixed, tuned in _TUNED_STUDIES.items():
        if by_name.get(fixed) and by_name.get(tuned):
            table = results.tuning(by_name[fixed], by_name[tuned])
            tables.append(f"{titles[fixed]} ([fixed]({fixed}.md), [tuned]({tuned}.md)):\n\n{table}")
    if not tables:
        return "", "- All methods have a momentum of 0.9 and a weight decay of 10⁻⁴, which were not tuned."
    recipe = "- Momentum is 0.9 for all methods and was not tuned. Some studies tune the [weight decay](#weight-decay)."
    return _WEIGHT_DECAY.format(tables="\n".join(tables)), recipe


def _classifier_rates(collected: Collected, full_rate: Collected) -> str:
    """Returns a table of the errors with the full rate of the classifier, the chosen errors, and their differences."""
    titles = [title for title in collected if full_rate[title]]
    if not titles:
        return "There are no results yet.\n"
    columns = [column for title in titles for column in (f"{title}: full rate", "as chosen", "difference")]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(method.method for title in titles for method in full_rate[title]):
        cells = []
        for title in titles:
            chosen, full = ({m.method: m for m in found[title]}.get(name) for found in (collected, full_rate))
            if chosen is None:  # its final runs are not finished
                cells += ["–"] * 3
                continue
            split = next(iter(chosen.errors))
            errors = [results.spread(list(method.errors[split].values())) for method in (full or chosen, chosen)]
            cells += [*errors, results.interval(results.difference(chosen, full, split) if full else None)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def write_readme(readme: pathlib.Path, index: pathlib.Path) -> None:
    """Copies the table of all studies from the index into the README.

    Raises:
      UserError: if the README lacks the lines between which the table belongs.
    """
    table = index.read_text("utf-8").partition(_TABLE_MARK)[2].partition("\n\n")[0]
    before, start, rest = readme.read_text("utf-8").partition(_README_MARKS[0])
    _, end, after = rest.partition(_README_MARKS[1])
    if not start or not end:
        raise UserError(
            f"{readme} lacks the lines {_README_MARKS[0].strip()} and {_README_MARKS[1].strip()}; add them where the"
            " table belongs"
        )
    write_atomic(readme, f"{before}{start}{table}\n{end}{after}")


def main() -> None:
    """Parses the command line and writes the pages."""
    parser = ArgumentParser(description="Makes the pages of docs/results from the raw results of the studies.")
    parser.add_argument(
        "--results", type=pathlib.Path, default=ROOT / "results", help="folder of the raw results (default: results)"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=_DOCS, help="folder of the pages (default: docs/results)"
    )
    options = parser.parse_args()
    pages = make_pages(options.results, options.output)
    for page in pages:
        print(page)
    if options.output == _DOCS:
        write_readme(ROOT / "README.md", pages[0])


if __name__ == "__main__":
    sys.exit(run_command(main))
