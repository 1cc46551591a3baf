"""Similarity of the hidden states before each pair of layers, for one model or for several models side by side.

Figure 1 of the KDP paper (Ma et al., ICLR 2026), which has several models side by side, and Figure 1 of LoRP (2026).
Cosines are means over tokens. The default treatment (`similarity.treatment`) leaves massive tokens out; LoRP keeps the
massive tokens. This module reads the numbers of the similarity stage and computes only RLS
(kdp_core.states.similarity.locality).
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdp_core.base.records import Similarity
from kdp_core.figures._entry import Entry
from kdp_core.figures.locality import locality
from kdp_core.figures.style import GREY, PAGE_IN, Drawn, FigureError, quiet, whole_numbers

MAPS = {"cosine": "Cosine", "cka_linear": "CKA, linear", "cka_rbf": "CKA, RBF", "angular": "Angular distance"}
"""For each matrix of the record: the title of its map."""
SIDE_BY_SIDE = {"cosine_LL": "Cosine", "cka_linear_LL": "CKA, linear"}
"""The matrices that are shown for several models, and their titles."""
TREATMENTS = {"mask": "left out", "normalise": "scaled to the norm of the others", "raw": "kept as they are"}


def similarity_maps(similarity: Similarity, *, colormap: str = "viridis", width: float = PAGE_IN) -> Drawn:
    """KDP's Figure 1 for one model: cosine, linear and RBF CKA of all pairs of states, and their angular distance.

    The maps of cosine, linear CKA and RBF CKA have one common colour scale. Both axes of a map show numbers of states;
    state k is the input of layer k. The line above the maps says how massive tokens were treated, because every
    similarity depends on this treatment.
    """
    layers = similarity.layers
    matrices = {name: getattr(similarity, f"{name}_LL") for name in MAPS}
    similar = [float(matrices[name].min()) for name in MAPS if name != "angular"]
    bottom = math.floor(10 * min(similar)) / 10
    limits = {name: (bottom, 1.0) for name in MAPS} | {"angular": (0.0, max(float(matrices["angular"].max()), 1e-3))}
    with quiet():
        figure = Figure(figsize=(width, width / 4 + 0.75))
        axes = figure.subplots(1, 4, sharey=True)
        for axis, (name, title) in zip(axes, MAPS.items(), strict=True):
            image = axis.imshow(matrices[name].numpy(), cmap=f"{colormap}_r" if name == "angular" else colormap,
                                vmin=limits[name][0], vmax=limits[name][1], origin="lower", interpolation="nearest")
            _state_axis(axis, layers)
            axis.set(title=title, xlabel="State")
            if name in ("cka_rbf", "angular"):
                beside = [axis] if name == "angular" else list(axes[:3])
                figure.colorbar(image, ax=beside, location="bottom", shrink=0.9 if name == "angular" else 0.5,
                                aspect=18 if name == "angular" else 30, pad=0.03,
                                label="Angle / π" if name == "angular" else "Similarity")
        axes[0].set_ylabel("State")
        figure.suptitle(_treatment(similarity), x=0.01, ha="left", fontsize=7, color=GREY)
    return Drawn(figure, _pairs(layers, matrices))


def _state_axis(axis: Axes, layers: Sequence[int]) -> None:
    places = list(range(0, len(layers), max(1, math.ceil(len(layers) / 6))))
    axis.set_xticks(places, [str(layers[place]) for place in places])
    axis.set_yticks(places, [str(layers[place]) for place in places])
    axis.grid(False)


def _treatment(similarity: Similarity) -> str:
    how = TREATMENTS.get(similarity.treatment, similarity.treatment)
    count = f" ({similarity.masked:,} of {similarity.tokens + similarity.masked:,})" if similarity.masked else ""
    return f"Massive-activation tokens {how}{count}; {similarity.tokens:,} tokens"


def _pairs(layers: Sequence[int], matrices: Mapping[str, Any]) -> pd.DataFrame:
    pairs = [(i, j) for i in range(len(layers)) for j in range(len(layers))]
    return pd.DataFrame({"state_a": [layers[i] for i, _ in pairs], "state_b": [layers[j] for _, j in pairs],
                         **{name: matrix.flatten().tolist() for name, matrix in matrices.items()}})


def side_by_side(similarities: Mapping[str, Similarity], *, colormap: str = "viridis", width: float = PAGE_IN) -> Drawn:
    """KDP's and LoRP's Figure 1: cosine and linear CKA of all pairs of states, one column for each model.

    All maps share one colour scale. The keys of `similarities` are the titles of the maps. The title of a cosine map
    also gives the model's RLS. Raises FigureError without models.
    """
    if not similarities:
        raise FigureError("no similarity of layers to draw; give at least one model")
    alone = len(similarities) == 1
    low = min(float(getattr(own, name).min()) for own in similarities.values() for name in SIDE_BY_SIDE)
    panel = (width - 0.9) / (2 if alone else max(len(similarities), 2))
    with quiet():
        figure = Figure(figsize=(width, panel + 0.35 if alone else 2 * panel + 0.75))
        grid = figure.subplots(*((1, 2) if alone else (2, len(similarities))), squeeze=False)
        axes = grid.T if alone else grid
        for column, (title, own) in enumerate(similarities.items()):
            for row, (name, words) in enumerate(SIDE_BY_SIDE.items()):
                axis, rls = axes[row, column], locality(own) if name == "cosine_LL" else None
                image = axis.pcolormesh(own.layers, own.layers, getattr(own, name).numpy(), cmap=colormap, vmin=low,
                                        vmax=1, shading="nearest", rasterized=True)
                axis.set(title=f"{title}: {words}" + ("" if rls is None else f"\nRLS {rls:.2f}"), xlabel="State",
                         ylabel="" if column or (alone and row) else "State", aspect="equal")
                axis.grid(False)
                whole_numbers(axis.xaxis)
                whole_numbers(axis.yaxis)
        figure.colorbar(image, ax=grid, location="right", shrink=0.8, aspect=25, pad=0.02, label="Similarity")
    frame = pd.concat([_pairs_of_model(title, own) for title, own in similarities.items()], ignore_index=True)
    return Drawn(figure, frame)


def _pairs_of_model(title: str, own: Similarity) -> pd.DataFrame:
    return pd.DataFrame([{"label": title, "state_a": a, "state_b": b, "cosine": own.cosine_LL[i, j].item(),
                          "cka_linear": own.cka_linear_LL[i, j].item()}
                         for i, a in enumerate(own.layers) for j, b in enumerate(own.layers)])


FIGURES = (
    Entry("similarity-models", "Similarity of layers, all models",
          "Cosine (mean over tokens) and linear CKA of the hidden states before each pair of layers, on one colour "
          "scale. RLS is low if layers are similar over the whole depth. KDP paper, Figure 1; LoRP, Figure 1.",
          side_by_side, scope="all", place=30,
          differs="unbiased CKA; massive tokens are left out, unless `similarity.treatment` is `raw` "
                  "(`configs/lorp.yaml`)"),
    Entry("similarity", "Similarity of layers",
          "Similarity of the hidden states before each pair of layers. KDP paper, Figure 1.",
          similarity_maps, scope="calibrated", place=30,
          differs="RBF CKA and angular distance too; massive tokens as above"),
)
