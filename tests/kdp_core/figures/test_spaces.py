"""Three spaces drawn: lines, bands and points are the numbers of the records; many variants stand in bands."""
import pytest

from kdp_core.base.measurements import Probes, Spaces
from kdp_core.figures import spaces as spaces_figures
from kdp_core.figures.style import COLORS, FigureError

NAMES = ("angle_h", "angle_z", "angle_p", "parallel_h", "orthogonal_h", "parallel_z", "orthogonal_z", "kl")


def measured(value: float, stderr: float | None = 0.001) -> dict:
    return {name: value * (place + 1) for place, name in enumerate(NAMES)} | {f"{name}_stderr": stderr
                                                                               for name in NAMES}


def probes(parts=("attention", "mlp", "whole"), stderr=0.001) -> Probes:
    layers = [{"layer": layer, "part": part, **measured(0.01 * (layer + 1), stderr)} for layer in range(4)
              for part in parts]
    tokens = [{"layer": layer, "part": part, "window": 0, "angle_p": 0.1 * (layer + 1), "estimate_p": 0.2,
               "kl": 0.0 if layer == 0 else 0.3, "estimate_kl": 0.3} for layer in range(4) for part in parts]
    return Probes(1.0, True, 2, [4, 9], layers, tokens, {})


def spaces(value=0.01, items=3) -> Spaces:
    decoding = [{"history": history, "step": step + 1, "same_text": 1.0, "same_text_stderr": 0.0,
                 **measured(value * (step + 1) * (1 if history == "dense" else 2))}
                for history in ("dense", "own") for step in range(5)]
    choices = [{"item": i, "candidates": 4, "angle_p": 0.2 + 0.1 * i, "kl": 0.1, "agreement": float(i > 0),
                "angle_p_candidates": 0.02, "kl_candidates": 0.01, "agreement_candidates": 1.0, "mass": 0.1,
                "mass_other": 0.2, "rank": 10.0 ** i} for i in range(items)]
    return Spaces(1.0, True, 2, 8, 5, decoding, [], choices, {})


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_layers_have_a_panel_a_part_and_a_line_a_space():
    drawn = spaces_figures.by_layer(probes())
    axes = drawn.figure.axes
    assert [axis.get_title(loc="left") for axis in axes] == ["Attention left out", "MLP left out", "Layer left out"]
    assert all(axis.get_xlabel() and axis.get_yscale() == "log" for axis in axes)
    states, _, probabilities = axes[1].get_lines()
    assert states.get_ydata().tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert probabilities.get_ydata().tolist() == pytest.approx([0.03, 0.06, 0.09, 0.12])
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes[1].get_lines()}) == 3
    assert legend(drawn.figure) == ["states", "logits", "probabilities"] and len(drawn.data) == 12
    band = axes[0].collections[0].get_datalim(axes[0].transData)
    assert (band.y0, band.y1) == pytest.approx((0.009, 0.041))


def test_one_window_has_no_band_and_one_part_one_panel():
    drawn = spaces_figures.split_by_layer(probes(parts=("mlp",), stderr=None))
    axis, = drawn.figure.axes
    assert axis.get_lines()[0].get_ydata().tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert legend(drawn.figure) == ["states, orthogonal", "states, parallel", "logits, orthogonal", "logits, parallel"]


def test_estimates_stand_beside_what_was_measured():
    drawn = spaces_figures.estimates(probes())
    angle, kl = drawn.figure.axes
    assert (angle.get_xscale(), kl.get_yscale()) == ("log", "log")
    points = angle.get_lines()[0]
    assert points.get_xdata().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4]) and set(points.get_ydata()) == {0.2}
    assert len(kl.get_lines()[0].get_xdata()) == 3  # no logarithm of 0
    assert legend(drawn.figure)[-1] == "equal" and len(drawn.data) == 12


def test_steps_of_both_histories():
    known = {"kdp": [3, 0, "a"], "remove": [0, 0, "b"]}
    drawn = spaces_figures.by_step({("kdp", 3): spaces(), ("remove", 3): spaces(0.02)}, looks=known)
    axes = drawn.figure.axes
    assert len(axes) == 6 and axes[0].get_ylabel().endswith("the dense model's text")
    kdp, remove = axes[5].get_lines()
    assert kdp.get_color() == COLORS[3] and remove.get_color() == COLORS[0]
    assert kdp.get_ydata().tolist() == pytest.approx([1 - 0.06 * step for step in range(1, 6)])
    assert legend(drawn.figure) == ["kdp", "remove"] and len(drawn.data) == 20


def test_many_models_stand_in_bands():
    names = [f"row{i}" for i in range(14)]
    known = {name: [i, 0, "few" if i < 4 else "many"] for i, name in enumerate(names)}
    drawn = spaces_figures.by_step({(name, 3): spaces() for name in names}, looks=known)
    assert [len(legend(band)) for band in drawn.figure.subfigs] == [4, 10]


def test_letters_beside_all_tokens():
    drawn = spaces_figures.choices({("kdp", 3): spaces(), ("kdp", 4): spaces()})
    angle, agreement, rank = drawn.figure.axes
    assert [label.get_text() for label in angle.get_yticklabels()] == ["kdp, K max 3", "kdp, K max 4"]
    row = drawn.data.iloc[0]
    assert row["angle_p"] == pytest.approx(0.3) and row["angle_p_stderr"] == pytest.approx(0.1 / 3 ** 0.5)
    assert (row["agreement"], row["agreement_candidates"], row["rank_median"]) == (pytest.approx(2 / 3), 1, 10)
    assert rank.get_lines()[0].get_xdata().tolist() == [1, 10, 100]
    assert rank.get_lines()[0].get_ydata().tolist() == pytest.approx([100 / 3, 200 / 3, 100])
    assert len(agreement.get_yticklabels()) == 2 and angle.get_xlabel() and rank.get_ylabel()


def test_nothing_to_draw():
    empty = probes()._replace(layers=[], tokens=[])
    for draw, record in ((spaces_figures.by_layer, empty), (spaces_figures.estimates, empty),
                         (spaces_figures.by_step, {}), (spaces_figures.choices, {("kdp", 3): spaces(items=0)})):
        with pytest.raises(FigureError):
            draw(record)
