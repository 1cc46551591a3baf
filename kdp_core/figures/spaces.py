"""What pruning does to states, logits and probabilities: Figures 4 to 8 of the paper on representation hierarchies.

Paper: "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026). The paper shows cosines near 1 on a
linear axis. For single layers, this module draws 1 - cosine on a logarithmic axis. The logarithmic axis shows how much
nearer to 1 the cosine is in one space than in another. Bars and bands show one standard error over windows, prompts or
items. This module reads the records of kdp_core.study.spaces and computes only means over items.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from kdp_core.base.measurements import Probes, Spaces
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    COLORS,
    DASHES,
    GREY,
    MARKERS,
    PAGE_IN,
    PALE,
    Drawn,
    FigureError,
    Line,
    Looks,
    banded,
    deal,
    labels_of,
    legend_below,
    lines_of,
    looks_of,
    marks,
    plain_log,
    quiet,
    whole_numbers,
)

SPACES = {"h": "states", "z": "logits", "p": "probabilities"}
PARTS = {"attention": "attention left out", "mlp": "MLP left out", "whole": "layer left out"}
PART_MARKS = {part: {"color": COLORS[place], "marker": MARKERS[place]} for place, part in enumerate(PARTS)}
HISTORIES = {"dense": "the dense model's text", "own": "each model's own text"}


def _marks(place: int) -> dict[str, Any]:
    return {"color": COLORS[place], "marker": MARKERS[place], "linestyle": DASHES[place], "markersize": 2.2}


CURVES = {"angles": {f"angle_{space}": (words, _marks(place)) for place, (space, words) in enumerate(SPACES.items())},
          "split": {f"{kind}_{space}": (f"{words}, {kind}", _marks(place) | {"linestyle": dashes, "fillstyle": fill})
                    for place, (space, words) in enumerate(list(SPACES.items())[:2])
                    for kind, dashes, fill in (("orthogonal", DASHES[0], "full"), ("parallel", DASHES[1], "none"))}}
"""For each figure and each measure: the label and the marks."""


def by_layer(probes: Probes, *, width: float = PAGE_IN, height: float = 2.3) -> Drawn:
    """Figure 4: 1 - cosine of states, logits and probabilities by layer, after one part of this layer is removed."""
    return _layers(probes, "angles", "1 − cosine", width, height)


def split_by_layer(probes: Probes, *, width: float = PAGE_IN, height: float = 2.3) -> Drawn:
    """Figure 5: the change of states and logits along the dense vector and orthogonal to it, relative to the norm of
    the dense vector."""
    return _layers(probes, "split", "Change / norm", width, height)


def _layers(probes: Probes, figure_name: str, ylabel: str, width: float, height: float) -> Drawn:
    curves, frame = CURVES[figure_name], pd.DataFrame(probes.layers)
    if frame.empty:
        raise FigureError("no layer was left out; give spaces.probe at least one of its parts")
    parts = [part for part in PARTS if part in set(frame["part"])]
    with quiet():
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
        for axis, part in zip(axes, parts, strict=True):
            own = frame[frame["part"] == part]
            for name, (_, marked) in curves.items():
                _banded_line(axis, own["layer"], own[name], own[f"{name}_stderr"], marked)
            axis.set(yscale="log", title=PARTS[part].capitalize() if part != "mlp" else PARTS[part], xlabel="Layer")
            whole_numbers(axis.xaxis)
        plain_log(axes[0])
        axes[0].set_ylabel(ylabel)
        legend_below(figure, [Line2D([], [], label=words, **marked) for words, marked in curves.values()], width=width)
    kept = [column for name in curves for column in (name, f"{name}_stderr")]
    return Drawn(figure, frame[["layer", "part", *kept]])


def _banded_line(axis: Axes, x: pd.Series, y: pd.Series, error: pd.Series, marked: Mapping[str, Any]) -> None:
    """A line with a band of one standard error around the line. The lower edge of the band is at least a tenth of the
    line's value, so that logarithmic axes can show it."""
    y, error = y.astype(float), error.astype(float).fillna(0)
    axis.fill_between(x, (y - error).clip(lower=y / 10), y + error, color=marked["color"], alpha=0.2, linewidth=0)
    axis.plot(x, y.where(y > 0), **marked)


def estimates(probes: Probes, *, width: float = PAGE_IN, height: float = 2.7) -> Drawn:
    """Figure 6: the estimated changes against the measured changes, with one point for each token, layer and part.

    On the dotted line, the estimate equals the measured change. The estimates are of second order, so they are valid
    only where the change is small. Raises FigureError without tokens.
    """
    frame = pd.DataFrame(probes.tokens)
    if frame.empty:
        raise FigureError("no tokens were probed; there is nothing to compare the estimates with")
    parts = [part for part in PARTS if part in set(frame["part"])]
    with quiet():
        figure = Figure(figsize=(width, height))
        for axis, (measured, estimated, words) in zip(figure.subplots(1, 2), (
                ("angle_p", "estimate_p", "1 − cosine of probabilities"), ("kl", "estimate_kl", "KL (nats)")),
                strict=True):
            shown = frame[(frame[measured] > 0) & (frame[estimated] > 0)]
            for part in parts:
                own = shown[shown["part"] == part]
                axis.plot(own[measured], own[estimated], linestyle="none", markersize=2, alpha=0.5, fillstyle="none",
                          markeredgewidth=0.5, **PART_MARKS[part])
            axis.set(xscale="log", yscale="log", xlabel=f"Measured: {words}", ylabel="Estimate")
            axis.autoscale(False)
            axis.axline((1e-3, 1e-3), (1, 1), color=GREY, linestyle=":", linewidth=0.9, zorder=1)
            for side in (axis.xaxis, axis.yaxis):
                side.set_minor_locator(NullLocator())
        legend_below(figure, [*(Line2D([], [], linestyle="none", fillstyle="none", label=PARTS[part],
                                       **PART_MARKS[part]) for part in parts),
                              Line2D([], [], color=GREY, linestyle=":", label="equal")], width=width)
    return Drawn(figure, frame)


def by_step(spaces: Mapping[tuple[str, int], Spaces], *, looks: Looks | None = None, width: float = PAGE_IN,
            height: float = 1.55) -> Drawn:
    """Figure 7: the cosine between each pruned model and the dense model by decoding step, in states, logits and
    probabilities.

    In the upper panels both models read the dense model's text. In the lower panels each model reads its own text.

    spaces: the record of each pruned model, by (variant, K max).
    Raises FigureError without records.
    """
    if not spaces:
        raise FigureError("no decoding to draw; give the spaces of at least one pruned model")
    frame = pd.concat([pd.DataFrame(own.decoding).assign(method=method, k_max=k_max, prompts=own.prompts)
                       for (method, k_max), own in spaces.items()], ignore_index=True)
    label = labels_of([(method, "", k_max) for method, k_max in spaces])
    lines = lines_of([(method, k_max, label((method, "", k_max))) for method, k_max in spaces], looks)
    # all panels have one scale; otherwise a fall to 0.9 would look like a fall to 0
    low = min(float((1 - frame[f"angle_{space}"] - frame[f"angle_{space}_stderr"].astype(float).fillna(0)).min())
              for space in SPACES)

    def draw(axes: Sequence[Axes], title: str, shown: Sequence[Line]) -> None:
        for place, axis in enumerate(axes):
            history, space = list(HISTORIES)[place // len(SPACES)], list(SPACES)[place % len(SPACES)]
            own = frame[frame["history"] == history]
            for line in lines:
                one = own[(own["method"] == line.variant) & (own["k_max"] == line.key)]
                if line not in shown:
                    axis.plot(one["step"], 1 - one[f"angle_{space}"], color=PALE, linewidth=0.6, zorder=1)
                    continue
                error = one[f"angle_{space}_stderr"].astype(float).fillna(0)
                cosine = 1 - one[f"angle_{space}"]
                axis.fill_between(one["step"], cosine - error, cosine + error, color=line.marks["color"], alpha=0.15,
                                  linewidth=0)
                axis.plot(one["step"], cosine, **line.marks | {"markevery": max(1, len(one) // 6)})
            axis.set(title=SPACES[space].capitalize() + (f": {title}" if title else ""), xlabel="Decoding step",
                     ylim=(low - 0.05, 1.05))
            if space == "h":
                axis.set_ylabel(f"Cosine,\n{HISTORIES[history]}")
            whole_numbers(axis.xaxis)

    figure = banded(deal(lines, looks), (2, 3), draw, width=width, height=height)
    kept = ["method", "k_max", "prompts", "history", "step", "same_text", "same_text_stderr",
            *(column for name in ("angle_h", "angle_z", "angle_p", "kl") for column in (name, f"{name}_stderr"))]
    return Drawn(figure, frame[kept])


def choices(spaces: Mapping[tuple[str, int], Spaces], *, looks: Looks | None = None, width: float = PAGE_IN,
            line_height: float = 0.17) -> Drawn:
    """Figure 8: the change of the probabilities over all tokens, and over the letters of an item alone. There is one
    line for each model.

    The left panel shows 1 - cosine with the probabilities of the dense model. The middle panel shows how often the most
    likely token stays the same. The right panel shows the rank of the dense model's likeliest letter among all tokens.

    spaces: the record of each pruned model, by (variant, K max).
    Raises FigureError if no item was answered.
    """
    answered = {key: pd.DataFrame(own.choices) for key, own in spaces.items() if own.choices}
    if not answered:
        raise FigureError("no multiple-choice item was answered; raise spaces.compare.choices")
    names = ("angle_p", "agreement")
    frame = pd.DataFrame([_over_items(key, own, names) for key, own in answered.items()])
    known, label = looks_of([method for method, _ in answered], looks), labels_of([(name, "", k) for name, k in spaces])
    with quiet():
        figure = Figure(figsize=(width, max(len(frame) * line_height + 1.15, 2.1)))
        first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 0.8))
        for axis, name, words in ((first, "angle_p", "1 − cosine of probabilities"),
                                  (second, "agreement", "Same most likely (%)")):
            scale = 100 if name == "agreement" else 1
            for place, row in frame.iterrows():
                color = marks(known[row["method"]])["color"]
                for suffix, fill, shift in (("", "full", -0.12), ("_candidates", "none", 0.12)):
                    axis.errorbar([scale * row[name + suffix]], [place + shift], color=color, fillstyle=fill,
                                  xerr=scale * row[f"{name}{suffix}_stderr"], elinewidth=0.7, capsize=1.5,
                                  marker="o" if suffix == "" else "D")
            axis.set(xlabel=words, ylim=(len(frame) - 0.5, -0.5), yticks=range(len(frame)))
            axis.set_yticklabels([label((name, "", k_max)) for name, k_max in answered] if axis is first else [])
        ranks = sorted(next(iter(answered.values()))["rank"])
        third.step(ranks, [100 * (place + 1) / len(ranks) for place in range(len(ranks))], where="post", color=GREY)
        third.set(xscale="log", xlim=(0.9, 1.1 * max(10, ranks[-1])), ylim=(0, 104), ylabel="Items (%)",
                  xlabel="Rank of the likeliest letter")
        third.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        third.xaxis.set_minor_formatter(NullFormatter())
        legend_below(figure, [Line2D([], [], color=GREY, linestyle="none", marker="o", label="all tokens"),
                              Line2D([], [], color=GREY, linestyle="none", marker="D", fillstyle="none",
                                     label="the letters alone")], width=width)
    return Drawn(figure, frame)


def _over_items(key: tuple[str, int], own: pd.DataFrame, names: Sequence[str]) -> dict[str, Any]:
    """Means over items with their standard errors."""
    row: dict[str, Any] = {"method": key[0], "k_max": key[1], "items": len(own)}
    for name in (f"{name}{suffix}" for name in names for suffix in ("", "_candidates")):
        row |= {name: own[name].mean(), f"{name}_stderr": own[name].sem() if len(own) > 1 else 0.0}
    return row | {"mass": own["mass"].mean(), "mass_other": own["mass_other"].mean(),
                  "rank_median": own["rank"].median()}


FIGURES = (
    Entry("spaces-layers", "Three spaces, layer by layer",
          "1 - cosine of states, logits and probabilities with those of the dense model. The comparison is made "
          "directly after a layer from which the attention, the MLP or both are removed. Bands are one standard error "
          "over held-out windows. Representation hierarchies, Figure 4.",
          by_layer, scope="calibrated", needs="spaces", place=90,
          differs="logarithmic axis; the final norm is applied to inner states; the released code does not apply it, "
                  "nor does `spaces.probe.final_norm: false`"),
    Entry("spaces-split", "Along and across",
          "The change of states and logits when a part of a layer is removed. The change is split into the part along "
          "the dense vector and the rest. Both are divided by the norm of the dense vector. Representation "
          "hierarchies, Figure 5.",
          split_by_layer, scope="calibrated", needs="spaces", place=90),
    Entry("spaces-estimates", "Estimates beside changes",
          "Second-order estimates, made from the change of the logits, against the measured change. There is one "
          "point for each token, layer and removed part. On the dotted line, the estimate equals the measured change. "
          "Representation hierarchies, Figure 6.",
          estimates, scope="calibrated", needs="spaces", place=90, differs="all layers, not layer 14 alone"),
    Entry("spaces-steps", "Decoding step by step",
          "The cosine between each pruned model and the dense model after a prompt, by decoding step. In the upper "
          "panels, both models read the text of the dense model. In the lower panels, each model reads its own text. "
          "Bands are one standard error over prompts. Representation hierarchies, Figure 7.",
          by_step, scope="ratio", needs="spaces", place=90,
          differs="greedy decoding, several prompts and standard errors; the paper samples once at T = 0.5"),
    Entry("spaces-choices", "Letters beside all tokens",
          "Multiple-choice items that ask for a letter. The figure shows the change of the probabilities over all "
          "tokens and over the letters alone. It also shows the ranks of the letters among all tokens of the dense "
          "model. Bars are one standard error over items. Representation hierarchies, Figure 8.",
          choices, scope="ratio", needs="spaces", place=90,
          differs="items are held-out continuations asked for a letter, not MMLU"),
)
