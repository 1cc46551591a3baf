"""Figures of generation and multiple choice: how much of its generation a pruned model keeps, and why multiple choice
survives.

`validation` and `survival` show the measurements to which the predictor of kdp_core.study.expect was fitted. `expected`
shows the predictions for the models of a run. `survival` is like Figure 8 of "Demystifying When Pruning Works via
Representation Hierarchies" (ICML 2026). The figure of the paper uses the answer letters of MMLU. `survival` uses the
choices of the benchmarks' own items.
"""
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kdp_core.base.measurements import Expectation, Survival
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    GREY,
    LEGEND_LINE,
    PAGE_IN,
    Drawn,
    FigureError,
    Looks,
    labels_of,
    legend_below,
    legend_lines,
    looks_of,
    marks,
    quiet,
)

NAMES = {"quality": "All measures", "agreement": "Same tokens", "lambada": "Last words", "rouge1": "Summaries",
         "repetition": "No repetition"}
"""For each loss: the title of its panel."""


def expected(expectations: Mapping[tuple[str, int], Expectation], *, looks: Looks | None = None,
             width: float = PAGE_IN, line_height: float = 0.17) -> Drawn:
    """The share of the dense model's generation that each pruned model is expected to keep, with the 90 % range of this
    share.

    expectations: the expectation of each pruned model, by (variant, K max). Raises FigureError without records.
    """
    if not expectations:
        raise FigureError("no expectation to draw; give the expectation of at least one pruned model")
    names = [name for name in NAMES if name in next(iter(expectations.values())).losses]
    frame = pd.DataFrame([
        {"method": method, "k_max": k_max, "loss": name, "kept": 100 * (1 - one.losses[name]),
         "low": 100 * (1 - one.high[name]), "high": 100 * (1 - one.low[name])}
        for (method, k_max), one in expectations.items() for name in names])
    known = looks_of([method for method, _ in expectations], looks)
    label = labels_of([(method, "", k_max) for method, k_max in expectations])
    with quiet():
        figure = Figure(figsize=(width, max(len(expectations) * line_height + 0.8, 1.5)))
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            for place, (_, row) in enumerate(frame[frame["loss"] == name].iterrows()):
                axis.errorbar([row["kept"]], [place], **marks(known[row["method"]]), elinewidth=0.7, capsize=1.5,
                              xerr=[[row["kept"] - row["low"]], [row["high"] - row["kept"]]])
            axis.set(title=NAMES[name], xlabel="Kept (%)", xlim=(-4, 104), ylim=(len(expectations) - 0.5, -0.5),
                     yticks=range(len(expectations)))
            axis.set_yticklabels([label((method, "", k_max)) for method, k_max in expectations]
                                 if axis is axes[0] else [])
    return Drawn(figure, frame)


def validation(rows: pd.DataFrame, predicted: Mapping[str, np.ndarray], *, width: float = PAGE_IN,
               height: float = 1.9) -> Drawn:
    """Predicted losses against measured losses, with one panel for each loss. Each prediction is made for a method that
    was not used to fit the predictor.

    On the dotted line, the predicted loss equals the measured loss.

    rows: for each pruned model, one row with `method`, `ratio` and the measured losses. predicted: for each loss, one
    value for each row.
    """
    known = looks_of(rows["method"], None)
    frame = pd.concat([rows[["method", "ratio"]].assign(loss=name, measured=rows[f"loss_{name}"], predicted=values)
                       for name, values in predicted.items()], ignore_index=True)
    handles = [Line2D([], [], linestyle="none", label=name, **marks(look)) for name, look in known.items()]
    with quiet():
        figure = Figure(figsize=(width, height + LEGEND_LINE * (legend_lines(handles, width) + 1)))
        axes = figure.subplots(1, len(predicted), squeeze=False)[0]
        for axis, name in zip(axes, predicted, strict=True):
            axis.axline((0, 0), (1, 1), color=GREY, linestyle=":", linewidth=0.9, zorder=1)
            for row in frame[frame["loss"] == name].itertuples():
                axis.plot(100 * row.predicted, 100 * row.measured, linestyle="none", **marks(known[row.method]))
            axis.set(title=NAMES[name], xlim=(-4, 104), ylim=(-4, 104), aspect="equal", xlabel="Predicted loss (%)",
                     ylabel="Measured loss (%)" if axis is axes[0] else "")
        legend_below(figure, handles, width=width)
    return Drawn(figure, frame)


def survival(choices: pd.DataFrame, *, width: float = PAGE_IN, height: float = 2.1) -> Drawn:
    """Multiple-choice items: KL over all tokens against KL over the candidates, and both KLs against the loss of
    accuracy.

    choices: one row for each pruned model and task, as kdp_core.study.candidates.by_task returns them. Raises
    FigureError without rows.
    """
    if choices.empty:
        raise FigureError("no multiple-choice item was compared; give the items of at least one task")
    known = looks_of(choices["task"], None)
    with quiet():
        figure = Figure(figsize=(width, height + 0.3))
        axes = figure.subplots(1, 3)
        for row in choices.itertuples():
            mark, drop = marks(known[row.task]), 100 * row.drop
            axes[0].plot(row.kl, max(row.kl_candidates, 1e-4), linestyle="none", **mark)
            axes[1].plot(100 * row.agreement, 100 * row.agreement_candidates, linestyle="none", **mark)
            axes[2].plot(max(row.kl_candidates, 1e-4), drop, linestyle="none", **mark)
            axes[2].plot(row.kl, drop, linestyle="none", **{**mark, "fillstyle": "none", "alpha": 0.5})
        axes[0].set(xscale="log", yscale="log", xlabel="KL over all tokens (nats)", ylabel="KL over candidates (nats)")
        axes[0].autoscale(False)
        axes[0].axline((1e-2, 1e-2), (1, 1), color=GREY, linestyle=":", linewidth=0.9)
        axes[1].axline((0, 0), (100, 100), color=GREY, linestyle=":", linewidth=0.9)
        axes[1].set(xlim=(-4, 104), ylim=(-4, 104), xlabel="Same likeliest token (%)",
                    ylabel="Same likeliest candidate (%)")
        axes[2].set(xscale="log", xlabel="KL (nats): full over candidates,\nhollow over all tokens",
                    ylabel="Drop of accuracy (points)")
        for side in (axes[0].xaxis, axes[0].yaxis, axes[2].xaxis):
            low, high = side.get_view_interval()
            # labels of a wide range would overlap if the decades were divided
            side.set_major_locator(LogLocator(subs=(1, 3) if high < 1000 * low else (1,)))
            side.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            side.set_minor_locator(NullLocator())
        legend_below(figure, [Line2D([], [], linestyle="none", label=task, **marks(look))
                              for task, look in known.items()], width=width)
    return Drawn(figure, choices)


def survived(survivals: Mapping[tuple[str, int], Survival], *, width: float = PAGE_IN) -> Drawn:
    """Draw the figure `survival` for the pruned models of a run. survivals: by (variant, K max)."""
    return survival(pd.DataFrame([{"method": method, "k_max": k_max, **row}
                                  for (method, k_max), one in survivals.items() for row in one.tasks]), width=width)


FIGURES = (
    Entry("generation-expected", "Will it still generate?",
          "The share of the dense model's generation that each pruned model is expected to keep. The estimate uses "
          "only predictions of single tokens. For methods on which the predictor was not fitted, nine of ten models "
          "lie within the bars. docs/choosing.md says how the predictor was validated.",
          expected, scope="ratio", needs="generation", place=91),
    Entry("choices-survival", "Why multiple choice survives",
          "Each mark is one pruned model on one benchmark task. The left panels compare the change of the next-token "
          "probabilities over all tokens with the change over the choices alone. On the dotted line, both changes are "
          "equal. The right panel shows the drop of accuracy. Representation hierarchies, Figure 8.",
          survived, scope="ratio", needs="choices", place=91,
          differs="the benchmarks' own items and choices, not letters of MMLU"),
)
