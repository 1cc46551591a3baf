"""Figures of ablations: points, errors and the dense line are the numbers given, on the lines that they belong to."""
import pytest

from kdp_core.figures import ablations as ablation_figures
from kdp_core.figures import style
from tests.kdp_core import points
from tests.kdp_core.results.test_ablations import gathered, key, made, of_sizes, sizes


def panels(drawn):
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in drawn.figure.axes)
    return drawn.figure.axes


def curves(axis):
    """Lines drawn through points: x and y; the dense line and bars left out."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.get_lines()
            if line.get_color() != style.GREY and line.get_marker() in style.MARKERS]


def legend(drawn):
    return [text.get_text() for text in drawn.figure.legends[0].get_texts()]


def test_scores_against_the_kernel_size():
    drawn = ablation_figures.against(gathered(sizes(["ppl", "continuation"]), of_sizes()))
    ppl, continuation = panels(drawn)
    assert curves(ppl) == [([256, 1024, 2048], pytest.approx([60, 25, 24]))]
    assert curves(continuation) == [([256, 1024, 2048], pytest.approx([45, 65, 66]))]
    assert (ppl.get_xscale(), ppl.get_yscale(), continuation.get_yscale()) == ("log", "log", "linear")
    assert (ppl.get_xlabel(), continuation.get_ylabel()) == ("Kernel size 2m", "continuation (%)")
    assert [label.get_text() for label in ppl.get_xticklabels()] == ["256", "1,024", "2,048"]
    assert legend(drawn) == ["kdp", "dense"]
    bars = [segment[:, 1].tolist() for bar in continuation.collections for segment in bar.get_segments()]
    assert bars == [pytest.approx([44, 46]), pytest.approx([64, 66]), pytest.approx([65, 67])]
    assert list(drawn.data.columns) == ["model", "calib", "method", "ratio", "k_max", "params_removed",
                                        "kernel.features", "ppl", "ppl_stderr", "continuation", "continuation_stderr"]


def test_the_dense_line_has_its_error_too():
    axis, _ = panels(ablation_figures.against(gathered(sizes(), of_sizes())))
    level, = (line for line in axis.get_lines() if line.get_color() == style.GREY)
    assert level.get_ydata()[0] == pytest.approx(20)
    band, = axis.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == (pytest.approx(19.8), pytest.approx(20.2))


def test_variants_and_k_max_have_lines_of_their_own():
    grid = [points.dense(), *(points.pruned(name, points.scores(20.0 + 5 * k_max + extra, 0.4, 0.6), k_max=k_max)
                              for name, extra in (("kdp", 0), ("kdp_expanded", 3)) for k_max in (3, 4, 6))]
    chosen = [key(name, k_max=str(k_max)) for name in ("kdp", "kdp_expanded") for k_max in (3, 4, 6)]
    drawn = ablation_figures.against(gathered(made(["k_max"], chosen, metrics=["ppl"]), grid))
    axis, = panels(drawn)
    assert curves(axis) == [([3, 4, 6], pytest.approx([35, 40, 50])), ([3, 4, 6], pytest.approx([38, 43, 53]))]
    assert legend(drawn) == ["kdp", "kdp_expanded", "dense"] and axis.get_xscale() == "linear"


def test_the_ratio_is_the_share_really_removed():
    drawn = ablation_figures.against(gathered(made(["ratio"], [key(name, ratio=ratio) for name in ("kdp", "remove")
                                                               for ratio in ("0.2", "0.4")], metrics=["acc"]),
                                              points.grid()))
    axis, = panels(drawn)
    assert curves(axis)[0] == (pytest.approx([19, 38]), pytest.approx([55, 40]))
    assert axis.get_xlabel() == "Removed (%)"


def test_several_options_have_a_line_each():
    epochs = {"kdp": (10, 10), "short_1": (1, 10), "short_2": (10, 5)}
    settings = {name: {"kernel.epochs": one, "inverse.epochs": two} for name, (one, two) in epochs.items()}
    grid = [points.dense(), *(points.pruned(name, points.scores(ppl, 0.4, 0.6))
                              for name, ppl in (("kdp", 25.0), ("short_1", 50.0), ("short_2", 30.0)))]
    drawn = ablation_figures.against(gathered(made(["kernel.epochs", "inverse.epochs"], [key(n) for n in epochs],
                                                   settings=settings), grid))
    axis = panels(drawn)[0]
    assert curves(axis) == [([1, 10], pytest.approx([50, 25])), ([5, 10], pytest.approx([30, 25]))]
    assert legend(drawn) == ["Epochs of step 1", "Epochs of step 2", "dense"] and axis.get_xlabel() == "Epochs"


def test_variants_stand_side_by_side_without_lines():
    drawn = ablation_figures.against(gathered(made(["variant"], [key(name) for name in ("kdp", "remove", "lossy")]),
                                              points.grid()))
    axis = panels(drawn)[0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["kdp", "remove", "lossy"]
    assert legend(drawn) == ["pruned", "dense"] and curves(axis) == [([0, 1, 2], pytest.approx([25, 40, 80]))]
    assert all(line.get_linestyle() == "None" for line in axis.get_lines() if line.get_marker() in style.MARKERS)


def test_a_line_of_panels_a_model():
    grid = of_sizes()
    grid += [point._replace(model="other") for point in grid]
    ablation = sizes(["ppl"])
    both = ablation._replace(points=[*ablation.points, *({**point, "model": "other"} for point in ablation.points)])
    first, second = panels(ablation_figures.against(gathered(both, grid)))
    assert curves(first) == curves(second) and second.get_title(loc="left") == "other"
