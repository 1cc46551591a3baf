"""Scores of variants drawn: points and bars are the numbers given, in bands if there are many lines."""
import pytest

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


def test_the_first_picture_is_as_wide_as_a_column_and_marks_our_own():
    looks = {"kdp": [0, 0, "", True], "remove": [1, 0, "", False], "lossy": [2, 0, "", False]}
    drawn = score_figures.score_against_size(summarise(points.grid()), looks=looks)
    assert drawn.figure.get_size_inches()[0] == style.COLUMN_IN
    above, below = labelled(drawn)
    assert (above.get_ylabel(), below.get_ylabel()) == ("Perplexity", "Accuracy (%)")
    assert above.get_subplotspec().rowspan.stop == below.get_subplotspec().rowspan.start
    assert legend(drawn) == ["kdp (ours)", "remove", "lossy", "dense"]
    widths = {line.get_color(): line.get_linewidth() for line in above.get_lines() if len(line.get_xdata()) == 2
              and line.get_linestyle() == "-"}
    assert widths[style.COLORS[0]] > widths[style.COLORS[1]] == widths[style.COLORS[2]]


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
    """More variants than one panel holds, in two groups, and their looks."""
    names = [f"row{i}" for i in range(15)]
    grid = [points.dense(), *(points.pruned(name, points.scores(25.0 + i, 0.4, 0.6), ratio=ratio, share=ratio)
                              for i, name in enumerate(names) for ratio in (0.2, 0.4))]
    return grid, {name: [i, 0, "first" if i < 8 else "second"] for i, name in enumerate(names)}


def test_many_variants_stand_in_bands_with_the_others_behind():
    grid, known = many()
    drawn = score_figures.score_against_ratio(summarise(grid), metrics=("acc",), looks=known)
    bands = drawn.figure.subfigs
    assert [[text.get_text() for text in band.legends[0].get_texts()] for band in bands] == [
        [*(f"row{i}" for i in range(8)), "dense"], [*(f"row{i}" for i in range(8, 15)), "dense"]]
    first, second = labelled(drawn)
    assert first.get_title(loc="left") == "tiny, first"
    pale = [[line for line in axis.get_lines() if line.get_color() == style.PALE] for axis in (first, second)]
    assert [len(lines) for lines in pale] == [7, 8]
    assert first.get_ylim() == pytest.approx(second.get_ylim())


def test_nothing_to_draw():
    summary = summarise(points.grid())
    with pytest.raises(style.FigureError, match="unknown metric 'beauty'"):
        score_figures.score_against_ratio(summary, metrics=("beauty",))
    with pytest.raises(style.FigureError, match="no pruned model"):
        score_figures.score_against_ratio(summarise([points.dense()]))
    with pytest.raises(style.FigureError, match="'winogrande' has no score to draw; choose among"):
        score_figures.tasks_against_ratio(tidy(points.grid()), summary, tasks=["winogrande"])
