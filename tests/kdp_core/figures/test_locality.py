"""Similarity by distance: means and RLS are those of the records."""
import math

import numpy as np
import pytest
import torch

from kdp_core.figures import locality as locality_figures
from kdp_core.figures import style
from tests.kdp_core import points


def test_rls_is_of_the_inputs_of_layers():
    own = points.similarity(5)
    s_LL = own.cosine_LL.double().numpy()
    mean = np.mean([s_LL[i, j] for i in range(4) for j in range(i + 1, 4)])
    assert locality_figures.locality(own) == pytest.approx(-math.log2(mean))
    assert locality_figures.locality(own._replace(cosine_LL=-torch.ones(5, 5))) is None


def test_means_by_distance_are_those_of_the_diagonals():
    own = points.similarity(6)
    drawn = locality_figures.by_distance({"one": own, "two": points.similarity(9)})
    rows = drawn.data[drawn.data["label"] == "one"].set_index("distance")
    s_LL = own.cosine_LL.numpy()
    for distance in range(1, 5):
        values = [s_LL[i, i + distance] for i in range(5 - distance)]
        assert rows.loc[distance, "cosine"] == pytest.approx(np.mean(values), rel=1e-6)
        assert rows.loc[distance, "pairs"] == 5 - distance and rows.loc[distance, "share"] == distance / 4
    axis, = drawn.figure.axes
    assert axis.get_xlabel() and axis.get_ylabel()
    assert axis.get_lines()[0].get_ydata().tolist() == pytest.approx(rows["cosine"].tolist())
    assert [line.get_linestyle() for line in axis.get_lines()] == ["-", "--"]


def test_no_models():
    with pytest.raises(style.FigureError, match="at least one model"):
        locality_figures.by_distance({})
