"""Rows side by side: points, bars and strips are the numbers given, in bands where lines are many."""
import numpy as np
import pytest

from kdp_core.base.measurements import Diagnosis
from kdp_core.figures import scores as score_figures
from kdp_core.figures import style
from kdp_core.results.summary import summarise, tidy
from tests.kdp_core import points


def labelled(drawn):
    """Axes with data, each with a label on both axes; those without a panel left out."""
    axes = [axis for axis in drawn.figure.axes if axis.get_visible()]
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def legend(drawn):
    return [text.get_text() for text in drawn.figure.legends[0].get_texts()]


def test_score_against_ratio():
    grid = points.grid()
    other = [point._replace(model="other") for point in grid]
    drawn = score_figures.score_against_ratio(summarise([*grid, *other]))
    axes = labelled(drawn)
    assert len(axes) == 4 and [axis.get_ylabel() for axis in axes] == ["Accuracy (%)", "Perplexity"] * 2
    assert [axis.get_yscale() for axis in axes[:2]] == ["linear", "log"]
    kdp, = (line for line in axes[0].get_lines() if line.get_color() == style.COLORS[0] and len(line.get_xdata()) == 2
            and line.get_linestyle() == "-")
    assert list(kdp.get_xdata()) == pytest.approx([19, 38]) and list(kdp.get_ydata()) == pytest.approx([55, 40])
    assert legend(drawn) == ["kdp", "remove", "lossy", "dense"]
    bars = [bar.get_segments() for bar in axes[0].collections]
    assert len(bars) == 1 + 3  # dense and three methods carry their errors
    assert bars[1][0][:, 1].tolist() == pytest.approx([55 - 0.70711, 55 + 0.70711], abs=1e-4)


def test_lines_split_by_k_max():
    more = [*points.grid(), points.pruned("kdp", points.scores(24.0, 0.4, 0.6), k_max=5)]
    drawn = score_figures.score_against_ratio(summarise(more), metrics=("rp",))
    assert legend(drawn) == ["kdp, K max 3", "remove, K max 3", "lossy, K max 3", "kdp, K max 5", "dense"]


def test_a_panel_a_task():
    grid = points.grid()
    drawn = score_figures.tasks_against_ratio(tidy(grid), summarise(grid))
    axes = labelled(drawn)
    assert [axis.get_title(loc="left") for axis in axes] == ["text", "lastword", "continuation"]
    assert [axis.get_ylabel() for axis in axes] == ["ppl", "acc (%)", "acc_norm (%)"]
    assert [axis.get_yscale() for axis in axes] == ["log", "linear", "linear"]
    kdp, = (line for line in axes[2].get_lines() if line.get_color() == style.COLORS[0] and len(line.get_xdata()) == 2
            and line.get_linestyle() == "-")
    assert list(kdp.get_xdata()) == pytest.approx([19, 38]) and list(kdp.get_ydata()) == pytest.approx([65, 50])
    bar = axes[2].collections[1].get_segments()[0]
    assert bar[:, 1].tolist() == pytest.approx([64, 66])
    alone = score_figures.tasks_against_ratio(tidy(grid), summarise(grid), tasks=["lastword"])
    assert [axis.get_title(loc="left") for axis in labelled(alone)] == ["lastword"]
    row = alone.data[(alone.data["method"] == "kdp") & (alone.data["ratio"] == 0.2)].iloc[0]
    assert (row["lastword"], row["lastword_stderr"]) == (0.45, 0.01)


def many():
    """More rows than one panel holds, in two groups, and their looks."""
    names = [f"row{i}" for i in range(15)]
    grid = [points.dense(), *(points.pruned(name, points.scores(25.0 + i, 0.4, 0.6), ratio=ratio, share=ratio)
                              for i, name in enumerate(names) for ratio in (0.2, 0.4))]
    return grid, {name: [i, 0, "first" if i < 8 else "second"] for i, name in enumerate(names)}


def test_many_rows_stand_in_bands_with_the_others_behind():
    grid, known = many()
    drawn = score_figures.score_against_ratio(summarise(grid), metrics=("acc",), rows=known)
    bands = drawn.figure.subfigs
    assert [[text.get_text() for text in band.legends[0].get_texts()] for band in bands] == [
        [*(f"row{i}" for i in range(8)), "dense"], [*(f"row{i}" for i in range(8, 15)), "dense"]]
    first, second = labelled(drawn)
    assert first.get_title(loc="left") == "tiny, first"
    pale = [[line for line in axis.get_lines() if line.get_color() == style.PALE] for axis in (first, second)]
    assert [len(lines) for lines in pale] == [7, 8]
    assert first.get_ylim() == pytest.approx(second.get_ylim())


def test_pruned_layers():
    drawn = score_figures.pruned_layers(points.grid())
    low, high = labelled(drawn)
    assert [label.get_text() for label in low.get_yticklabels()] == ["kdp", "remove", "lossy"]
    assert [axis.get_title(loc="left") for axis in (low, high)] == ["tiny, 20 %", "tiny, 40 %"]
    assert len(drawn.data) == 12
    assert drawn.data.loc[6, ["start", "stop"]].tolist() == [2, 5]
    paths = high.collections[1].get_paths()
    assert [path.get_extents().x0 + 0.42 for path in paths] == pytest.approx([2, 5])
    assert [path.get_extents().x1 + 0.58 for path in paths] == pytest.approx([5, 8])


def test_a_part_that_goes_alone_fills_half_a_layer():
    point = points.pruned("joint_drop", points.scores(25.0, 0.4, 0.6), blocks=[(5, 6)])
    point = point._replace(facts=point.facts._replace(parts=[(2, "attention"), (7, "mlp")]))
    drawn = score_figures.pruned_layers([points.dense(), point])
    axis, = labelled(drawn)
    spans = [[path.get_extents() for path in bars.get_paths()] for bars in axis.collections[1:]]
    assert [[box.x0 + 0.42 for box in bars] for bars in spans] == [pytest.approx([x]) for x in (5, 2, 7)]
    whole, attention, mlp = (bars[0] for bars in spans)
    # rows count downwards: the upper half has the smaller numbers
    assert whole.y0 == attention.y0 < attention.y1 < mlp.y0 < mlp.y1 == pytest.approx(whole.y1)
    assert drawn.data["part"].tolist() == ["whole", "attention", "mlp"] and len(legend(drawn)) == 2


def diagnosis(dropped, first_error: float, layers: int = 12) -> Diagnosis:
    """Equal to the dense model before the first dropped layer, then errors that double with every state."""
    states = [k for k in range(layers) if k not in dropped] + [layers]
    error = [0.0 if k < min(dropped) else first_error * 2.0 ** (k - min(dropped)) for k in states]
    return Diagnosis(states, error, [1 - e / 100 for e in error], [2] * len(states), 1024, 8, list(dropped), 8.0, 1016,
                     0.5, 0.05, 0.8, 0.01, 3.0, 0.1, 3.4, 0.1, 0.4, 0.02)


def test_error_by_layer():
    drawn = score_figures.error_by_layer({("kdp", 3): diagnosis([4, 5, 8], 0.01),
                                          ("remove", 3): diagnosis([10, 11], 0.5)})
    axis, = labelled(drawn)
    assert axis.get_yscale() == "log" and legend(drawn) == ["kdp", "remove", "constant mean"]
    reference, kdp, remove = axis.get_lines()
    assert list(reference.get_ydata()) == [1, 1]
    # states 4, 5 and 8 are gone, and those before have no error to show: gaps, not lines across
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
    drawn = score_figures.error_by_layer({(str(i), 3): diagnosis([4], 0.01 * (i + 1)) for i in range(12)})
    lines = drawn.figure.axes[0].get_lines()[1:]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12


def test_nothing_to_draw():
    summary = summarise(points.grid())
    with pytest.raises(style.FigureError, match="unknown metric 'beauty'"):
        score_figures.score_against_ratio(summary, metrics=("beauty",))
    with pytest.raises(style.FigureError, match="no pruned model"):
        score_figures.score_against_ratio(summarise([points.dense()]))
    with pytest.raises(style.FigureError, match="no pruned model"):
        score_figures.pruned_layers([points.dense()])
    with pytest.raises(style.FigureError, match="no error of states"):
        score_figures.error_by_layer({("dense", 3): diagnosis([4], 0.0)})
    with pytest.raises(style.FigureError, match="'winogrande' has no score to draw; choose among"):
        score_figures.tasks_against_ratio(tidy(points.grid()), summary, tasks=["winogrande"])
