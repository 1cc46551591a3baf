"""Figures of ablations: scores against the varied quantity, with standard errors and the line of the dense model.

The module draws Figures 6, 7 and 8 of the KDP paper (Ma et al., ICLR 2026). The module also draws the paper's Tables 3,
4, 9 and 11 as pictures. A line joins the points that differ only in the quantity on the axis. All numbers come from
kdp_core.results.ablations.gather; this module only draws the numbers.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    DASHES,
    GREY,
    PAGE_IN,
    Drawn,
    Looks,
    legend_below,
    looks_of,
    marks,
    plain_log,
    quiet,
)
from kdp_core.results.ablations import Ablation, Gathered, gather, kept, lines_of
from kdp_core.results.columns import DENSE, heading

ON_AXIS = {"ratio": "ratio", "k_max": "k_max", "tokens": "calib", "variant": "method"}
"""For each axis of an ablation: the key of a grid point that varies along this axis. If the axis is an option, the key
is the name of the variant."""
WIDE = 8.0
"""An axis is logarithmic if its largest number is at least this many times its smallest."""


class Line(NamedTuple):
    """One line, which every panel of the figure shows."""
    label: str
    x: str
    """Column on the axis."""
    points: pd.DataFrame
    """A table with one row for each point on this line; the table contains the points of all models."""
    marks: dict[str, Any]


def of_ablation(summary: pd.DataFrame, scores: pd.DataFrame, *, ablation: Mapping[str, Any],
                looks: Looks | None = None) -> Drawn:
    """Draw an ablation from the tables of all points. `ablation` contains the fields of Ablation."""
    return against(gather(summary, scores, Ablation(**ablation)), looks=looks)


def against(gathered: Gathered, *, looks: Looks | None = None, width: float = PAGE_IN, height: float = 2.1) -> Drawn:
    """Every metric against the varied quantity of the ablation. The panels of one model are side by side.

    Error bars show one standard error. The dotted line is the dense model, and the band around this line is one
    standard error of the dense model. Scores for which lower is better are on a logarithmic axis. If `looks` is given,
    each variant has the same colour and marker as in the other figures.
    """
    frame, metrics = gathered.frame, gathered.ablation.metrics
    drawn, models = _marked(lines(gathered), looks), list(dict.fromkeys(frame["model"]))
    with quiet():
        figure = Figure(figsize=(width, height * len(models) + 0.14 * math.ceil((len(drawn) + 1) / 5)))
        grid = figure.subplots(len(models), len(metrics), squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            own = gathered._replace(frame=frame[frame["model"] == model])
            for axis, metric in zip(axes, metrics, strict=True):
                _panel(axis, own, drawn, metric)
                axis.set_title(model)
        handles = [Line2D([], [], label=line.label, **line.marks) for line in drawn]
        legend_below(figure, [*handles, Line2D([], [], color=GREY, linestyle=":", label="dense")], columns=5)
    return Drawn(figure, frame[kept(gathered)])


def lines(gathered: Gathered) -> list[Line]:
    """The lines of an ablation. Two points are on one line if they differ only in the key that varies along the line's
    axis."""
    pruned, ablation = gathered.frame[gathered.frame["method"] != DENSE], gathered.ablation
    found = []
    for name, column in zip(ablation.x, gathered.axes, strict=True):
        own = pruned[[name in lines_of(ablation, variant) for variant in pruned["method"]]]
        apart = [key for key in ("method", "calib", "k_max", "ratio")
                 if key != ON_AXIS.get(name, "method") and own[key].nunique() > 1]
        for _, points in own.groupby(apart, sort=False) if apart else [((), own)]:
            parts = [gathered.columns[column].header] if len(ablation.x) > 1 else []
            parts += [_part(key, points[key].iloc[0]) for key in apart]
            alone = "pruned" if column == "method" else points["method"].iloc[0]
            found.append(Line(", ".join(parts) or alone, column, points, {}))
    return found


def _part(key: str, value: Any) -> str:
    """The words for one key in the label of a line."""
    return f"K max {value}" if key == "k_max" else f"{100 * value:g} %" if key == "ratio" else str(value)


def _marked(drawn: Sequence[Line], looks: Looks | None) -> list[Line]:
    """The lines with their colours and markers. A line has the colour and marker of its variant, or of its method if
    the line joins several variants.

    Dashes distinguish lines with the same colour and marker. If all lines belong to one variant, colours distinguish
    the lines.
    """
    variants = [list(dict.fromkeys(line.points["method"])) for line in drawn]
    known = looks_of([names[0] for names in variants] if not looks else looks, looks)
    plain = [known[names[0]]._replace(number=0 if len(names) > 1 else known[names[0]].number) for names in variants]
    if len(set(plain)) == 1:
        plain = [look._replace(place=look.place + number) for number, look in enumerate(plain)]
    return [line._replace(marks=marks(look) | {"linestyle": DASHES[plain[:place].count(look) % len(DASHES)]})
            for place, (line, look) in enumerate(zip(drawn, plain, strict=True))]


def _panel(axis: Axes, own: Gathered, drawn: Sequence[Line], metric: str) -> None:
    """Draw one metric of one model in one panel."""
    column, values = own.columns[metric], _values(drawn)
    for _, row in own.frame[(own.frame["method"] == DENSE) & own.frame[metric].notna()].iterrows():
        level, error = row[metric] * column.scale, _errors(own, row, metric)
        axis.axhline(level, color=GREY, linestyle=":", linewidth=0.9)
        axis.axhspan(level - error, level + error, color=GREY, alpha=0.12, linewidth=0)
    for place, line in enumerate(drawn):
        points = line.points[line.points.index.isin(own.frame.index) & line.points[metric].notna()]
        if _named(values):
            spread = 0.12 * (place - (len(drawn) - 1) / 2)
            _points(axis, own, points, [values.index(value) + spread for value in points[line.x]], metric,
                    {**line.marks, "linestyle": "none"})
        else:
            points = points.sort_values(line.x)
            _points(axis, own, points, points[line.x] * own.columns[line.x].scale, metric, line.marks)
    _scales(axis, own, values, metric)


def _points(axis: Axes, own: Gathered, points: pd.DataFrame, x: Any, metric: str, marked: dict[str, Any]) -> None:
    # the bars are paler than the lines, as in score_against_ratio
    axis.errorbar(x, points[metric] * own.columns[metric].scale, yerr=_errors(own, points, metric), fmt="none",
                  ecolor=marked["color"], elinewidth=0.7, capsize=1.5, capthick=0.7, alpha=0.45)
    axis.plot(x, points[metric] * own.columns[metric].scale, **marked)


def _errors(own: Gathered, points: Any, metric: str) -> Any:
    """Standard errors in printed units, for a table of points or for one point; 0 if there is no standard error."""
    column = own.columns[metric]
    error = points[column.stderr] * column.scale if column.stderr else 0.0
    return error.fillna(0) if isinstance(error, pd.Series) else 0.0 if math.isnan(error) else error


def _values(drawn: Sequence[Line]) -> list[Any]:
    """All values on the horizontal axis. Values that are numbers are in ascending order. Values that are names are in
    the order of the points."""
    values = list(dict.fromkeys(value for line in drawn for value in line.points[line.x]))
    return values if _named(values) else sorted(values)


def _named(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _scales(axis: Axes, own: Gathered, values: list[Any], metric: str) -> None:
    """Set labels, logarithmic axes, and a tick at every value that was tried."""
    headings = list(dict.fromkeys(heading(own.columns[name]) for name in own.axes))
    shared = len(headings) == 1 or not all(name.endswith(".epochs") for name in own.axes)
    axis.set(xlabel=" or ".join(headings) if shared else "Epochs", ylabel=heading(own.columns[metric]))
    if own.columns[metric].better < 0:
        axis.set_yscale("log")
        plain_log(axis)
    if _named(values):
        tight = sum(map(len, values)) > 24
        axis.set_xticks(range(len(values)), values, rotation=25 if tight else 0, ha="right" if tight else "center")
        axis.set_xlim(-0.5, len(values) - 0.5)
    elif "params_removed" not in own.axes:
        if values[0] > 0 and values[-1] / values[0] >= WIDE:
            axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(values))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


FIGURES = (
    Entry("ablation", "Ablation",
          "Bars are one standard error. The dotted line is the dense model, with its own standard error.",
          of_ablation, scope="ablation", place=50,
          differs="KDP paper, Figures 6 to 8, LoRP, Figure 5 (`configs/ablations.yaml`, `configs/lorp.yaml`): standard "
                  "errors and the dense model's line"),
)
