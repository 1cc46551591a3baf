"""Where in the depth models repeat themselves: similarity of states of several models, and how it falls with distance.

Figure 1 of the KDP paper (Ma et al., ICLR 2026), which has several models side by side, and Figures 1 and 2 of LoRP
(2026). Cosines are means over tokens as the similarity stage has them: massive-activation tokens left out unless its
treatment says otherwise, which LoRP does not do. RLS is kdp_core.states.similarity.locality. Reads numbers of the
similarity stage.
"""
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from kdp_core.base.records import Similarity
from kdp_core.figures.style import COLORS, COLUMN_IN, DASHES, MARKERS, PAGE_IN, Drawn, FigureError, legend_below, quiet
from kdp_core.states import similarity

MAPS = {"cosine_LL": "Cosine", "cka_linear_LL": "CKA, linear"}


def side_by_side(similarities: Mapping[str, Similarity], *, colormap: str = "viridis", width: float = PAGE_IN) -> Drawn:
    """KDP's and LoRP's Figure 1: cosine and linear CKA of all pairs of states, a column a model, on one colour scale.

    The keys are the titles. A cosine map carries the model's RLS. Raises FigureError without models.
    """
    if not similarities:
        raise FigureError("no similarity of layers to draw; give at least one model")
    alone = len(similarities) == 1
    low = min(float(getattr(own, name).min()) for own in similarities.values() for name in MAPS)
    panel = (width - 0.9) / (2 if alone else max(len(similarities), 2))
    with quiet():
        figure = Figure(figsize=(width, panel + 0.35 if alone else 2 * panel + 0.75))
        grid = figure.subplots(*((1, 2) if alone else (2, len(similarities))), squeeze=False)
        axes = grid.T if alone else grid
        for column, (title, own) in enumerate(similarities.items()):
            for row, (name, words) in enumerate(MAPS.items()):
                axis, rls = axes[row, column], locality(own) if name == "cosine_LL" else None
                image = axis.pcolormesh(own.layers, own.layers, getattr(own, name).numpy(), cmap=colormap, vmin=low,
                                        vmax=1, shading="nearest", rasterized=True)
                axis.set(title=f"{title}: {words}" + ("" if rls is None else f"\nRLS {rls:.2f}"), xlabel="State",
                         ylabel="" if column or (alone and row) else "State", aspect="equal")
                axis.grid(False)
                for side in (axis.xaxis, axis.yaxis):
                    side.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        figure.colorbar(image, ax=grid, location="right", shrink=0.8, aspect=25, pad=0.02, label="Similarity")
    frame = pd.concat([_pairs(title, own) for title, own in similarities.items()], ignore_index=True)
    return Drawn(figure, frame)


def locality(own: Similarity) -> float | None:
    """RLS of the layers' inputs, None where it is not defined."""
    return similarity.locality(_inputs(own))


def _inputs(own: Similarity) -> Tensor:
    """Cosines of what the layers read: all stored states but the last."""
    return own.cosine_LL[:-1, :-1].double()


def _pairs(title: str, own: Similarity) -> pd.DataFrame:
    return pd.DataFrame([{"label": title, "state_a": a, "state_b": b, "cosine": own.cosine_LL[i, j].item(),
                          "cka_linear": own.cka_linear_LL[i, j].item()}
                         for i, a in enumerate(own.layers) for j, b in enumerate(own.layers)])


def by_distance(similarities: Mapping[str, Similarity], *, width: float = COLUMN_IN, height: float = 2.3) -> Drawn:
    """LoRP's Figure 2: mean cosine of two layers' inputs by their distance as a share of the depth, a line a model.

    The band holds the middle half of the pairs of that distance, the legend the model's RLS. Raises FigureError without
    models.
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
