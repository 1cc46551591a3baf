"""Figures of ablations: scores against what a study varies, with standard errors and the dense model's line.

Figures 6, 7 and 8 of the KDP paper (Ma et al., ICLR 2026), and its Tables 3, 4, 9 and 11 as pictures. A line joins the
points that differ in nothing but the quantity on the axis. Reads the numbers of ablations.gather, computes none.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from kdp_core.figures.style import DASHES, GREY, PAGE_IN, Drawn, legend_below, look, plain_log, quiet, rows_of
from kdp_core.results.ablations import Gathered, kept, lines_of
from kdp_core.results.columns import DENSE, heading

ON_AXIS = {"ratio": "ratio", "k_max": "k_max", "tokens": "calib", "variant": "method"}
"""The key that differs along an axis; along an option it is the row's name."""
WIDE = 8.0
"""An axis is logarithmic where its largest number is at least this many times its smallest."""


class Line(NamedTuple):
    """One line of every panel."""
    label: str
    x: str
    """Column on the axis."""
    rows: pd.DataFrame
    """Points of all models, in order."""
    look: dict[str, Any]


def against(gathered: Gathered, *, rows: Mapping[str, Sequence[Any]] | None = None, width: float = PAGE_IN,
            height: float = 2.1) -> Drawn:
    """Every metric against the ablation's axis, a row of panels a model; bars are one standard error, the dotted line
    and its band the dense model with its own. Scores of which less is better stand on a log axis. `rows` gives rows the
    look that they have elsewhere.
    """
    frame, metrics = gathered.frame, gathered.ablation.metrics
    drawn, models = _looked(lines(gathered), rows), list(dict.fromkeys(frame["model"]))
    with quiet():
        figure = Figure(figsize=(width, height * len(models) + 0.14 * math.ceil((len(drawn) + 1) / 5)))
        grid = figure.subplots(len(models), len(metrics), squeeze=False)
        for axes, model in zip(grid, models, strict=True):
            own = gathered._replace(frame=frame[frame["model"] == model])
            for axis, metric in zip(axes, metrics, strict=True):
                _panel(axis, own, drawn, metric)
                axis.set_title(model)
        handles = [Line2D([], [], label=line.label, **line.look) for line in drawn]
        legend_below(figure, [*handles, Line2D([], [], color=GREY, linestyle=":", label="dense")], columns=5)
    return Drawn(figure, frame[kept(gathered)])


def lines(gathered: Gathered) -> list[Line]:
    """The lines of an ablation: for each axis, its points parted by every key that varies beside it."""
    pruned, ablation = gathered.frame[gathered.frame["method"] != DENSE], gathered.ablation
    found = []
    for name, column in zip(ablation.x, gathered.axes, strict=True):
        own = pruned[[name in lines_of(ablation, row) for row in pruned["method"]]]
        apart = [key for key in ("method", "calib", "k_max", "ratio")
                 if key != ON_AXIS.get(name, "method") and own[key].nunique() > 1]
        for _, rows in own.groupby(apart, sort=False) if apart else [((), own)]:
            parts = [gathered.columns[column].header] if len(ablation.x) > 1 else []
            parts += [_part(key, rows[key].iloc[0]) for key in apart]
            alone = "pruned" if column == "method" else rows["method"].iloc[0]
            found.append(Line(", ".join(parts) or alone, column, rows, {}))
    return found


def _part(key: str, value: Any) -> str:
    """What a line's label says of a key."""
    return f"K max {value}" if key == "k_max" else f"{100 * value:g} %" if key == "ratio" else str(value)


def _looked(drawn: Sequence[Line], known: Mapping[str, Sequence[Any]] | None) -> list[Line]:
    """The lines with their looks: a row's own, its method's where a line joins several rows; dashes tell equal ones.

    Where all are of one row, colours tell the lines.
    """
    methods = [list(dict.fromkeys(line.rows["method"])) for line in drawn]
    rows = rows_of([names[0] for names in methods] if not known else known, known)
    plain = [rows[names[0]]._replace(variant=0 if len(names) > 1 else rows[names[0]].variant) for names in methods]
    if len(set(plain)) == 1:
        plain = [row._replace(place=row.place + number) for number, row in enumerate(plain)]
    return [line._replace(look=look(row) | {"linestyle": DASHES[plain[:place].count(row) % len(DASHES)]})
            for place, (line, row) in enumerate(zip(drawn, plain, strict=True))]


def _panel(axis: Axes, own: Gathered, drawn: Sequence[Line], metric: str) -> None:
    """One metric of one model."""
    column, values = own.columns[metric], _values(drawn)
    for _, row in own.frame[(own.frame["method"] == DENSE) & own.frame[metric].notna()].iterrows():
        level, error = row[metric] * column.scale, _errors(own, row, metric)
        axis.axhline(level, color=GREY, linestyle=":", linewidth=0.9)
        axis.axhspan(level - error, level + error, color=GREY, alpha=0.12, linewidth=0)
    for place, line in enumerate(drawn):
        rows = line.rows[line.rows.index.isin(own.frame.index) & line.rows[metric].notna()]
        if _named(values):
            spread = 0.12 * (place - (len(drawn) - 1) / 2)
            _points(axis, own, rows, [values.index(value) + spread for value in rows[line.x]], metric,
                    {**line.look, "linestyle": "none"})
        else:
            rows = rows.sort_values(line.x)
            _points(axis, own, rows, rows[line.x] * own.columns[line.x].scale, metric, line.look)
    _scales(axis, own, values, metric)


def _points(axis: Axes, own: Gathered, rows: pd.DataFrame, x: Any, metric: str, look: dict[str, Any]) -> None:
    # bars paler than the lines, as in score_against_ratio
    axis.errorbar(x, rows[metric] * own.columns[metric].scale, yerr=_errors(own, rows, metric), fmt="none",
                  ecolor=look["color"], elinewidth=0.7, capsize=1.5, capthick=0.7, alpha=0.45)
    axis.plot(x, rows[metric] * own.columns[metric].scale, **look)


def _errors(own: Gathered, rows: Any, metric: str) -> Any:
    """Standard errors as printed, 0 where there is none: of a frame its column, of a row its number."""
    column = own.columns[metric]
    error = rows[column.stderr] * column.scale if column.stderr else 0.0
    return error.fillna(0) if isinstance(error, pd.Series) else 0.0 if math.isnan(error) else error


def _values(drawn: Sequence[Line]) -> list[Any]:
    """All values on the axis: numbers ascending, names in their order."""
    values = list(dict.fromkeys(value for line in drawn for value in line.rows[line.x]))
    return values if _named(values) else sorted(values)


def _named(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


def _scales(axis: Axes, own: Gathered, values: list[Any], metric: str) -> None:
    """Labels, log axes, and a tick at every value that was tried."""
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
