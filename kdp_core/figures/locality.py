"""The similarity of two layers by their distance, with LoRP's measure of redundancy (RLS) in the legend.

Figure 2 of LoRP (2026). Cosines are means over tokens. The default treatment (`similarity.treatment`) leaves massive
tokens out; LoRP keeps the massive tokens. This module reads the numbers of the similarity stage and computes means by
distance and RLS (kdp_core.states.similarity.locality).
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdp_core.base.records import Similarity
from kdp_core.figures._entry import Entry
from kdp_core.figures.style import COLORS, COLUMN_IN, DASHES, MARKERS, Drawn, FigureError, legend_below, quiet

if TYPE_CHECKING:
    from torch import Tensor


def locality(own: Similarity) -> float | None:
    """RLS of the inputs of the layers. Returns None if RLS is not defined."""
    from kdp_core.states import similarity  # this import needs torch, which no other figure needs

    return similarity.locality(_inputs(own))


def _inputs(own: Similarity) -> Tensor:
    """Cosines between the inputs of the layers. The last stored state is omitted, because no layer reads it."""
    return own.cosine_LL[:-1, :-1].double()


def by_distance(similarities: Mapping[str, Similarity], *, width: float = COLUMN_IN, height: float = 2.3) -> Drawn:
    """LoRP's Figure 2: the mean cosine of two layers' inputs against the distance of the layers, for each model. The
    distance is a share of the depth.

    The band lies between the quartiles of the cosines at a distance. The legend states the RLS of the model. Raises
    FigureError without models.
    """
    if not similarities:
        raise FigureError("no similarity of layers to draw; give at least one model")
    frame = pd.concat([_distances(title, own) for title, own in similarities.items()], ignore_index=True)
    with quiet():
        figure = Figure(figsize=(width, height))
        axis = figure.subplots()
        for place, (title, own) in enumerate(similarities.items()):
            _line(axis, frame[frame["label"] == title], title, locality(own), place)
        axis.set(xlabel="Distance of layers / depth", ylabel="Cosine similarity", xlim=(0, 1.02))
        legend_below(figure, axis.get_lines(), width=width)
    return Drawn(figure, frame)


def _distances(title: str, own: Similarity) -> pd.DataFrame:
    s_LL, rls = _inputs(own), locality(own)
    depth = len(s_LL)
    rows: list[dict[str, Any]] = []
    for distance in range(1, depth):
        values = s_LL.diagonal(distance)
        rows.append({"label": title, "distance": distance, "share": distance / (depth - 1),
                     "cosine": values.mean().item(), "cosine_quartile_1": values.quantile(0.25).item(),
                     "cosine_quartile_3": values.quantile(0.75).item(), "pairs": len(values), "rls": rls})
    return pd.DataFrame(rows)


def _line(axis: Axes, rows: pd.DataFrame, title: str, rls: float | None, place: int) -> None:
    color = COLORS[place % len(COLORS)]
    axis.fill_between(rows["share"], rows["cosine_quartile_1"], rows["cosine_quartile_3"], color=color, alpha=0.15,
                      linewidth=0)
    axis.plot(rows["share"], rows["cosine"], color=color, linestyle=DASHES[place % len(DASHES)],
              marker=MARKERS[place % len(MARKERS)], markevery=max(1, len(rows) // 8),
              label=title if rls is None else f"{title}, RLS {rls:.2f}")


FIGURES = (
    Entry("locality", "Similarity by distance",
          "The mean cosine of two layers' inputs against the distance of the layers, as a share of the depth. The "
          "band contains the middle half of the pairs of layers at each distance. LoRP, Figure 2.",
          by_distance, scope="all", place=40, differs="the middle half of the pairs as a band"),
)
