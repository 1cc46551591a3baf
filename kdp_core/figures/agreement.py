"""Does the objective matter more than the search? The layers that searches choose, and how far the searches agree.

The figures follow "Rethinking Layer Redundancy in Large Language Models" (arXiv 2604.24938). The figures of that paper
could not be read. This module reads the record of kdp_core.study.agreement and computes only means over draws of
calibration text.
"""
import textwrap
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdp_core.base.measurements import Agreement
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    COLORS,
    GREY,
    MARKERS,
    PAGE_IN,
    PALE,
    Drawn,
    FigureError,
    legend_below,
    legend_lines,
    plain_log,
    quiet,
    whole_numbers,
)

VARIES = {"objective": "two objectives", "strategy": "two searches", "draw": "two draws of text"}
"""For each setting in which two searches may differ: its label in the figure."""
TOLD = {"holds": COLORS[2], "does not hold": COLORS[1], "cannot be told here": GREY}


def chosen_layers(agreement: Agreement, *, colormap: str = "viridis", width: float = PAGE_IN,
                  line_height: float = 0.16) -> Drawn:
    """Which layers each search removes, and what that costs on held-out text. A circle is one draw of calibration text,
    and a bar is the mean over draws."""
    frame = pd.DataFrame(agreement.rows)
    keys = list(dict.fromkeys(zip(frame["objective"], frame["strategy"], strict=True)))
    share_KL = np.zeros((len(keys), agreement.stats["layers"]))
    for place, (objective, strategy) in enumerate(keys):
        own = frame[(frame["objective"] == objective) & (frame["strategy"] == strategy)]
        for removed in own["removed"]:
            share_KL[place, removed] += 1 / len(own)
    with quiet():
        figure = Figure(figsize=(width, len(keys) * line_height + 0.95))
        axes = figure.subplots(1, 3, sharey=True, width_ratios=(3, 1, 1))
        image = axes[0].imshow(share_KL, cmap=f"{colormap}_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axes[0].set(xlabel="Layer", yticks=range(len(keys)),
                    yticklabels=[f"{objective}, {strategy}".replace("_", " ") for objective, strategy in keys])
        whole_numbers(axes[0].xaxis)
        axes[0].grid(False)
        figure.colorbar(image, ax=axes[0], location="top", aspect=40, pad=0.03, label="Share of draws that remove it")
        for axis, name, scale, words in ((axes[1], "heldout_ppl_ratio", 1, "Held-out perplexity\n/ dense"),
                                         (axes[2], "heldout_accuracy", 100, "Held-out accuracy (%)")):
            for place, (objective, strategy) in enumerate(keys):
                values = scale * frame[(frame["objective"] == objective) & (frame["strategy"] == strategy)][name]
                axis.plot(values, [place] * len(values), linestyle="none", marker="o", color=COLORS[0],
                          fillstyle="none", markeredgewidth=0.7)
                axis.plot([values.mean()], [place], linestyle="none", marker="|", markersize=8, color="black")
            axis.set(xlabel=words)
        if frame["heldout_ppl_ratio"].max() > 10 * frame["heldout_ppl_ratio"].min():
            axes[1].set_xscale("log")
        axes[2].axvline(100 * agreement.stats["dense_accuracy"], color=GREY, linestyle=":", linewidth=0.9)
    shown = frame.drop(columns=["single", "best_so_far"])
    return Drawn(figure, shown.assign(removed=[" ".join(map(str, one)) for one in shown["removed"]]))


def agreement_of_searches(agreement: Agreement, *, width: float = PAGE_IN, height: float = 2.1) -> Drawn:
    """The agreement of two searches that differ in one setting. The right panel shows the paper's claims with their
    intervals.

    Raises FigureError if no two searches differ in exactly one setting.
    """
    pairs, claims = pd.DataFrame(agreement.pairs), pd.DataFrame(agreement.claims)
    if pairs.empty:
        raise FigureError("no two searches differ in exactly one setting; compare variants that share two of "
                          "objective, strategy and draw")
    kinds = [kind for kind in VARIES if kind in set(pairs["varies"])]
    with quiet():
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(1, 3, width_ratios=(1.1, 1.1, 1.5))
        for axis, name, words in ((axes[0], "jaccard", "Jaccard of the chosen sets"),
                                  (axes[1], "spearman", "Spearman of single removals")):
            for place, kind in enumerate(kinds):
                values = pairs[pairs["varies"] == kind][name].astype(float).dropna()
                axis.plot(values, place + _spread(len(values)), linestyle="none", marker="o", markersize=1.8,
                          color=COLORS[0], alpha=0.5, markeredgewidth=0)
                axis.plot([values.mean()], [place], linestyle="none", marker="|", markersize=13, color="black")
            axis.set(xlabel=words, ylim=(len(kinds) - 0.5, -0.5), yticks=range(len(kinds)),
                     yticklabels=[VARIES[kind] for kind in kinds] if axis is axes[0] else [])
        _forest(axes[2], claims)
    both = pd.concat([pairs.assign(kind="pair"), claims.assign(kind="claim")], ignore_index=True)
    return Drawn(figure, both)


def _spread(count: int) -> np.ndarray:
    """Small vertical shifts of `count` points, so that points with equal values do not hide each other. The same
    `count` always gives the same shifts."""
    return 0.25 * np.sin(np.arange(count) * 2.4)


def _forest(axis: Axes, claims: pd.DataFrame) -> None:
    """Plot each claim as a mean with its interval. Values above zero support the claim."""
    for place, row in enumerate(claims.itertuples()):
        color = TOLD[row.told]
        if pd.notna(row.mean):
            axis.plot([row.mean], [place], marker="o", color=color, linestyle="none")
        if pd.notna(row.low):
            axis.plot([row.low, row.high], [place, place], color=color)
    axis.axvline(0, color=GREY, linestyle=":", linewidth=0.9)
    names = ["\n".join(textwrap.wrap(claim.split(":")[0], 24)) for claim in claims["claim"]]
    axis.set(xlabel="Claim holds above 0", ylim=(len(claims) - 0.5, -0.5), yticks=range(len(claims)))
    axis.set_yticklabels(names, fontsize=5.5)


def best_so_far(agreement: Agreement, *, width: float = PAGE_IN, height: float = 2.2) -> Drawn:
    """The value of the best set that each search has found so far, against the number of layer passes that the search
    has run.

    The figure shows only one objective: the objective that was used with the largest number of strategies. Each line is
    a mean over draws, and each draw uses other calibration text. A line begins at the number of layer passes after
    which the search has found a set of the requested size in every draw.
    """
    frame = pd.DataFrame(agreement.rows)
    most = frame.groupby("objective", sort=False)["strategy"].nunique().idxmax()
    own = frame[frame["objective"] == most]
    lines = {strategy: _mean_curve(list(group["best_so_far"]), int(group["passes"].max()))
             for strategy, group in own.groupby("strategy", sort=False)}
    handles = [Line2D([], [], label=strategy.replace("_", " "), **_marks(place))
               for place, strategy in enumerate(lines)]
    with quiet():
        figure = Figure(figsize=(width, height + 0.14 * legend_lines(handles, width)))
        axis = figure.subplots()
        for place, curve in enumerate(lines.values()):
            axis.plot(curve["passes"], curve["value"], drawstyle="steps-post", markevery=0.2, **_marks(place))
        axis.set(xlabel="Layer passes", ylabel=f"Best {most} so far", yscale="log")
        plain_log(axis)
        axis.axvline(own["budget"].max(), color=PALE, linewidth=0.9)
        legend_below(figure, handles, width=width)
    return Drawn(figure, pd.concat([curve.assign(objective=most, strategy=name) for name, curve in lines.items()],
                                   ignore_index=True))


def _marks(place: int) -> dict[str, Any]:
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)]}


def _mean_curve(curves: list[list[dict[str, Any]]], last: int) -> pd.DataFrame:
    """Mean over draws of the best value so far, at every number of layer passes at which the value of a draw
    changes."""
    ticks = sorted({row["passes"] for curve in curves for row in curve} | {last})
    first = max(curve[0]["passes"] for curve in curves)
    ticks = [passes for passes in ticks if passes >= first]
    values = [np.mean([[row["value"] for row in curve if row["passes"] <= passes][-1] for curve in curves])
              for passes in ticks]
    return pd.DataFrame({"passes": ticks, "value": values})


FIGURES = (
    Entry("searches-layers", "What searches remove",
          "The layers that each search removes under its objective, and the loss and accuracy of the model without "
          "these layers on held-out text. A circle is one draw of calibration text, and a bar is the mean over draws. "
          "The dotted line is the dense model.", chosen_layers, scope="ratio", needs="agreement", place=92),
    Entry("searches-agreement", "Objective or search?",
          "The agreement of every two searches that differ in only one setting. On the right, the claims of "
          "Rethinking Layer Redundancy (arXiv 2604.24938) are shown as differences with 95 % intervals over draws.",
          agreement_of_searches, scope="ratio", needs="agreement", place=92),
    Entry("searches-curves", "Searches under one budget",
          "The value of the best set of layers that each search has found so far, against the number of layer passes "
          "that the search has run. Lines are means over draws. The grey line is the budget.",
          best_so_far, scope="ratio", needs="agreement", place=92),
)
