"""Curves that are recorded while stand-ins are trained: losses, cosines, norms of the operators, divergence of the
outputs.

The module draws Figures 3 and 5 of the KDP paper (Ma et al., ICLR 2026), and adds held-out curves, which the paper does
not show. All curves come from the records of step 1, step 2 and compose; this module only draws the curves.
"""
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kdp_core.base.records import Composed, Inverse, KernelMap
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    COLORS,
    COLUMN_IN,
    DASHES,
    GREY,
    MARKERS,
    PAGE_IN,
    Drawn,
    FigureError,
    legend_below,
    plain_log,
    quiet,
    whole_numbers,
)


class Panel(NamedTuple):
    """One panel of training curves."""
    step: str
    field: str
    """Column of the curve. The column of the held-out values has the same name with the prefix `heldout_`."""
    title: str
    ylabel: str
    log: bool


PANELS = (Panel("kernel", "loss", "Step 1: loss", "Loss", True),
          Panel("kernel", "cos", "Step 1: cosine", "Cosine similarity", False),
          Panel("inverse", "loss", "Step 2: loss", "Loss", True))


def training_curves(kernels: Mapping[str, KernelMap], inverses: Mapping[str, Inverse], *,
                    width: float = PAGE_IN, height: float = 2.3) -> Drawn:
    """KDP's Figure 3: the loss and the cosine of step 1 and the loss of step 2, by epoch. Each block has one colour.

    Lines of held-out values are dashed. The keys of `kernels` and `inverses` are the labels of the blocks, such as
    `5-7`. Raises FigureError if no record holds a curve.
    """
    frame = pd.concat([_curves("kernel", kernels), _curves("inverse", inverses)], ignore_index=True)
    if frame.empty:
        raise FigureError("no training curves to draw: neither step has an epoch on record")
    labels = sorted({*kernels, *inverses}, key=_start)
    with quiet():
        figure = Figure(figsize=(width, height))
        for axis, panel in zip(figure.subplots(1, 3), PANELS, strict=True):
            part = frame[frame["step"] == panel.step]
            _curve_panel(axis, part, panel, labels)
        handles = [_handle(place, label) for place, label in enumerate(labels)]
        handles += [Line2D([], [], color=GREY, label="training"),
                    Line2D([], [], color=GREY, linestyle=DASHES[1], label="held out")]
        legend_below(figure, handles)
    return Drawn(figure, frame)


def _curve_panel(axis: Axes, part: pd.DataFrame, panel: Panel, labels: Sequence[str]) -> None:
    for field, dashes in ((panel.field, DASHES[0]), (f"heldout_{panel.field}", DASHES[1])):
        for place, label in enumerate(labels):
            rows = part[part["block"] == label]
            if field in rows and rows[field].notna().any():
                axis.plot(rows["epoch"], rows[field].astype(float), linestyle=dashes, **_marks(place, len(rows)))
    positive = all((line.get_ydata() > 0).all() for line in axis.get_lines())
    if panel.log and axis.get_lines() and positive:
        axis.set_yscale("log")
        plain_log(axis)
    _epochs(axis)
    axis.set(title=panel.title, ylabel=panel.ylabel)


DIVERGENCE = Panel("compose", "kl", "Joint training", "KL (nats per token)", False)


def joint_training(composed: Mapping[str, Composed], *, width: float = COLUMN_IN, height: float = 2.3) -> Drawn:
    """KL divergence of the outputs from those of the dense model, by epoch of joint training. Each grid point has one
    colour.

    The keys of `composed` are the labels of the grid points, such as `ratio 0.2, K max 3`. Lines of held-out values are
    dashed and begin at epoch 0, which is the closed form. Raises FigureError if no record holds a curve.
    """
    frame = _curves("compose", composed)
    if frame.empty:
        raise FigureError("no joint training to draw: compose has no epoch on record")
    with quiet():
        figure = Figure(figsize=(width, height))
        _curve_panel(figure.subplots(), frame, DIVERGENCE, list(composed))
        handles = [Line2D([], [], label=label, **_marks(place, 1) | {"markevery": None})
                   for place, label in enumerate(composed)]
        legend_below(figure, [*handles, Line2D([], [], color=GREY, label="training"),
                              Line2D([], [], color=GREY, linestyle=DASHES[1], label="held out")], width=width)
    return Drawn(figure, frame.rename(columns={"block": "point"}))


def operator_norms(kernels: Mapping[str, KernelMap], *, width: float = PAGE_IN, height: float = 2.3) -> Drawn:
    """KDP's Figure 5: norm of every operator A_i and norm of phi by epoch.

    Each block has one colour, and each operator has one line style. Raises FigureError if no record holds norms.
    """
    rows = [{"block": label, "epoch": row["epoch"], "quantity": quantity, "step": step, "value": value}
            for label, record in kernels.items() for row in record.curve
            for quantity, step, value in [("phi_norm", 0, row.get("phi_norm")),
                                          *(("operator_norm", i + 1, v) for i, v in
                                            enumerate(row.get("operator_norm") or []))] if value is not None]
    if not rows:
        raise FigureError("no operator norms to draw: step 1 has no epoch on record")
    frame, labels = pd.DataFrame(rows), sorted(kernels, key=_start)
    with quiet():
        figure = Figure(figsize=(width, height))
        axes = figure.subplots(1, 2)
        for (place, label), axis in ((item, axis) for item in enumerate(labels) for axis in axes):
            quantity = "operator_norm" if axis is axes[0] else "phi_norm"
            own = frame[(frame["block"] == label) & (frame["quantity"] == quantity)]
            for step, part in own.groupby("step", sort=True):
                dashes = DASHES[(max(step, 1) - 1) % len(DASHES)]
                axis.plot(part["epoch"], part["value"], linestyle=dashes, **_marks(place, len(part)))
        axes[0].set(title="Step operators", ylabel=r"$\|A_i\|_{\mathrm{op}}$")
        axes[1].set(title="Lift, less its mean", ylabel=r"$\|\varphi - \overline{\varphi}\|$")
        for axis in axes:
            _epochs(axis)
        steps = sorted(frame.loc[frame["step"] > 0, "step"].unique())
        legend_below(figure, [*(_handle(place, label) for place, label in enumerate(labels)),
                               *(Line2D([], [], color=GREY, linestyle=DASHES[(i - 1) % len(DASHES)], label=f"$A_{i}$")
                                 for i in steps)])
    return Drawn(figure, frame)


def _curves(step: str, fitted: Mapping[str, KernelMap | Inverse | Composed]) -> pd.DataFrame:
    """One row for each block and epoch. Columns whose values are lists are omitted."""
    return pd.DataFrame([{"step": step, "block": label,
                          **{name: value for name, value in row.items() if not isinstance(value, list)}}
                         for label, record in fitted.items() for row in record.curve])


def _start(label: str) -> tuple[int, str]:
    """The sort key of a block's label: the first layer of the block. Labels without a layer come last."""
    head = label.split("-")[0]
    return (int(head) if head.isdigit() else 10**6, label)


def _marks(place: int, points: int) -> dict[str, Any]:
    """Colour and marker of the line with the number `place`.

    Only a few points of the line have markers. The markers of different lines are shifted so that they do not hide each
    other.
    """
    every = max(1, points // 6)
    return {"color": COLORS[place % len(COLORS)], "marker": MARKERS[place % len(MARKERS)],
            "markevery": (place * every // 3 % every, every)}


def _handle(place: int, label: str) -> Line2D:
    return Line2D([], [], label=f"block {label}", **_marks(place, 1) | {"markevery": None})


def _epochs(axis: Axes) -> None:
    axis.set_xlabel("Epoch")
    whole_numbers(axis.xaxis)


FIGURES = (
    Entry("training", "Training",
          "The losses of both steps and the cosine of step 1 by epoch, with one line for each block. KDP paper, "
          "Figure 3.",
          training_curves, scope="variant", needs="trained", place=100,
          differs="held-out curves next to the training curves"),
    Entry("operators", "Operator norms",
          "The norms of the operators and of the mean-free features during training. KDP paper, Figure 5.",
          operator_norms, scope="variant", needs="trained", place=100,
          differs="a line for each block and operator instead of a shaded region"),
    Entry("joint", "Joint training",
          "The divergence of the outputs from those of the dense model by epoch, with one line for each grid point. "
          "Epoch 0 is the closed form.",
          joint_training, scope="variant", needs="trained jointly", place=100, differs="in no paper"),
)
