"""Curves of trainings: what is drawn equals the curves of the records."""
import pytest

from kdp_core.figures import style
from kdp_core.figures import training as training_figures
from tests.kdp_core import points


def labelled(drawn):
    """Axes with data, each with a label on both axes; colour bars left out."""
    axes = [axis for axis in drawn.figure.axes if axis.get_label() != "<colorbar>"]
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def legend(drawn):
    return [text.get_text() for text in drawn.figure.legends[0].get_texts()]


def test_training_curves():
    kernels = {"8-10": points.kernel(8, 10), "5-8": points.kernel()}
    drawn = training_figures.training_curves(kernels, {"5-8": points.inverse()})
    axes = labelled(drawn)
    assert [len(axis.get_lines()) for axis in axes] == [4, 4, 2]
    assert all(axis.get_ylabel() for axis in axes)
    assert [axis.get_yscale() for axis in axes] == ["log", "linear", "log"]
    assert axes[0].get_lines()[0].get_ydata().tolist() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert axes[2].get_lines()[1].get_ydata().tolist() == pytest.approx([3, 3 / 2, 1])
    assert legend(drawn) == ["block 5-8", "block 8-10", "training", "held out"]
    assert len(drawn.data) == 4 + 4 + 3


def test_training_curves_without_held_out_values():
    record = points.kernel()
    bare = record._replace(curve=[{"epoch": 0, "loss": 0.0, "cos": 1.0, "heldout_loss": None}])
    axes = labelled(training_figures.training_curves({"5-8": bare}, {}))
    assert [len(axis.get_lines()) for axis in axes] == [1, 1, 0]
    assert axes[0].get_yscale() == "linear"  # a loss of 0 has no logarithm


def test_operator_norms():
    drawn = training_figures.operator_norms({"5-8": points.kernel(), "8-10": points.kernel(8, 10)})
    operators, lift = labelled(drawn)
    assert len(operators.get_lines()) == 3 + 2 and len(lift.get_lines()) == 2
    assert lift.get_lines()[0].get_ydata().tolist() == pytest.approx([1, 1.1, 1.2, 1.3])
    assert legend(drawn) == ["block 5-8", "block 8-10", "$A_1$", "$A_2$", "$A_3$"]


def test_nothing_to_draw():
    with pytest.raises(style.FigureError, match="no training curves"):
        training_figures.training_curves({"5-8": points.kernel(epochs=0)}, {})
    with pytest.raises(style.FigureError, match="no operator norms"):
        training_figures.operator_norms({})
