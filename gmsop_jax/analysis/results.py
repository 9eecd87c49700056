"""Pages of results: the tables and sentences about a study, made only from its raw results."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from gmsop_jax.analysis.study import Study, short_form
from gmsop_jax.errors import ConfigError

Results = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The mean over `count` runs and their standard deviation (n − 1), which is NaN for a single run."""

    mean: float
    deviation: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Returns the estimate from one value for each run."""
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(statistics.mean(values), deviation, len(values))

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % confidence interval, by Student's t; NaN for a single value.

        Example:
          >>> round(Estimate.of([1.0, 2.0, 3.0]).half_width, 3)
          2.484
        """
        if self.count < 2:
            return float("nan")
        return float(scipy.stats.t.ppf(0.975, self.count - 1)) * self.deviation / self.count**0.5


@dataclasses.dataclass(frozen=True)
class MethodResults:
    """The final runs of one method, for each seed that has a run on every data set of the study.

    `point` has the chosen hyperparameters. `errors` has the errors in percent by split, and then by seed and data set.
    """

    method: str
    point: tuple[str, ...]
    errors: Mapping[str, Mapping[tuple[int, str], float]]
    runs: Results


def collect(study: Study, results: Results, metric: str = "balanced_error") -> list[MethodResults]:
    """Returns the finished final runs of each method that has any.

    Runs without test splits served only to choose hyperparameters. The metric is `balanced_error` or `top1_error`.

    Raises:
      ConfigError: if the final runs of a method have different hyperparameters.
    """
    final = [result for result in results if all(split in result["splits"] for split in study.test_splits)]
    collected = []
    for method in study.grids:
        own = [result for result in final if result["method"] == method]
        points = sorted({", ".join(map(short_form, result["point"])) for result in own})
        if len(points) > 1:
            raise ConfigError(
                f"the final runs of {method} in results/{study.name} have different hyperparameters"
                f" ({'; '.join(points)}); delete the files of those that are no longer chosen"
            )
        by_key = {(result["seed"], result["data"]): result for result in own}
        keys = [[(seed, data.name) for data in study.data] for seed in study.seeds]
        runs = {key: by_key[key] for of_seed in keys if by_key.keys() >= set(of_seed) for key in of_seed}
        if not runs:
            continue
        errors = {
            split: {key: run["splits"][split][metric] for key, run in runs.items()} for split in study.test_splits
        }
        collected.append(MethodResults(method, tuple(own[0]["point"]), errors, list(runs.values())))
    return collected


def difference(method: MethodResults, reference: MethodResults, split: str) -> Estimate | None:
    """Returns the difference between two methods over the seeds and data sets of both, or None if they share none."""
    own, other = method.errors[split], reference.errors[split]
    paired = [own[key] - other[key] for key in own if key in other]
    return Estimate.of(paired) if paired else None


def page(study: Study, results: Results, config_file: str) -> str:
    """Returns the Markdown page of a study; `config_file` is the path that the page shows in its command."""
    methods = collect(study, results)
    lines = [f"# {study.title}", "", study.notes.strip(), ""] if study.notes else [f"# {study.title}", ""]
    if not methods:
        return "\n".join([*lines, "There are no results yet.", ""])
    lines += [f"![Errors of each method]({study.name}.svg)", "", *_main_table(study, methods, results), ""]
    lines += [_reading(study, methods), ""]
    if len(methods[0].runs[0]["classes"]) == 2:
        lines += [*_two_class_table(study, methods), ""]
    if len(study.test_splits) > 1:
        lines += ["## Parts of the test images", "", *_split_table(study, methods), ""]
    if gated := gated_methods(study, methods):
        lines += ["## What the gate does", "", *_gate_table(study, gated), ""]
        if kinds(gated[0].runs[0]["classes"]):
            lines += [*_kind_table(study, gated), "", f"![Candidates by kind of image]({study.name}_gate.svg)", ""]
    lines += ["## How it was measured", "", *_provenance(study, methods, results, config_file), ""]
    return "\n".join(lines)


def _main_table(study: Study, methods: Sequence[MethodResults], results: Results) -> list[str]:
    split = study.test_splits[0]
    reference = next((method for method in methods if method.method == study.reference), None)
    lines = [
        f"| method | runs | balanced error | top-1 error | difference from {study.reference} | parameters | MMAC |"
        " s/epoch | chosen |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    top1 = {method.method: method for method in collect(study, _of(methods), "top1_error")}
    for method in methods:
        first = method.runs[0]
        delta = difference(method, reference, split) if reference and method is not reference else None
        chosen = ", ".join(map(short_form, method.point)) or "–"
        seconds = min(run["epoch_seconds"] for run in results if run["method"] == method.method and run["splits"])
        lines.append(
            f"| {method.method} | {len(method.errors[split])} | {spread(list(method.errors[split].values()))} |"
            f" {spread(list(top1[method.method].errors[split].values()))} | {interval(delta)} |"
            f" {first['parameters']:,} | {first['macs'] / 1e6:.2f} | {seconds:.1f} | {chosen} |"
        )
    return lines


def _two_class_table(study: Study, methods: Sequence[MethodResults]) -> list[str]:
    name = methods[0].runs[0]["classes"][1]
    lines = [
        f"The F1 score is the harmonic mean of precision and recall of the class *{name}*:",
        "",
        "| method | accuracy | F1 |",
        "|---|---|---|",
    ]
    for method in methods:
        counts = [np.array(run["splits"][study.test_splits[0]]["confusion"]) for run in method.runs]
        accuracies = [100 * float(np.trace(count) / count.sum()) for count in counts]
        scores = [100 * float(2 * count[1, 1] / (count[1].sum() + count[:, 1].sum())) for count in counts]
        lines.append(f"| {method.method} | {spread(accuracies)} | {spread(scores)} |")
    return lines


def _of(methods: Sequence[MethodResults]) -> list[Mapping[str, Any]]:
    return [run for method in methods for run in method.runs]


def _split_table(study: Study, methods: Sequence[MethodResults]) -> list[str]:
    splits = study.test_splits[1:]
    lines = [
        "The table shows the balanced error on [parts of the test images](../data.md#data-sets-of-the-studies).",
        "",
        f"| method | {' | '.join(splits)} |",
        "|---" * (len(splits) + 1) + "|",
    ]
    for method in methods:
        cells = [spread(list(method.errors[split].values())) for split in splits]
        lines.append(f"| {method.method} | {' | '.join(cells)} |")
    return lines


def _gate_table(study: Study, methods: Sequence[MethodResults]) -> list[str]:
    split = study.test_splits[0]
    lines = [
        "The mutual information of an image's class and its selected candidates is 0 bits for a gate that treats all",
        "classes alike. The entropy of an image's weights is log₂ K if its K selected candidates have equal weights.",
        "The entropy of the use of the candidates is log₂ N if all N candidates are used equally often. Values are",
        "means over the runs.",
        "",
        "| method | information about the class | entropy of an image's weights | entropy of the use |",
        "|---|---|---|---|",
    ]
    for method in methods:
        measured = [run["splits"][split] for run in method.runs]
        information, entropy = (
            statistics.mean(values) for values in zip(*map(_gate_information, measured), strict=True)
        )
        weights = statistics.mean(one["gate_entropy"] for one in measured)
        lines.append(f"| {method.method} | {information:.3f} bits | {weights:.2f} bits | {entropy:.2f} bits |")
    return lines


def _kind_table(study: Study, methods: Sequence[MethodResults]) -> list[str]:
    """How much the candidates say about the kind of an image, for a study with several kinds of images."""
    split = study.test_splits[0]
    lines = [
        "The classes belong to several kinds of images. If the gate never selected the same candidate for two kinds,",
        "its information about the kind would equal the entropy of the kind, which depends on the numbers of images.",
        f"The figure shows, for seed {study.seeds[0]}, which share of the weights of each kind's images each candidate",
        "receives. The candidates are in no particular order.",
        "",
        "| method | information about the kind | entropy of the kind |",
        "|---|---|---|",
    ]
    for method in methods:
        information, entropy = [], []
        for run in method.runs:
            use = use_by_kind(run, split)
            joint = np.array(list(use.values())) / sum(row.sum() for row in use.values())
            information.append(_mutual_information(joint))
            entropy.append(_entropy(joint.sum(1)))
        lines.append(
            f"| {method.method} | {_mean_and_spread(information)} bits | {statistics.mean(entropy):.3f} bits |"
        )
    return lines


def _mean_and_spread(values: Sequence[float]) -> str:
    estimate = Estimate.of(values)
    return f"{estimate.mean:.3f}" + (f" ± {estimate.deviation:.3f}" if estimate.count > 1 else "")


def gated_methods(study: Study, methods: Sequence[MethodResults]) -> list[MethodResults]:
    """Returns the methods that have a gate."""
    return [method for method in methods if "gate_use" in method.runs[0]["splits"][study.test_splits[0]]]


def kinds(classes: Sequence[str]) -> list[str]:
    """Returns the kind of each class, if the classes belong to several kinds, as those of the source `domains` do.

    Example:
      >>> kinds(["elpv/defective", "emoji/flags"]), kinds(["dress", "coat"])
      (['elpv', 'emoji'], [])
    """
    found = [kind for kind, slash, _ in (name.partition("/") for name in classes) if slash]
    return found if len(found) == len(classes) and len(set(found)) > 1 else []


def use_by_kind(run: Mapping[str, Any], split: str) -> dict[str, np.ndarray]:
    """Returns the sums of the gate's weights over the images of each kind, [n] for each."""
    use, of_class = np.array(run["splits"][split]["gate_use"]), np.array(kinds(run["classes"]))
    return {kind: use[of_class == kind].sum(0) for kind in dict.fromkeys(of_class.tolist())}


def _gate_information(measured: Mapping[str, Any]) -> tuple[float, float]:
    """Returns the mutual information of class and candidate, and the entropy of the candidates' use, in bits."""
    joint = np.array(measured["gate_use"]) / np.sum(measured["gate_use"])
    return _mutual_information(joint), _entropy(joint.sum(0))


def _mutual_information(joint: np.ndarray) -> float:
    """The mutual information in bits of the rows and columns of a table of probabilities."""
    return _entropy(joint.sum(1)) + _entropy(joint.sum(0)) - _entropy(joint.ravel())


def _entropy(probabilities: np.ndarray) -> float:
    return float(-np.sum(probabilities * np.log2(np.where(probabilities > 0, probabilities, 1))))


def _reading(study: Study, methods: Sequence[MethodResults]) -> str:
    """One paragraph about which differences are larger than chance, computed from the results."""
    split = study.test_splits[0]
    reference = next((method for method in methods if method.method == study.reference), None)
    if reference is None:
        return f"There is no result for {study.reference} yet, so the methods can't be compared."
    groups: dict[str, list[str]] = {"better": [], "worse": [], "open": []}
    for method in methods:
        delta = difference(method, reference, split) if method is not reference else None
        if delta is not None:
            sure = delta.count > 1 and abs(delta.mean) > delta.half_width
            groups["open" if not sure else "better" if delta.mean < 0 else "worse"].append(method.method)
    sentences = [
        f"Compared with {study.reference} in runs with the same {_pairing(study)}, the 95 % interval of the difference"
        f" lies below 0 for {_listed(groups['better'])}, and above 0 for {_listed(groups['worse'])}.",
        f"It contains 0, or there are too few runs, for {_listed(groups['open'])}.",
        f"Even if no method differed from {study.reference}, about one interval in twenty would not contain 0.",
    ]
    return " ".join(sentences)


def _pairing(study: Study) -> str:
    names = ["seed"] * (len(study.seeds) > 1) + ["data set"] * (len(study.data) > 1)
    return " and ".join(names) or "seed"


def _choice(study: Study) -> str:
    sizes = sorted({len(points) for points in study.grids.values()})
    if sizes == [1]:
        return "The hyperparameters of each method were fixed in advance."
    return (
        "Hyperparameters were chosen by the balanced error on the split `val`, with the first\n"
        f"seed on the first data set, from {' or '.join(map(str, sizes))} points of a grid for each method."
    )


def _listed(names: Sequence[str]) -> str:
    *others, last = names or ["no method"]
    return f"{', '.join(others)} and {last}" if others else last


def _provenance(study: Study, methods: Sequence[MethodResults], results: Results, config_file: str) -> list[str]:
    runs = _of(methods)
    versions = sorted({", ".join(f"{name} {value}" for name, value in run["versions"].items()) for run in runs})
    hours = sum(result.get("wall_seconds", 0) for result in results) / 3600
    return [
        "The error is that after the last epoch on the test images, which were used for nothing else. The balanced",
        "error is the mean of the errors of the classes. Values are mean ± standard deviation over runs. Differences",
        f"are in percentage points and paired by {_pairing(study)}, with 95 % intervals by Student's t that treat the",
        f"pairs as independent. {_choice(study)}",
        "Seconds per epoch are those of the fastest run of each method, because other jobs ran on the machine.",
        "[Results](README.md#protocol) describes the methods.",
        "",
        f"- Command: `python tools/sweep.py {config_file}`, then `python tools/results.py`",
        f"- Runs: {len(results)} in {hours:.1f} hours, of which {len(runs)} were measured on the test images and"
        f" {sum('diverged' in result for result in results)} diverged",
        f"- Training images: {', '.join(sorted({str(run['train_images']) for run in runs}))}",
        f"- Device: {', '.join(sorted({run['device'] for run in runs}))}",
        f"- Commits: {', '.join(sorted({run['commit'] for run in runs}))}",
        f"- Versions: {'; '.join(versions)}",
        f"- Raw results: `results/{study.name}/`",
    ]


def spread(values: Sequence[float]) -> str:
    """Formats mean ± standard deviation.

    Example:
      >>> spread([1.0, 2.0, 3.0])
      '2.00 ± 1.00 %'
    """
    estimate = Estimate.of(values)
    return f"{estimate.mean:.2f}" + (f" ± {estimate.deviation:.2f}" if estimate.count > 1 else "") + " %"


def interval(delta: Estimate | None) -> str:
    """Formats a difference with its 95 % interval; a dash for none."""
    if delta is None:
        return "–"
    if delta.count < 2:
        return f"{delta.mean:+.2f}"
    return f"{delta.mean:+.2f} [{delta.mean - delta.half_width:+.2f}, {delta.mean + delta.half_width:+.2f}]"


COMPARED = (
    "gap", "gap_wide", "srsop", "parametric_srsop", "dropcov", "avesop", "gmgap", "gmsop", "gmsop_all_selected",
)  # fmt: skip


def overview(collected: Mapping[str, Sequence[MethodResults]]) -> str:
    """Returns a Markdown table of balanced errors, with a column for each study and a row for each method.

    The cost of a method is that in the first study that has the method. A dash means that a study does not have it.

    Args:
      collected: for each title of a study, what `collect` returns.
    """
    lines = [f"| method | parameters | MMAC | {' | '.join(collected)} |", "|---" * (len(collected) + 3) + "|"]
    for name in COMPARED:
        found = [by_name(methods).get(name) for methods in collected.values()]
        cells = [spread(list(next(iter(method.errors.values())).values())) if method else "–" for method in found]
        cost = next((method.runs[0] for method in found if method), None)
        if cost is None:
            continue
        lines.append(f"| {name} | {cost['parameters']:,} | {cost['macs'] / 1e6:.2f} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def by_name(methods: Sequence[MethodResults]) -> dict[str, MethodResults]:
    """Returns the results of each method by its name."""
    return {method.method: method for method in methods}


def learning_curves(sizes: Mapping[int, Sequence[MethodResults]]) -> str:
    """Returns a Markdown table of the balanced errors of methods by number of training images.

    Except for average pooling itself, each cell also has the difference from it, with its 95 % interval.

    Args:
      sizes: for each number of training images, what `collect` returns. Only methods with at least two runs for every
        number are in the table.
    """
    lines = [f"| method | {' | '.join(f'{size:,} images' for size in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
    for name in in_all(sizes):
        cells = []
        for methods in map(by_name, sizes.values()):
            split, values = next(iter(methods[name].errors.items()))
            error = spread(list(values.values()))
            delta = interval(difference(methods[name], methods["gap"], split))
            cells.append(error if name == "gap" else f"{error}, {delta}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def in_all(sizes: Mapping[int, Sequence[MethodResults]]) -> list[str]:
    """Returns the methods that have at least two runs for every number of images."""
    counts = [{method.method for method in methods if len(method.runs) > 1} for methods in sizes.values()]
    return [method.method for method in next(iter(sizes.values())) if all(method.method in names for names in counts)]


def tuning(fixed: Sequence[MethodResults], tuned: Sequence[MethodResults]) -> str:
    """Returns a Markdown table that compares a study with its repetition in which one more hyperparameter is chosen.

    It contains the balanced errors in both studies, the choice, the difference between the studies, and the differences
    from average pooling in each of them.

    Args:
      fixed: the methods of the first study, from `collect`.
      tuned: those of the repetition, where the new hyperparameter is the last assignment of each point.
    """
    columns = "method", "fixed", "tuned", "chosen", "tuned − fixed", "difference from gap, fixed", "and tuned"
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    before = by_name(fixed)
    old_gap, new_gap = before.get("gap"), by_name(tuned).get("gap")
    for new in tuned:
        split, old = next(iter(new.errors)), before.get(new.method)
        errors = [spread(list(method.errors[split].values())) if method else "–" for method in (old, new)]
        deltas = [
            interval(difference(one, other, split) if one and other and one is not other else None)
            for one, other in ((new, old), (old, old_gap), (new, new_gap))
        ]
        chosen = short_form(new.point[-1]).partition("=")[2]
        lines.append(f"| {' | '.join([new.method, *errors, chosen, *deltas])} |")
    return "\n".join([*lines, ""])
