"""Ablations: the rows, points and numbers of one study of the KDP paper, ready to print and to draw.

Tables 3, 4, 9 and 11 and Figures 6, 7 and 8 of the paper (Ma et al., ICLR 2026) are all of one kind: some rows of the
grid, one quantity that differs between them, some scores. Where the paper gives points and bars alone, every score
here has its standard error and the dense model stands beside it. Reads the summary and the tidy scores only; no model
is touched.

Table 11 has two kinds of retained performance: against the dense model (`rp`) and against the standard calibration
set (`rp_reference`: against the ablation's first point, or the row's own first where rows are lines).
"""
import math
from typing import Any, Literal, NamedTuple

import pandas as pd

from kdp_core.results import tables
from kdp_core.results.tables import COLUMNS, DENSE, KEYS, Column, retained

REFERENCE = "rp_reference"
METRICS = (*(name for name, column in COLUMNS.items() if column.better), REFERENCE)
"""Metrics that are no task's own."""

OPTIONS = {
    "kernel.features": Column("Kernel size 2m", "", "Features of the lift.", 0),
    "kernel.epochs": Column("Epochs of step 1", "", "Passes over the training tokens.", 0),
    "inverse.epochs": Column("Epochs of step 2", "", "Passes over the training tokens.", 0),
    "inverse.width": Column("Hidden width of step 2", "", "Of the two-layer network.", 0),
    "block.clusters": Column("Clusters of layers", "", "That LoRP sorts the layers into.", 0),
}
"""Headings of options that ablations vary; any other option is printed under its own name."""
OTHERS = {
    "k_max": Column("K max", "", "Layers of context of a block.", 0),
    "tokens": Column("Calibration tokens", "", "Sequences times their length.", 0),
    "method": Column("Row", "", "Row of methods in the config."),
    REFERENCE: Column("Retained of first", "%", "Mean accuracy as a percentage of the first point's.", 1, 1, 1,
                      f"{REFERENCE}_stderr"),
}
QUANTITIES = {"ratio": "params_removed", "row": "method", "k_max": "k_max", "tokens": "tokens"}
"""What may stand on the axis besides options, and the column that holds it: of the ratio the share really removed."""


class AblationError(ValueError):
    """An ablation whose rows, points or metrics do not make a table."""


class Ablation(NamedTuple):
    """One study: what is on the axis, for which points, judged by what."""
    name: str
    title: str
    x: list[str]
    """`ratio`, `k_max`, `tokens`, `row`, or options of the rows as step.option. With several options a row lies on the
    line of the one in which it differs from the first row; the first row lies on all lines."""
    metrics: list[str]
    """Columns of the summary, `rp_reference`, or tasks: `task` by its main metric, or `task:metric`."""
    points: list[dict[str, Any]]
    """Keys of every point, in order: model, calib, method, ratio, k_max. The first is the reference."""
    settings: dict[str, dict[str, Any]]
    """For each row, the values of the options in `x`."""
    tokens: dict[str, int]
    """Tokens of each calibration set."""


class Gathered(NamedTuple):
    """The numbers of one ablation."""
    ablation: Ablation
    frame: pd.DataFrame
    """Dense rows first within their model, then the points by ratio, else in their order; a column an axis and a
    metric, with stderr."""
    columns: dict[str, Column]
    """How each column of axes and metrics is printed and read."""
    axes: list[str]
    """The column of each entry of `x`."""


def gather(summary: pd.DataFrame, scores: pd.DataFrame, ablation: Ablation) -> Gathered:
    """The points of an ablation from tables.summarise and tables.tidy, as read from their CSV files.

    Raises AblationError for a point that the summary lacks, an unknown metric, an option that a row does not set, or
    a row that differs from the first in two of several options.
    """
    _check(ablation)
    frame = _points(summary, ablation)
    columns = {**COLUMNS, **OTHERS}
    axes = [QUANTITIES.get(name, name) for name in ablation.x]
    for name in ablation.x:
        if name not in QUANTITIES:
            values = {row: _plain(ablation.settings[row][name]) for row in rows_of(ablation)}
            whole = all(isinstance(value, int) for value in values.values())
            columns[name] = OPTIONS.get(name, Column(name, "", "Option of the row.", 0 if whole else 4))
            frame[name] = [values.get(row, math.nan) for row in frame["method"]]
    if "tokens" in ablation.x:
        frame["tokens"] = [ablation.tokens[row.calib] if row.method != DENSE else math.nan
                           for row in frame.itertuples()]
    for metric in ablation.metrics:
        if metric == REFERENCE:
            # rows on the axis have one reference, rows of their own lines have each their own
            along_rows = any(name == "row" or name not in QUANTITIES for name in ablation.x)
            frame = _against_first(frame, ["model", frame["method"] == DENSE] if along_rows else ["model", "method"])
        elif metric not in METRICS:
            frame, columns[metric] = with_task(frame, scores, metric)
    return Gathered(ablation, frame, columns, axes)


def _plain(value: Any) -> int | float | str:
    """An option's value: a number if it is one, its name if not."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _check(ablation: Ablation) -> None:
    if not ablation.points:
        raise AblationError(f"ablation {ablation.name} has no points; name its rows")
    options = [name for name in ablation.x if name not in QUANTITIES]
    if len(ablation.x) > 1 and len(options) < len(ablation.x):
        raise AblationError(f"ablation {ablation.name}: x {', '.join(ablation.x)}: several axes must all be options of "
                            f"rows, as step.option")
    for row, name in ((row, name) for row in rows_of(ablation) for name in options):
        if name not in ablation.settings.get(row, {}):
            raise AblationError(f"ablation {ablation.name}: row {row} does not set {name}; write it into the row")
    for row in rows_of(ablation):
        if len(options) > 1 and not lines_of(ablation, row):
            raise AblationError(f"ablation {ablation.name}: row {row} differs from {rows_of(ablation)[0]} in more than "
                                f"one of {', '.join(options)}; vary one at a time")


def rows_of(ablation: Ablation) -> list[str]:
    """The rows of the config in an ablation, in order."""
    return list(dict.fromkeys(point["method"] for point in ablation.points))


def lines_of(ablation: Ablation, row: str) -> list[str]:
    """The axes of `x` on whose line a row lies: those that alone may differ from the first row."""
    if len(ablation.x) == 1:
        return list(ablation.x)
    own, first = ablation.settings[row], ablation.settings[rows_of(ablation)[0]]
    return [name for name in ablation.x if all(own[other] == first[other] for other in ablation.x if other != name)]


def _points(summary: pd.DataFrame, ablation: Ablation) -> pd.DataFrame:
    """The summary's rows of the dense models and of the ablation's points."""
    place = {tuple(row): index for index, *row in summary[list(KEYS)].itertuples()}
    chosen = []
    for model in dict.fromkeys(point["model"] for point in ablation.points):
        chosen += list(summary.index[(summary["model"] == model) & (summary["method"] == DENSE)])
        # by ratio, as tables are grouped, else in their own order
        own = sorted((p for p in ablation.points if p["model"] == model), key=lambda point: float(point["ratio"]))
        for point in own:
            key = (point["model"], point["calib"], point["method"], float(point["ratio"]), int(point["k_max"]))
            if key not in place:
                raise AblationError(f"ablation {ablation.name}: the summary lacks {'/'.join(map(str, key))}; run the "
                                    "workflow for this point first")
            chosen.append(place[key])
    return summary.loc[chosen].reset_index(drop=True)


def _against_first(frame: pd.DataFrame, alike: list[Any]) -> pd.DataFrame:
    """With the accuracy retained of the first of the points that are `alike`, held fixed in the standard error."""
    reference = frame.groupby(alike)["acc"].transform("first").where(frame["method"] != DENSE)
    return frame.assign(**{name: [retained(value, base) for value, base in zip(frame[source], reference, strict=True)]
                           for name, source in ((REFERENCE, "acc"), (f"{REFERENCE}_stderr", "acc_stderr"))})


# One task's own score -------------------------------------------------------------------------------------------------

def with_task(frame: pd.DataFrame, scores: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, Column]:
    """With the columns <metric> and <metric>_stderr of one task, `task` by its main metric or `task:metric`."""
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
    """A task's main metric: the first of its kind that it has."""
    for known in (name for kind in tables.PRIMARY.values() for name in kind):
        if known in metrics:
            return known
    raise AblationError(f"task {task} has no main metric; name one as {task}:metric from {', '.join(sorted(metrics))}")


# For print ------------------------------------------------------------------------------------------------------------

def shown(gathered: Gathered) -> list[str]:
    """The columns of an ablation's table: what varies, what was removed, every metric."""
    own = [name for name in gathered.axes if name not in (*KEYS, "params_removed")]
    names = [*own, "params_removed", *(["blocks"] if "k_max" in gathered.axes else []), *gathered.ablation.metrics]
    return list(dict.fromkeys(names))


def render(gathered: Gathered, format: Literal["csv", "md", "tex"],
           comparisons: pd.DataFrame | None = None) -> str:
    """An ablation as text, by tables.render: what varies, what was removed, every metric with its standard error."""
    return tables.render(gathered.frame, format, columns=shown(gathered), known=gathered.columns,
                         caption=gathered.ablation.title, label=f"tab:{gathered.ablation.name}",
                         comparisons=comparisons, note=tables.NOTE)


def kept(gathered: Gathered) -> list[str]:
    """The columns that a figure of the ablation shows, errors in, for the CSV file beside it."""
    metrics = [column for name in gathered.ablation.metrics for column in (name, gathered.columns[name].stderr)]
    return list(dict.fromkeys([*KEYS, "params_removed", *gathered.axes, *filter(None, metrics)]))
