"""Expectations, their validation and the survival of multiple choice drawn: the marks are the numbers."""
import numpy as np
import pandas as pd
import pytest

from kdp_core.base.measurements import Expectation
from kdp_core.figures import generation
from kdp_core.figures.style import FigureError


def expected(loss=0.4):
    losses = {"quality": loss, "agreement": 0.8}
    return Expectation(losses, {name: value - 0.1 for name, value in losses.items()},
                       {name: value + 0.2 for name, value in losses.items()}, {}, False, {}, "Expect this.")


def test_a_model_stands_at_what_it_is_expected_to_keep_with_its_range():
    drawn = generation.expected({("kdp", 3): expected(), ("remove", 3): expected(0.6)})
    axes = drawn.figure.axes
    assert [axis.get_title(loc="left") for axis in axes] == ["All measures", "Same tokens"]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["kdp", "remove"]
    row = drawn.data.iloc[0]
    assert (row["kept"], row["low"], row["high"]) == pytest.approx((60, 40, 70))
    points = [line.get_xdata()[0] for line in axes[0].get_lines() if line.get_marker() in ("o", "s")]
    assert points == pytest.approx([60, 40])


def test_predictions_stand_beside_what_was_measured():
    rows = pd.DataFrame({"method": ["a", "b", "a"], "ratio": [0.1, 0.1, 0.2], "loss_quality": [0.2, 0.5, 0.9]})
    drawn = generation.validation(rows, {"quality": np.array([0.1, 0.6, 0.8])})
    axis, = drawn.figure.axes
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.get_lines()[1:]]
    assert marks == [pytest.approx(pair) for pair in ((10, 20), (60, 50), (80, 90))]
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == ["a", "b"]


def test_choices_stand_at_both_divergences_and_their_drop():
    rows = pd.DataFrame({"task": ["piqa", "copa"], "kl": [1.0, 2.0], "kl_candidates": [0.1, 0.0],
                         "agreement": [0.5, 0.2], "agreement_candidates": [0.9, 0.8], "drop": [0.02, 0.1]})
    first, second, third = generation.survival(rows).figure.axes
    assert [tuple(np.ravel(line.get_xydata())) for line in first.get_lines()[:2]] == [(1.0, 0.1), (2.0, 1e-4)]
    assert [tuple(np.ravel(line.get_xydata())) for line in second.get_lines()[:2]] == [(50, 90), (20, 80)]
    assert [line.get_ydata()[0] for line in third.get_lines()] == [2, 2, 10, 10]


def test_nothing_to_draw():
    with pytest.raises(FigureError):
        generation.expected({})
    with pytest.raises(FigureError):
        generation.survival(pd.DataFrame())
