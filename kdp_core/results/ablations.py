"""Ablations: the variants, points and numbers of one study of the KDP paper, for tables and figures.

Tables 3, 4, 9 and 11 and Figures 6, 7 and 8 of the paper (Ma et al., ICLR 2026) are ablations. Each of these tables and
figures compares a few scores of variants that differ in one quantity. The paper reports no standard errors. In our
tables every score has a standard error, and the dense model is shown as well. This module uses two tables, the summary
and the scores of single tasks, and loads no model.

Table 11 reports retained performance in two ways: relative to the dense model (`rp`), and relative to the standard
calibration set (`rp_reference`). The reference is the ablation's first point. If every variant is drawn as a separate
line, the reference of each variant is its own first point.
"""
import itertools
import math
from typing import Any, Literal, NamedTuple

import pandas as pd

from kdp_core.results import tables
from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column
from kdp_core.results.marks import NOTE
from kdp_core.results.summary import retained
from kdp_core.score.metrics import PRIMARY

REFERENCE = "rp_reference"
METRICS = (*(name for name, column in COLUMNS.items() if column.better), REFERENCE)
"""Metrics of a whole point, other than the metrics of a single task."""

OPTIONS = {
    "kernel.features": Column("Kernel size 2m", "", "Number of features of the lift.", 0),
    "kernel.epochs": Column("Epochs of step 1", "", "Passes over the training tokens.", 0),
    "inverse.epochs": Column("Epochs of step 2", "", "Passes over the training tokens.", 0),
    "inverse.width": Column("Hidden width of step 2", "", "Width of the two-layer network.", 0),
    "block.clusters": Column("Clusters of layers", "", "Number of clusters into which LoRP sorts the layers.", 0),
}
"""Headings of the options that ablations vary. The heading of any other option is its own name."""
OTHERS = {
    "k_max": Column("K max", "", "Layers of context of a block.", 0),
    "tokens": Column("Calibration tokens", "", "Number of sequences times their length.", 0),
    "method": Column("Variant", "", "Variant under `methods:` in the configuration."),
    REFERENCE: Column("Retained of first", "%", "Mean accuracy as a percentage of the first point's.", 1, 1, 1,
                      f"{REFERENCE}_stderr"),
}
"""Columns that the summary does not contain, or contains under other headings."""
QUANTITIES = {"ratio": "params_removed", "variant": "method", "k_max": "k_max", "tokens": "tokens"}
"""Quantities for the axis, besides options -> the column with their values. For `variant` the column contains the names
of the variants. For `ratio` the column contains the share of parameters that was measured after pruning."""


class AblationError(ValueError):
    """The variants, points or metrics of an ablation cannot be shown in one table."""


class Ablation(NamedTuple):
    """One study: the quantity on the axis, the points that are compared, and the metrics."""
    name: str
    title: str
    x: list[str]
    """What is on the axis: `ratio`, `k_max`, `tokens`, `variant`, or options of the variants, written as step.option.
    If `x` contains several options, a figure has one line for each option. If a variant differs from the first variant
    in one option, the variant is a point on the line of this option. The first variant is a point on all lines."""
    metrics: list[str]
    """Names of columns of the summary, `rp_reference`, or names of tasks: `task` stands for the main metric of the
    task, `task:metric` for one metric."""
    points: list[dict[str, Any]]
    """The keys of every point, in order: model, calib, method, ratio, k_max. The first point is the reference."""
    settings: dict[str, dict[str, Any]]
    """For each variant, its values of the options that are named in `x`."""
    tokens: dict[str, int]
    """Number of tokens of each calibration set."""


class Gathered(NamedTuple):
    """The numbers of one ablation."""
    ablation: Ablation
    frame: pd.DataFrame
    """For each model, the row of the dense model comes first. The rows of the points follow, sorted by ratio and then
    in the given order.

    Each axis has one column. Each metric has one column for its value and one column for its standard error.
    """
    columns: dict[str, Column]
    """For each column of an axis or metric: its heading, its number format, and its meaning."""
    axes: list[str]
    """Names of the columns for the entries of `x`, in the order of `x`."""


def gather(summary: pd.DataFrame, scores: pd.DataFrame, ablation: Ablation) -> Gathered:
    """Collect the points of an ablation from the results of summary.summarise and summary.tidy, as read from their CSV
    files.

    Raises AblationError for an ablation without points, for options of variants next to other axes, for a point that
    the summary lacks, and for an unknown metric. Also raises AblationError for a variant that does not set an option of
    `x`, or that differs from the first variant in several options of `x`.
    """
    _check(ablation)
    frame = _points(summary, ablation)
    columns = {**COLUMNS, **OTHERS}
    axes = [QUANTITIES.get(name, name) for name in ablation.x]
    for name in ablation.x:
        if name not in QUANTITIES:
            values = {variant: _plain(ablation.settings[variant][name]) for variant in variants_of(ablation)}
            whole = all(isinstance(value, int) for value in values.values())
            columns[name] = OPTIONS.get(name, Column(name, "", "Option of the variant.", 0 if whole else 4))
            frame[name] = [values.get(variant, math.nan) for variant in frame["method"]]
    if "tokens" in ablation.x:
        frame["tokens"] = [ablation.tokens[row.calib] if row.method != DENSE else math.nan
                           for row in frame.itertuples()]
    for metric in ablation.metrics:
        if metric == REFERENCE:
            # variants on the axis have one common reference; if a variant is a line, it has its own reference
            along_variants = any(name == "variant" or name not in QUANTITIES for name in ablation.x)
            frame = _against_first(frame, ["model", frame["method"] == DENSE] if along_variants
                                   else ["model", "method"])
        elif metric not in METRICS:
            frame, columns[metric] = with_task(frame, scores, metric)
    return Gathered(ablation, frame, columns, axes)


def _plain(value: Any) -> int | float | str:
    """The value of an option. Numbers are returned unchanged, other values as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _check(ablation: Ablation) -> None:
    if not ablation.points:
        raise AblationError(f"ablation {ablation.name} has no points; name its variants under `rows`")
    options = [name for name in ablation.x if name not in QUANTITIES]
    if len(ablation.x) > 1 and len(options) < len(ablation.x):
        raise AblationError(f"ablation {ablation.name} has the axes {', '.join(ablation.x)}; several axes must all be "
                            "options of the variants, as step.option")
    variants = variants_of(ablation)
    for variant, name in itertools.product(variants, options):
        if name not in ablation.settings.get(variant, {}):
            raise AblationError(f"ablation {ablation.name}: variant {variant} does not set {name}; add it to the "
                                "variant")
    for variant in variants:
        if len(options) > 1 and not lines_of(ablation, variant):
            raise AblationError(f"ablation {ablation.name}: variant {variant} differs from {variants[0]} in more than "
                                f"one of {', '.join(options)}; vary one option at a time")


def variants_of(ablation: Ablation) -> list[str]:
    """The variants of an ablation, in order."""
    return list(dict.fromkeys(point["method"] for point in ablation.points))


def lines_of(ablation: Ablation, variant: str) -> list[str]:
    """The options of `x` on whose lines the variant is a point. The variants on the line of an option differ from the
    first variant at most in this option."""
    if len(ablation.x) == 1:
        return list(ablation.x)
    own, first = ablation.settings[variant], ablation.settings[variants_of(ablation)[0]]
    return [name for name in ablation.x if all(own[other] == first[other] for other in ablation.x if other != name)]


def _points(summary: pd.DataFrame, ablation: Ablation) -> pd.DataFrame:
    """The rows of the summary that the ablation shows: the rows of its points and of their dense models."""
    place = {tuple(row): index for index, *row in summary[list(KEYS)].itertuples()}
    chosen = []
    for model in dict.fromkeys(point["model"] for point in ablation.points):
        chosen += list(summary.index[(summary["model"] == model) & (summary["method"] == DENSE)])
        # sorted by ratio, because tables are grouped by ratio; points of equal ratio stay in the given order
        own = sorted((p for p in ablation.points if p["model"] == model), key=lambda point: float(point["ratio"]))
        for point in own:
            key = (point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"]))
            if key not in place:
                raise AblationError(f"ablation {ablation.name}: the summary lacks {'/'.join(map(str, key))}; run the "
                                    "workflow for this point first")
            chosen.append(place[key])
    return summary.loc[chosen].reset_index(drop=True)


def _against_first(frame: pd.DataFrame, alike: list[Any]) -> pd.DataFrame:
    """Add a column with the share of the first point's accuracy that each point retains.

    Rows with equal values in the columns `alike` form a group. Each row is compared with the first point of its
    group. The standard error excludes the uncertainty of the first point's own accuracy.
    """
    reference = frame.groupby(alike)["acc"].transform("first").where(frame["method"] != DENSE)
    return frame.assign(**{name: [retained(value, base) for value, base in zip(frame[source], reference, strict=True)]
                           for name, source in ((REFERENCE, "acc"), (f"{REFERENCE}_stderr", "acc_stderr"))})


# One task's own score -------------------------------------------------------------------------------------------------

def with_task(frame: pd.DataFrame, scores: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, Column]:
    """Add the columns <metric> and <metric>_stderr of one task to the frame. `metric` is `task` or `task:metric`."""
    task, _, wanted = metric.partition(":")
    has = scores[(scores["task"] == task) & (scores["task"] != "efficiency")]
    if has.empty:
        tasks = sorted(set(scores["task"]) - {"efficiency"})
        raise AblationError(f"unknown metric {metric!r}; choose among {', '.join([*METRICS, *tasks])}")
    name = wanted or _main(task, set(has["metric"]))
    own = has[has["metric"] == name]
    if own.empty:
        raise AblationError(f"task {task} has no metric {name!r}; it has {', '.join(sorted(set(has['metric'])))}")
    share, stderr = (own["unit"] == "share").all(), f"{metric}_stderr"
    smaller = own["unit"].isin(("ppl", "bits/byte")).all()
    column = Column(metric, "%" if share else "", f"{name} of {task}.", 1 if share else 2, 100 if share else 1,
                    -1 if smaller else 1, stderr, (name, task))
    named = own[[*KEYS, "value", "stderr"]].rename(columns={"value": metric, "stderr": stderr})
    return frame.merge(named, on=list(KEYS), how="left"), column


def _main(task: str, metrics: set[str]) -> str:
    """The main metric of a task: the first metric in PRIMARY that was measured for this task."""
    for known in (name for kind in PRIMARY.values() for name in kind):
        if known in metrics:
            return known
    raise AblationError(f"task {task} has no main metric; name one as {task}:metric from {', '.join(sorted(metrics))}")


# For print ------------------------------------------------------------------------------------------------------------

def shown(gathered: Gathered) -> list[str]:
    """The columns of an ablation's table: the varied quantity, the removed share, and every metric."""
    own = [name for name in gathered.axes if name not in (*KEYS, "params_removed")]
    names = [*own, "params_removed", *(["blocks"] if "k_max" in gathered.axes else []), *gathered.ablation.metrics]
    return list(dict.fromkeys(names))


def render(gathered: Gathered, format: Literal["csv", "md", "tex"],
           comparisons: pd.DataFrame | None = None) -> str:
    """An ablation as the text of a table, made by tables.render. The table has the columns of `shown` and the standard
    errors."""
    return tables.render(gathered.frame, format, columns=shown(gathered), known=gathered.columns,
                         caption=gathered.ablation.title, label=f"tab:{gathered.ablation.name}",
                         comparisons=comparisons, note=NOTE)


def kept(gathered: Gathered) -> list[str]:
    """The columns that a figure of the ablation shows, and their standard errors. The CSV file of the figure contains
    these columns."""
    metrics = [column for name in gathered.ablation.metrics for column in (name, gathered.columns[name].stderr)]
    return list(dict.fromkeys([*KEYS, "params_removed", *gathered.axes, *filter(None, metrics)]))
