"""Figures of rows of methods side by side: scores against the ratio, layers that go, errors of the states.

Figures 6 and 7 of the KDP paper (Ma et al., ICLR 2026) with error bars and the share of parameters really removed, and
Figure 4 of LoRP (2026) with attentions and MLPs that go alone. Errors of the states by layer are in neither paper. The
lines that one panel cannot hold are dealt out to bands of panels by what the methods do; in every band the others stand
behind in pale grey. Reads the numbers of kdp_core.results.summary and kdp_core.score.diagnose, computes none.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kdp_core.base.measurements import Diagnosis
from kdp_core.base.records import PrunedFacts
from kdp_core.figures.style import (
    GREY,
    PAGE_IN,
    PALE,
    Drawn,
    FigureError,
    Line,
    deal,
    handles_of,
    legend_below,
    legend_rows,
    lines_of,
    look,
    plain_log,
    quiet,
    rows_of,
)
from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column, Point, heading, span
from kdp_core.score.metrics import PRIMARY

Known = Mapping[str, Sequence[Any]]
"""Row of methods -> (place, variant, group), as in kdp_core.figures.style.Row."""
LEGEND_LINE = 0.14
"""Height of a line of a legend, in inches."""
ACROSS = 3
"""Panels side by side at most."""


# Scores against the ratio ---------------------------------------------------------------------------------------------

def score_against_ratio(summary: pd.DataFrame, *, metrics: Sequence[str] = ("acc", "ppl"), rows: Known | None = None,
                        width: float = PAGE_IN, height: float = 2.0) -> Drawn:
    """Figure 6: scores against the share of parameters really removed, a line a method (and calib, k_max), with one
    standard error; the dense model is the point at 0 and the dotted line. Perplexities stand on a log axis.

    `summary` as from summary.summarise; a line of panels a model. Raises FigureError for an unknown metric or a summary
    without pruned models.
    """
    unknown = [name for name in metrics if name not in COLUMNS or name not in summary]
    if unknown:
        raise FigureError(f"unknown metric {unknown[0]!r}; choose among {', '.join(COLUMNS)}")
    kept = [*KEYS, "params_removed", *(column for name in metrics for column in (name, COLUMNS[name].stderr) if column)]
    columns = {name: COLUMNS[name] for name in metrics}
    return _against(summary[kept].reset_index(drop=True), columns, rows, width, height, {})


def tasks_against_ratio(scores: pd.DataFrame, summary: pd.DataFrame, *, tasks: Sequence[str] | None = None,
                        rows: Known | None = None, width: float = PAGE_IN, height: float = 1.8) -> Drawn:
    """Figure 7: the main metric of every task against the share of parameters really removed, a panel a task.

    `scores` as from summary.tidy. Raises FigureError for a task that nothing was scored on, or none at all.
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
    return _against(frame, columns, rows, width, height, {task: task for task in columns})


def _against(frame: pd.DataFrame, columns: Mapping[str, Column], known: Known | None, width: float, height: float,
             titles: Mapping[str, str]) -> Drawn:
    """Panels of columns, for every model, in as many bands as the lines need; without titles models are the titles."""
    pruned, models = frame[frame["method"] != DENSE], sorted(frame["model"].unique())
    several = len(models) > 1
    if pruned.empty:
        raise FigureError("no pruned model in the summary; there is nothing to draw against the ratio")
    keys = list(dict.fromkeys(zip(pruned["method"], pruned["calib"], pruned["k_max"], strict=True)))
    label = _labels(keys)
    lines = lines_of([(key[0], key[1:], label(key)) for key in keys], known)
    bands, across = deal(lines, known), min(len(columns), ACROSS)
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
                of_line = ((own["method"] == line.method) & (own["calib"] == line.variant[0])
                           & (own["k_max"] == line.variant[1]))
                _score_line(axis, own[of_line], metric, columns[metric], line.look if line in shown else None)
            _score_axis(axis, columns[metric], ", ".join(part for part in words if part))

    dense = Line2D([], [], color=GREY, linestyle=":", label="dense")
    figure = banded(bands, (down, across), draw, width=width, height=height, beside=[dense])
    return Drawn(figure, frame)


def banded(bands: Sequence[tuple[str, list[Line]]], shape: tuple[int, int],
           draw: Callable[[Sequence[Axes], str, Sequence[Line]], None], *, width: float, height: float,
           beside: Sequence[Line2D] = ()) -> Figure:
    """A figure of bands, each a grid of panels that `draw` fills, with a legend of its own and of `beside` below."""
    with quiet():
        handles = [[*handles_of(shown), *beside] for _, shown in bands]
        heights = [shape[0] * height + LEGEND_LINE * (legend_rows(own, width, 5) + 1) for own in handles]
        figure = Figure(figsize=(width, sum(heights)))
        parts: Sequence[Figure | SubFigure] = [figure] if len(bands) == 1 else list(
            figure.subfigures(len(bands), 1, squeeze=False, height_ratios=heights)[:, 0])
        for part, (title, shown), own in zip(parts, bands, handles, strict=True):
            draw(part.subplots(*shape, squeeze=False).ravel(), title, shown)
            legend_below(part, own, columns=5, width=width)
    return figure


def _labels(keys: Sequence[tuple[str, str, int]]) -> Callable[[tuple[str, str, int]], str]:
    """Names of lines: the row, and calibration and K max where they vary."""
    calibs, k_maxes = len({key[1] for key in keys}) > 1, len({key[2] for key in keys}) > 1
    return lambda key: key[0] + (f", {key[1]}" if calibs else "") + (f", K max {key[2]}" if k_maxes else "")


def _score_line(axis: Axes, rows: pd.DataFrame, metric: str, column: Column, looks: Mapping[str, Any] | None) -> None:
    """One line with its bars; without a look a pale one in the background."""
    rows = rows[rows[metric].notna()].sort_values("params_removed")
    if rows.empty:
        return
    x, y = 100 * rows["params_removed"], rows[metric] * column.scale
    errors = rows[column.stderr].fillna(0) * column.scale if column.stderr else 0 * y
    if looks is None:
        axis.plot(x, y, color=PALE, linewidth=0.6, zorder=1)
        # room for all bars, so that bands have one scale
        axis.update_datalim([*zip(x, y - errors, strict=True), *zip(x, y + errors, strict=True)])
        return
    # bars paler than the lines, or many methods hide each other
    axis.errorbar(x, y, yerr=errors, fmt="none", ecolor=looks["color"], elinewidth=0.7, capsize=1.5, capthick=0.7,
                  alpha=0.45)
    axis.plot(x, y, **looks)


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


# Which layers ---------------------------------------------------------------------------------------------------------

def pruned_layers(points: Sequence[Point], *, rows: Known | None = None, width: float = PAGE_IN,
                  row_height: float = 0.13) -> Drawn:
    """LoRP's Figure 4: the layers that each pruned model lacks or replaces; a row a method (and calib, k_max), a panel
    a model and ratio.

    Neighbouring blocks are set apart by a gap; an attention that goes alone is the upper half of its layer, an MLP the
    lower. A row without bars changes weights inside the layers. Raises FigureError if no point is a pruned model.
    """
    pruned = [point for point in points if point.facts is not None]
    if not pruned:
        raise FigureError("no pruned model among the points; there are no layers to show")
    looks, ratios = rows_of([point.method for point in pruned], rows), sorted({point.ratio for point in pruned})
    models = {model: [point for point in pruned if point.model == model]
              for model in sorted({point.model for point in pruned})}
    order = list(looks)
    keys = {model: sorted({(p.method, p.calib, p.k_max) for p in own}, key=lambda key: (order.index(key[0]), key[1:]))
            for model, own in models.items()}
    label = _labels([key for own in keys.values() for key in own])
    halves = any(point.facts.parts for point in pruned)
    with quiet():
        heights = [len(own) * row_height + 0.45 for own in keys.values()]
        figure = Figure(figsize=(width, sum(heights) + 0.15 + (0.2 if halves else 0)))
        grid = figure.subplots(len(models), len(ratios), squeeze=False, sharey="row", height_ratios=heights)
        for axes, (model, own) in zip(grid, models.items(), strict=True):
            for axis, ratio in zip(axes, ratios, strict=True):
                _strips(axis, keys[model], {(p.method, p.calib, p.k_max): p.facts for p in own if p.ratio == ratio},
                        {name: look(row)["color"] for name, row in looks.items()})
                axis.set(title=f"{model}, {100 * ratio:g} %", xlabel="Layer")
            axes[0].set_yticks(range(len(keys[model])), [label(key) for key in keys[model]])
        if halves:
            legend_below(figure, [Patch(color=GREY, label="whole layer"), Line2D([], [], color=GREY, linewidth=2.5,
                                  label="upper half: attention, lower half: MLP alone")])
    return Drawn(figure, _runs(pruned))


def _strips(axis: Axes, keys: Sequence[tuple[str, str, int]], facts: Mapping[tuple[str, str, int], PrunedFacts],
            colors: Mapping[str, str]) -> None:
    layers = max((own.layers_before for own in facts.values()), default=1)
    for place, key in enumerate(keys):
        if key not in facts:
            continue
        axis.broken_barh([(-0.5, layers)], (place - 0.32, 0.64), facecolors="#eeeeee")
        axis.broken_barh([(start - 0.42, stop - start - 0.16) for start, stop in facts[key].blocks],
                         (place - 0.32, 0.64), facecolors=colors[key[0]])
        for part, bottom in (("attention", place - 0.32), ("mlp", place + 0.03)):
            axis.broken_barh([(layer - 0.42, 0.84) for layer, own in facts[key].parts if own == part], (bottom, 0.29),
                             facecolors=colors[key[0]])
    axis.set(xlim=(-0.5, layers - 0.5), ylim=(len(keys) - 0.5, -0.5))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


def _runs(pruned: Sequence[Point]) -> pd.DataFrame:
    """A row a run of layers, or a part of a layer."""
    rows = []
    for point in pruned:
        keys, facts = dict(zip(KEYS, point[:5], strict=True)), point.facts
        rows += [{**keys, "start": start, "stop": stop, "part": "whole", "block": span((start, stop)),
                  "layers": facts.layers_before} for start, stop in facts.blocks]
        rows += [{**keys, "start": layer, "stop": layer + 1, "part": part, "block": span((layer, layer + 1)),
                  "layers": facts.layers_before} for layer, part in facts.parts]
    return pd.DataFrame(rows, columns=[*KEYS, "start", "stop", "part", "block", "layers"])


# What pruning did to the states ---------------------------------------------------------------------------------------

def error_by_layer(diagnoses: Mapping[tuple[str, int], Diagnosis], *, rows: Known | None = None, width: float = PAGE_IN,
                   height: float = 2.2) -> Drawn:
    """Relative squared error of the pruned models' states against the dense model's state number, a line a model.

    diagnoses: by (row of methods, K max).
    Not in the paper. A line has a gap where layers are gone and starts at its first error above 0: before the first
    dropped layer states are equal, which a log axis cannot show. At 1 a state is no better than the constant mean.
    Raises FigureError if there is no diagnosis, or none with an error above 0.
    """
    label = _labels([(method, "", k_max) for method, k_max in diagnoses])
    data = [{"method": method, "k_max": k_max, "state": state, "error": error, "cosine": cosine, "masked": masked,
             "tokens": own.tokens}
            for (method, k_max), own in diagnoses.items()
            for state, error, cosine, masked in zip(own.states, own.error, own.cosine, own.masked, strict=True)]
    if not any(row["error"] > 0 for row in data):
        raise FigureError("no error of states above 0 to draw: give the diagnosis of at least one pruned model")
    frame, last = pd.DataFrame(data), max(row["state"] for row in data)
    lines = lines_of([(method, k_max, label((method, "", k_max))) for method, k_max in diagnoses], rows)

    def draw(axes: Sequence[Axes], title: str, shown: Sequence[Line]) -> None:
        axis, = axes
        axis.axhline(1, color=GREY, linestyle=":", linewidth=0.9)
        for line in lines:
            own = frame[(frame["method"] == line.method) & (frame["k_max"] == line.variant)]
            error = own.set_index("state")["error"].reindex(range(last + 1))
            # a marker on every point, as a state between two gaps has no line
            axis.plot(error.index, error.where(error > 0), **(line.look | {"markersize": 2.4} if line in shown else {
                "color": PALE, "linewidth": 0.6, "zorder": 1}))
        axis.set(yscale="log", xlim=(-0.5, last + 0.5), xlabel="State of the dense model", ylabel="Relative error",
                 title=title)
        axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 5, 10]))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.1), max(high, 2))  # wide enough for plain ticks, with room about 1
        plain_log(axis)

    mean = Line2D([], [], color=GREY, linestyle=":", label="constant mean")
    return Drawn(banded(deal(lines, rows), (1, 1), draw, width=width, height=height, beside=[mean]), frame)
