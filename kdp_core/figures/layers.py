"""Which layers each pruned model lacks.

The module draws Figure 4 of LoRP (2026), and it also shows attentions and MLPs that are removed alone. This module
reads the facts of the pruned models and computes nothing.
"""
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kdp_core.base.records import PrunedFacts
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import (
    GREY,
    PAGE_IN,
    Drawn,
    FigureError,
    Looks,
    labels_of,
    legend_below,
    looks_of,
    marks,
    quiet,
    whole_numbers,
)
from kdp_core.results.columns import KEYS, Point, span


def pruned_layers(points: Sequence[Point], *, looks: Looks | None = None, width: float = PAGE_IN,
                  strip_height: float = 0.13) -> Drawn:
    """LoRP's Figure 4: the layers that are removed or replaced, with a panel for each model and ratio.

    Each variant, calibration set and K max has a strip. A gap separates neighbouring blocks. If only the attention of a
    layer is removed, the bar fills the upper half of the layer. If only the MLP is removed, the bar fills the lower
    half. A strip without bars belongs to a method that changes weights inside the layers. Raises FigureError if no
    point is a pruned model.
    """
    pruned = [point for point in points if point.facts is not None]
    if not pruned:
        raise FigureError("no pruned model among the points; there are no layers to show")
    known, ratios = looks_of([point.method for point in pruned], looks), sorted({point.ratio for point in pruned})
    models = {model: [point for point in pruned if point.model == model]
              for model in sorted({point.model for point in pruned})}
    order = list(known)
    keys = {model: sorted({(p.method, p.calib, p.k_max) for p in own}, key=lambda key: (order.index(key[0]), key[1:]))
            for model, own in models.items()}
    label = labels_of([key for own in keys.values() for key in own])
    halves = any(point.facts.parts for point in pruned)
    with quiet():
        heights = [len(own) * strip_height + 0.45 for own in keys.values()]
        figure = Figure(figsize=(width, sum(heights) + 0.15 + (0.2 if halves else 0)))
        grid = figure.subplots(len(models), len(ratios), squeeze=False, sharey="row", height_ratios=heights)
        for axes, (model, own) in zip(grid, models.items(), strict=True):
            for axis, ratio in zip(axes, ratios, strict=True):
                _strips(axis, keys[model], {(p.method, p.calib, p.k_max): p.facts for p in own if p.ratio == ratio},
                        {name: marks(look)["color"] for name, look in known.items()})
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
    whole_numbers(axis.xaxis)
    axis.grid(False)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


def _runs(pruned: Sequence[Point]) -> pd.DataFrame:
    """One row for each block of removed layers, and one row for each part that is removed alone."""
    rows = []
    for point in pruned:
        keys, facts = dict(zip(KEYS, point[:5], strict=True)), point.facts
        rows += [{**keys, "start": start, "stop": stop, "part": "whole", "block": span((start, stop)),
                  "layers": facts.layers_before} for start, stop in facts.blocks]
        rows += [{**keys, "start": layer, "stop": layer + 1, "part": part, "block": span((layer, layer + 1)),
                  "layers": facts.layers_before} for layer, part in facts.parts]
    return pd.DataFrame(rows, columns=[*KEYS, "start", "stop", "part", "block", "layers"])


FIGURES = (
    Entry("layers", "Removed layers",
          "The layers that each grid point removes or replaces, with one panel for each ratio. If only the attention "
          "of a layer is removed, the upper half of the layer is filled; if only the MLP is removed, the lower half "
          "is filled. LoRP, Figure 4.",
          pruned_layers, scope="all", place=20, differs="attentions and MLPs that are removed alone are half layers"),
)
