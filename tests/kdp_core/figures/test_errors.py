"""Errors of states drawn: lines are the errors of the diagnoses, with gaps where there is none."""
import numpy as np
import pytest

from kdp_core.base.measurements import Diagnosis
from kdp_core.figures import style
from kdp_core.figures.errors import error_by_layer


def labelled(drawn):
    """Axes with data, each with a label on both axes; those without a panel left out."""
    axes = [axis for axis in drawn.figure.axes if axis.get_visible()]
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def legend(drawn):
    return [text.get_text() for text in drawn.figure.legends[0].get_texts()]


def diagnosis(dropped, first_error: float, layers: int = 12) -> Diagnosis:
    """Equal to the dense model before the first removed layer, then errors that double with every state."""
    states = [k for k in range(layers) if k not in dropped] + [layers]
    error = [0.0 if k < min(dropped) else first_error * 2.0 ** (k - min(dropped)) for k in states]
    return Diagnosis(states, error, [1 - e / 100 for e in error], [2] * len(states), 1024, 8, list(dropped), 8.0, 1016,
                     0.5, 0.05, 0.8, 0.01, 3.0, 0.1, 3.4, 0.1, 0.4, 0.02)


def test_error_by_layer():
    drawn = error_by_layer({("kdp", 3): diagnosis([4, 5, 8], 0.01),
                                          ("remove", 3): diagnosis([10, 11], 0.5)})
    axis, = labelled(drawn)
    assert axis.get_yscale() == "log" and legend(drawn) == ["kdp", "remove", "constant mean"]
    reference, kdp, remove = axis.get_lines()
    assert list(reference.get_ydata()) == [1, 1]
    # layers 4, 5 and 8 are removed, and the states before have no error to show: gaps, not lines across
    assert kdp.get_xdata().tolist() == list(range(13))
    shown = {k: y for k, y in enumerate(kdp.get_ydata()) if not np.isnan(y)}
    assert shown == pytest.approx({k: 0.01 * 2.0 ** (k - 4) for k in (6, 7, 9, 10, 11, 12)})
    assert np.flatnonzero(~np.isnan(remove.get_ydata())).tolist() == [12]
    assert kdp.get_markevery() is None and remove.get_marker() == "s"  # a lone state is still seen
    assert axis.get_ylim()[0] <= 0.04 and axis.get_ylim()[1] >= 2.56
    assert len(drawn.data) == 10 + 11
    row = drawn.data.set_index(["method", "state"]).loc[("kdp", 6)].drop("k_max")
    assert row.to_dict() == pytest.approx({"error": 0.04, "cosine": 0.9996, "masked": 2, "tokens": 1024})


def test_many_lines_of_errors_are_told_apart():
    drawn = error_by_layer({(str(i), 3): diagnosis([4], 0.01 * (i + 1)) for i in range(12)})
    lines = drawn.figure.axes[0].get_lines()[1:]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12


def test_nothing_to_draw():
    with pytest.raises(style.FigureError, match="no error of states"):
        error_by_layer({("dense", 3): diagnosis([4], 0.0)})
