"""Removed layers drawn: strips are the blocks and parts of the facts."""
import pytest

from kdp_core.figures import style
from kdp_core.figures.layers import pruned_layers
from tests.kdp_core import points


def labelled(drawn):
    """Axes with data, each with a label on both axes; those without a panel left out."""
    axes = [axis for axis in drawn.figure.axes if axis.get_visible()]
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def legend(drawn):
    return [text.get_text() for text in drawn.figure.legends[0].get_texts()]


def test_pruned_layers():
    drawn = pruned_layers(points.grid())
    low, high = labelled(drawn)
    assert [label.get_text() for label in low.get_yticklabels()] == ["kdp", "remove", "lossy"]
    assert [axis.get_title(loc="left") for axis in (low, high)] == ["tiny, 20 %", "tiny, 40 %"]
    assert len(drawn.data) == 12
    assert drawn.data.loc[6, ["start", "stop"]].tolist() == [2, 5]
    paths = high.collections[1].get_paths()
    assert [path.get_extents().x0 + 0.42 for path in paths] == pytest.approx([2, 5])
    assert [path.get_extents().x1 + 0.58 for path in paths] == pytest.approx([5, 8])


def test_a_part_that_is_removed_alone_fills_half_a_layer():
    point = points.pruned("joint_drop", points.scores(25.0, 0.4, 0.6), blocks=[(5, 6)])
    point = point._replace(facts=point.facts._replace(parts=[(2, "attention"), (7, "mlp")]))
    drawn = pruned_layers([points.dense(), point])
    axis, = labelled(drawn)
    spans = [[path.get_extents() for path in bars.get_paths()] for bars in axis.collections[1:]]
    assert [[box.x0 + 0.42 for box in bars] for bars in spans] == [pytest.approx([x]) for x in (5, 2, 7)]
    whole, attention, mlp = (bars[0] for bars in spans)
    # strips count downwards: the upper half has the smaller numbers
    assert whole.y0 == attention.y0 < attention.y1 < mlp.y0 < mlp.y1 == pytest.approx(whole.y1)
    assert drawn.data["part"].tolist() == ["whole", "attention", "mlp"] and len(legend(drawn)) == 2


def test_nothing_to_draw():
    with pytest.raises(style.FigureError, match="no pruned model"):
        pruned_layers([points.dense()])
