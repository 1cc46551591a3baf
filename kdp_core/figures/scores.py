"""Scores of variants against the share of parameters that is really removed.

Figures 6 and 7 of the KDP paper (Ma et al., ICLR 2026), with error bars. If a panel would have too many lines, the
lines are split into bands by what their methods do. Each band also shows the lines of the other bands, in pale grey.
All numbers come from kdp_core.results.summary; this module only draws the numbers.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    COLUMN_IN,
    GREY,
    PAGE_IN,
    PALE,
    Drawn,
    FigureError,
    Line,
    Looks,
    banded,
    deal,
    labels_of,
    lines_of,
    plain_log,
)
from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column, heading
from kdp_core.score.metrics import PRIMARY

ACROSS = 3
"""Largest number of panels side by side."""


def score_against_ratio(summary: pd.DataFrame, *, metrics: Sequence[str] = ("acc", "ppl"), looks: Looks | None = None,
                        width: float = PAGE_IN, height: float = 2.0) -> Drawn:
    """KDP's Figure 6: scores against the share of parameters that is really removed. Error bars show one standard
    error.

    There is one line for each variant, calibration set and K max. Each model has its own panels. A point at 0 % and a
    dotted line show the score of the dense model. Perplexities are on a logarithmic axis. `summary` comes from
    summary.summarise. Raises FigureError for an unknown metric and for a summary without pruned models.
    """
    unknown = [name for name in metrics if name not in COLUMNS or name not in summary]
    if unknown:
        raise FigureError(f"unknown metric {unknown[0]!r}; choose among {', '.join(COLUMNS)}")
    kept = [*KEYS, "params_removed", *(column for name in metrics for column in (name, COLUMNS[name].stderr) if column)]
    columns = {name: COLUMNS[name] for name in metrics}
    return _against(summary[kept].reset_index(drop=True), columns, looks, width, height, {})


def score_against_size(summary: pd.DataFrame, *, looks: Looks | None = None) -> Drawn:
    """The first figure of a report shows perplexity above accuracy. The figure fits the width of a printed column or of
    a phone."""
    return score_against_ratio(summary, metrics=("ppl", "acc"), looks=looks, width=COLUMN_IN, height=1.65)


def tasks_against_ratio(scores: pd.DataFrame, summary: pd.DataFrame, *, tasks: Sequence[str] | None = None,
                        looks: Looks | None = None, width: float = PAGE_IN, height: float = 1.8) -> Drawn:
    """KDP's Figure 7: the main metric of each task against the share of parameters that is really removed.

    Each task has a panel. `scores` come from summary.tidy. Raises FigureError for a task without a score, and if there
    are no scores.
    """
    metrics = [metric for kind in PRIMARY.values() for metric in kind]
    own = scores[scores["metric"].isin(metrics)]
    found = list(dict.fromkeys(own["task"]))
    if missing := [task for task in tasks or found if task not in found] or ([] if found else ["any"]):
        raise FigureError(f"task {missing[0]!r} has no score to draw; choose among {', '.join(found) or 'none'}")
    frame, columns = summary[[*KEYS, "params_removed"]].reset_index(drop=True), {}
    for task in tasks or found:
        part = own[own["task"] == task]
        metric = min(part["metric"], key=metrics.index)
        part = part[part["metric"] == metric]
        share = bool((part["unit"] == "share").all())
        columns[task] = Column(metric, "%" if share else "", f"{metric} of {task}.", 1 if share else 2,
                               100 if share else 1, -1 if metric in PRIMARY["ppl"] else 1, f"{task}_stderr")
        named = part[[*KEYS, "value", "stderr"]].rename(columns={"value": task, "stderr": f"{task}_stderr"})
        frame = frame.merge(named, on=list(KEYS), how="left")
    return _against(frame, columns, looks, width, height, {task: task for task in columns})


def _against(frame: pd.DataFrame, columns: Mapping[str, Column], looks: Looks | None, width: float, height: float,
             titles: Mapping[str, str]) -> Drawn:
    """Draw a panel for each model and column. The lines are split into as many bands as necessary.

    If `titles` is empty, the titles of the panels are the names of the models.
    """
    pruned, models = frame[frame["method"] != DENSE], sorted(frame["model"].unique())
    several = len(models) > 1
    if pruned.empty:
        raise FigureError("no pruned model in the summary; there is nothing to draw against the ratio")
    keys = list(dict.fromkeys(zip(pruned["method"], pruned["calib"], pruned["k_max"], strict=True)))
    label = labels_of(keys)
    lines = lines_of([(key[0], key[1:], label(key)) for key in keys], looks)
    # in a figure of one column, the panels are placed one above the other
    bands, across = deal(lines, looks), min(len(columns), ACROSS if width > COLUMN_IN else 1)
    down = math.ceil(len(columns) / across) * len(models)

    def draw(axes: Sequence[Axes], title: str, shown: Sequence[Line]) -> None:
        for place, axis in enumerate(axes):
            model, panel = models[place // (len(axes) // len(models))], place % (len(axes) // len(models))
            if panel >= len(columns):
                axis.set_visible(False)
                continue
            metric, own = list(columns)[panel], frame[frame["model"] == model]
            words = (titles.get(metric, ""), model if several or not titles else "", title)
            _dense_line(axis, own[own["method"] == DENSE], metric, columns[metric])
            for line in lines:
                of_line = ((own["method"] == line.variant) & (own["calib"] == line.key[0])
                           & (own["k_max"] == line.key[1]))
                _score_line(axis, own[of_line], metric, columns[metric], line.marks if line in shown else None)
            _score_axis(axis, columns[metric], ", ".join(part for part in words if part))

    dense = Line2D([], [], color=GREY, linestyle=":", label="dense")
    figure = banded(bands, (down, across), draw, width=width, height=height, beside=[dense])
    return Drawn(figure, frame)


def _score_line(axis: Axes, rows: pd.DataFrame, metric: str, column: Column, marks: Mapping[str, Any] | None) -> None:
    """One line with its error bars. If `marks` is None, the line is pale, lies in the background and has no error
    bars."""
    rows = rows[rows[metric].notna()].sort_values("params_removed")
    if rows.empty:
        return
    x, y = 100 * rows["params_removed"], rows[metric] * column.scale
    errors = rows[column.stderr].fillna(0) * column.scale if column.stderr else 0 * y
    if marks is None:
        axis.plot(x, y, color=PALE, linewidth=0.6, zorder=1)
        # the axis has room for all bars, so that all bands have one scale
        axis.update_datalim([*zip(x, y - errors, strict=True), *zip(x, y + errors, strict=True)])
        return
    # the bars are paler than the lines, or many variants would hide each other
    axis.errorbar(x, y, yerr=errors, fmt="none", ecolor=marks["color"], elinewidth=0.7, capsize=1.5, capthick=0.7,
                  alpha=0.45)
    axis.plot(x, y, **marks)


def _dense_line(axis: Axes, rows: pd.DataFrame, metric: str, column: Column) -> None:
    for _, row in rows[rows[metric].notna()].iterrows():
        value = row[metric] * column.scale
        error = row[column.stderr] * column.scale if column.stderr and not pd.isna(row[column.stderr]) else None
        axis.axhline(value, color=GREY, linestyle=":", linewidth=0.9)
        axis.errorbar([0], [value], yerr=error, color=GREY, marker="o", linestyle="none", elinewidth=0.7, capsize=1.5)


def _score_axis(axis: Axes, column: Column, title: str) -> None:
    axis.set(title=title, xlabel="Parameters removed", ylabel=heading(column))
    axis.xaxis.set_major_formatter(PercentFormatter(decimals=0, symbol=" %"))
    if column.better < 0:
        axis.set_yscale("log")
        plain_log(axis)


FIGURES = (
    Entry("score-size", "How much is removed, and what is left",
          "Perplexity on held-out text (lower is better) and mean accuracy (higher is better) against the share of "
          "all parameters that is really removed. Thick lines are this project's own methods. The dotted line is the "
          "dense model. Bars are one standard error.",
          score_against_size, scope="all", place=5),
    Entry("score-ratio", "Score against ratio",
          "Mean accuracy and perplexity against the share of all parameters that is really removed. There is one line "
          "for each method and K max. Bars are one standard error. KDP paper, Figure 6.",
          score_against_ratio, scope="all", place=10,
          differs="standard errors; the ratio that was asked for is not on the axis"),
    Entry("tasks-ratio", "Every task against the ratio",
          "The main metric of each task against the share of all parameters that is really removed. There is one line "
          "for each method and K max. Bars are one standard error over the task's items. KDP paper, Figures 6 and 7.",
          tasks_against_ratio, scope="all", place=10,
          differs="standard errors over items; the lines are variants, not models; `figures.tasks` chooses tasks"),
)
