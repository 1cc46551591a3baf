"""Figures of the kernel space and of the states' paths: Figures 4, 9 and 10 of the KDP paper (ICLR 2026).

The heat maps state the error of each prediction, which the paper does not report. Measures beside the paths show how
straight the paths are. The measures are also computed on the states themselves, because t-SNE distorts the paths. This
module reads the records of kdp_core.study.views and computes nothing.
"""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from mpl_toolkits.mplot3d.axes3d import Axes3D

from kdp_core.base.measurements import KernelView, Trajectories
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import COLORS, DASHES, GREY, PAGE_IN, Drawn, FigureError, quiet

if TYPE_CHECKING:
    from torch import Tensor

PANELS = ("predicted", "true", "difference")
MARKS = {("states", ""): ("states", COLORS[0], "-", "o"),
         ("states", "_unrelated"): ("states, unrelated steps", COLORS[0], DASHES[1], "o"),
         ("t-SNE", ""): ("t-SNE plane", COLORS[1], "-", "s"),
         ("t-SNE", "_unrelated"): ("t-SNE plane of unrelated steps", COLORS[1], DASHES[1], "s")}


def heat_maps(kernel_views: Mapping[str, KernelView], *, colormap: str = "viridis", width: float = PAGE_IN) -> Drawn:
    """KDP's Figures 4 and 9: predicted and true features at a few positions, and their difference, by block.

    The features of a position fill a grid line by line, from the top left. The grid is as square as possible (32 x 32
    for 1,024 features). Predicted and true features of a block share one colour range; the difference has its own
    colour range around 0. The keys of `kernel_views` are the labels of the blocks, such as `14-16`. Raises FigureError
    without views.
    """
    if not kernel_views:
        raise FigureError("no trained block to look into: give at least one view of a kernel space")
    with quiet():
        figure = Figure(figsize=(width, 0.25 + sum(_band_height(view, width) for view in kernel_views.values())))
        bands = figure.subfigures(len(kernel_views), 1, squeeze=False)[:, 0]
        for band, (label, view) in zip(bands, kernel_views.items(), strict=True):
            _band(band, label, view, colormap)
        figure.suptitle(_words(list(kernel_views.values())), x=0.01, ha="left", fontsize=7, color=GREY)
    frame = pd.concat([_features(label, view) for label, view in kernel_views.items()], ignore_index=True)
    return Drawn(figure, frame)


def grid_of(features: int) -> tuple[int, int]:
    """The numbers of lines and columns of a grid with `features` cells. The grid is as square as possible and has no
    more lines than columns."""
    lines = next(lines for lines in range(math.isqrt(features), 0, -1) if features % lines == 0)
    return lines, features // lines


def _across(view: KernelView) -> int:
    """Number of positions side by side.

    The page has space for three groups of three panels side by side; further groups follow on the next line.
    """
    return min(len(view.positions), 3)


def _band_height(view: KernelView, width: float) -> float:
    lines, columns = grid_of(view.true_PF.shape[1])
    panel = min(0.85 * width / (3 * _across(view)) * lines / columns, 1.6)
    return math.ceil(len(view.positions) / 3) * (panel + 0.35) + 0.18


def _band(band: SubFigure, label: str, view: KernelView, colormap: str) -> None:
    shape = grid_of(view.true_PF.shape[1])
    difference_PF = view.predicted_PF - view.true_PF
    both = (view.predicted_PF, view.true_PF)
    low, high = min(float(one_PF.min()) for one_PF in both), max(float(one_PF.max()) for one_PF in both)
    span = max(float(difference_PF.abs().max()), 1e-12)
    axes = band.subplots(math.ceil(len(view.positions) / 3), 3 * _across(view), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for place, position in enumerate(view.positions):
        group = axes[place // 3, 3 * (place % 3):3 * (place % 3) + 3]
        for axis, name, row_F in zip(group, PANELS, (view.predicted_PF[place], view.true_PF[place],
                                                     difference_PF[place]), strict=True):
            ranged = {"cmap": "RdBu_r", "vmin": -span, "vmax": span} if name == "difference" else {
                "cmap": colormap, "vmin": low, "vmax": high}
            _panel(axis, name, row_F.reshape(shape), ranged)
        group[0].set_title(f"position {position}: error {view.error_P[place]:.3f}", fontsize=6.5)
    # the bar that is made first is placed outside
    for name, axis in (("difference", axes[0, 2]), ("features", axes[0, 1])):
        bar = band.colorbar(axis.images[0], ax=axes, location="right", aspect=11, pad=0.01, shrink=0.7,
                            ticks=MaxNLocator(3, symmetric=True))
        bar.ax.tick_params(labelsize=5.5, pad=1.5)
        bar.ax.set_title(name, fontsize=5.5, pad=3)
    words = (f"Block {label}: error over all held-out tokens {view.error:.3f}, {view.error_unchanged:.3f} if nothing "
             f"is done; the mean holds {view.mean_share:.0%} of $|\\varphi|^2$")
    band.suptitle(words, x=0.01, ha="left", fontsize=7)


def _panel(axis: Axes, name: str, values: Tensor, ranged: dict[str, Any]) -> None:
    axis.set_axis_on()
    axis.imshow(values.numpy(), interpolation="nearest", **ranged)
    axis.set(xticks=[], yticks=[])
    axis.set_xlabel(name, fontsize=6, labelpad=1.5)
    axis.grid(False)


def _words(views: Sequence[KernelView]) -> str:
    """The text at the top of the figure, which applies to all bands."""
    sequences = ", ".join(str(number) for number in sorted({view.sequence for view in views}))
    less = "less their mean over the training tokens" if views[0].mean_F.any() else "as they are"
    return f"Features {less}; held-out sequence {sequences}; error: squared, relative to the features less their mean"


def _features(label: str, view: KernelView) -> pd.DataFrame:
    """One row for each feature and position. All rows of one position contain the same errors."""
    columns = zip(view.positions, view.error_P, view.error_raw_P, view.predicted_PF, view.true_PF, strict=True)
    return pd.concat([pd.DataFrame({"block": label, "sequence": view.sequence, "position": position, "error": error,
                                    "error_raw": error_raw, "feature": range(len(true_F)),
                                    "predicted": predicted_F.tolist(), "true": true_F.tolist()})
                      for position, error, error_raw, predicted_F, true_F in columns], ignore_index=True)


def paths(trajectories: Trajectories, *, colormap: str = "viridis", width: float = PAGE_IN,
          height: float = 3.5) -> Drawn:
    """KDP's Figure 10: paths of samples through the layers. The long axis is the layer, and the other two axes are
    those of t-SNE.

    The panels on the right show how straight the paths are, in the space of the states and in the t-SNE plane. For
    comparison, the panels also show walks whose steps have the same lengths and unrelated directions. The colour of a
    sample depends on its position along the first axis of t-SNE at the middle layer. Raises FigureError without
    measures.
    """
    found, straight = trajectories, trajectories.straightness
    if not straight:
        raise FigureError("no measures of straightness to draw: five layers or more are needed")
    with quiet():
        figure = Figure(figsize=(width, height))
        left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
        _space(left.add_subplot(projection="3d"), found, colormap)
        words = (f"{len(found.sequences)} samples; of all points {found.own_neighbour:.0%} have their nearest "
                 "neighbour, in the space of the states, on their own path")
        figure.suptitle(words, x=0.01, ha="left", fontsize=7, color=GREY)
        axes = right.subplots(2, 1, sharex=True)
        _measure(axes[0], straight, "chord", "Distance of ends /\nlength of path")
        _measure(axes[1], straight, "turn", "Cosine of a step\nwith the next")
        axes[1].set_xlabel("Run of layers")
        figure.legend(handles=[Line2D([], [], label=name, color=color, linestyle=dashes, marker=marker,
                                      markerfacecolor=color if dashes == "-" else "white")
                              for name, color, dashes, marker in MARKS.values()], loc="outside lower center", ncols=4,
                      columnspacing=1.0)
    rows = [{"sequence": sequence, "token": token, "layer": layer, "x": float(xz_2[0]), "z": float(xz_2[1])}
            for sequence, token, xz_L2 in zip(found.sequences, found.tokens, found.xz_SL2, strict=True)
            for layer, xz_2 in zip(found.layers, xz_L2, strict=True)]
    return Drawn(figure, pd.DataFrame(rows))


def _space(axis: Axes3D, found: Trajectories, colormap: str) -> None:
    ranks_S = found.xz_SL2[:, len(found.layers) // 2, 0].argsort().argsort().tolist()
    colors = matplotlib.colormaps[colormap]
    for rank, xz_L2 in zip(ranks_S, found.xz_SL2.tolist(), strict=True):
        x_L, z_L = zip(*xz_L2, strict=True)
        axis.plot(x_L, found.layers, z_L, color=colors(rank / max(len(ranks_S) - 1, 1)), linewidth=0.55, alpha=0.8)
    axis.set(xlabel="t-SNE 1", ylabel="State", zlabel="t-SNE 2")
    axis.set_box_aspect((1, 1.9, 1), zoom=1.12)
    axis.view_init(elev=18, azim=-38)
    axis.tick_params(labelsize=5.5, pad=-2)
    for side in (axis.xaxis, axis.yaxis, axis.zaxis):
        side.set_pane_color((1, 1, 1, 0))
        side.labelpad = -5


def _measure(axis: Axes, straight: Sequence[Mapping[str, Any]], field: str, ylabel: str) -> None:
    names = list(dict.fromkeys(row["run"] for row in straight))
    order = sorted(names, key=lambda name: (not name[0].isdigit(), name == "all", name))
    spans = {row["run"]: f"{row['layer_first']}-{row['layer_last']}" for row in straight if not row["run"][0].isdigit()}
    for (space, suffix), (_, color, dashes, marker) in MARKS.items():
        value = {row["run"]: row[field + suffix] for row in straight if row["space"] == space}
        axis.plot(range(len(order)), [value[name] for name in order], color=color, linestyle=dashes, marker=marker,
                  markerfacecolor=color if dashes == "-" else "white")
    axis.set_xticks(range(len(order)), [spans.get(name, name.replace(" ", "\n")) for name in order])
    axis.set(ylabel=ylabel, ylim=(min(-0.05, axis.get_ylim()[0]), 1.05))


FIGURES = (
    Entry("trajectories", "Paths of the states",
          "Left: the path of one token of each sample through the layers. The long axis is the layer, and the other "
          "two axes are those of a t-SNE of all states. Right: how straight the paths are, where 1 is a straight "
          "line. Dashed lines are walks whose steps have the same lengths and unrelated directions, and a t-SNE of "
          "these walks. KDP paper, Figure 10.",
          paths, scope="calibrated", needs="views", place=80,
          differs="the measure of straightness, and the unrelated walks (`configs/views.yaml`)"),
    Entry("heatmaps", "Kernel space",
          "Predicted and true features after each block at a few positions of a held-out sequence, on one colour "
          "scale. The difference of the two has its own colour scale. KDP paper, Figures 4 and 9.",
          heat_maps, scope="variant", needs="viewed", place=80,
          differs="features without their mean, and errors: [views.md](views.md)"),
)
