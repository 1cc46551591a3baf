"""Similarity of layers drawn: maps, titles and data are those of the records."""
import numpy as np
import pytest

from kdp_core.figures import similarity as similarity_figures
from kdp_core.figures import style
from kdp_core.figures.locality import locality
from tests.kdp_core import points


def labelled(drawn):
    """Axes with data, each with a label on both axes; colour bars left out."""
    axes = [axis for axis in drawn.figure.axes if axis.get_label() != "<colorbar>"]
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def test_similarity_maps():
    record = points.similarity()
    drawn = similarity_figures.similarity_maps(record)
    maps = labelled(drawn)
    assert [axis.get_title(loc="left") for axis in maps] == list(similarity_figures.MAPS.values())
    np.testing.assert_allclose(maps[1].images[0].get_array(), record.cka_linear_LL.numpy())
    assert {axis.images[0].get_clim() for axis in maps[:3]} == {(0.3, 1.0)}
    assert "left out (12 of 1,000)" in drawn.figure.get_suptitle()
    assert len(drawn.data) == 49
    pair = drawn.data.set_index(["state_a", "state_b"]).loc[(2, 5)]
    assert pair["cosine"] == pytest.approx(float(record.cosine_LL[2, 5]))


def test_models_stand_side_by_side_on_one_scale():
    drawn = similarity_figures.side_by_side({"one": points.similarity(), "two": points.similarity(9)})
    maps = [axis for axis in drawn.figure.axes if axis.get_xlabel() == "State"]
    assert len(maps) == 4 and len({axis.collections[0].get_clim() for axis in maps}) == 1
    np.testing.assert_allclose(maps[1].collections[0].get_array().ravel(), points.similarity(9).cosine_LL.flatten())
    rls = locality(points.similarity())
    assert maps[0].get_title(loc="left") == f"one: Cosine\nRLS {rls:.2f}"
    assert maps[2].get_title(loc="left") == "one: CKA, linear" and len(drawn.data) == 49 + 81


def test_one_model_fills_one_line():
    drawn = similarity_figures.side_by_side({"one": points.similarity()})
    assert len([axis for axis in drawn.figure.axes if axis.get_xlabel() == "State"]) == 2


def test_no_models():
    with pytest.raises(style.FigureError, match="at least one model"):
        similarity_figures.side_by_side({})
