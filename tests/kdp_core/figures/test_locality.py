"""Similarity of several models: maps, means by distance and RLS are those of the records."""
import math

import numpy as np
import pytest
import torch

from kdp_core.figures import locality as locality_figures
from kdp_core.figures import style
from tests.kdp_core import points


def test_models_stand_side_by_side_on_one_scale():
    drawn = locality_figures.side_by_side({"one": points.similarity(), "two": points.similarity(9)})
    maps = [axis for axis in drawn.figure.axes if axis.get_xlabel() == "State"]
    assert len(maps) == 4 and len({axis.collections[0].get_clim() for axis in maps}) == 1
    np.testing.assert_allclose(maps[1].collections[0].get_array().ravel(), points.similarity(9).cosine_LL.flatten())
    rls = locality_figures.locality(points.similarity())
    assert maps[0].get_title(loc="left") == f"one: Cosine\nRLS {rls:.2f}"
    assert maps[2].get_title(loc="left") == "one: CKA, linear" and len(drawn.data) == 49 + 81


def test_one_model_fills_one_line():
    drawn = locality_figures.side_by_side({"one": points.similarity()})
    assert len([axis for axis in drawn.figure.axes if axis.get_xlabel() == "State"]) == 2


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
    for draw in (locality_figures.side_by_side, locality_figures.by_distance):
        with pytest.raises(style.FigureError, match="at least one model"):
            draw({})
