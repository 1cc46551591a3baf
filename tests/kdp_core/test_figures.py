"""Figures: what is drawn equals what was given, labels with units, the same bytes twice, no traces left."""
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from kdp_core import figures, tables
from kdp_core.records import Diagnosis
from tests.kdp_core import points


def labelled(drawn):
    """Axes with data, each with a label on both axes; colour bars left out."""
    axes = [axis for axis in drawn.figure.axes if axis.get_label() != "<colorbar>"]
    assert all(axis.get_xlabel() for axis in axes)
    return axes


def legend(drawn):
    return [text.get_text() for text in drawn.figure.legends[0].get_texts()]


def test_similarity_maps():
    record = points.similarity()
    drawn = figures.similarity_maps(record)
    maps = labelled(drawn)
    assert [axis.get_title(loc="left") for axis in maps] == list(figures.MAPS.values())
    np.testing.assert_allclose(maps[1].images[0].get_array(), record.cka_linear_LL.numpy())
    assert {axis.images[0].get_clim() for axis in maps[:3]} == {(0.3, 1.0)}
    assert "left out (12 of 1,000)" in drawn.figure.get_suptitle()
    assert len(drawn.data) == 49
    pair = drawn.data.set_index(["state_a", "state_b"]).loc[(2, 5)]
    assert pair["cosine"] == pytest.approx(float(record.cosine_LL[2, 5]))


def test_training_curves():
    drawn = figures.training_curves({"8-10": points.kernel(8, 10), "5-8": points.kernel()}, {"5-8": points.inverse()})
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
    axes = labelled(figures.training_curves({"5-8": bare}, {}))
    assert [len(axis.get_lines()) for axis in axes] == [1, 1, 0]
    assert axes[0].get_yscale() == "linear"  # a loss of 0 has no logarithm


def test_operator_norms():
    drawn = figures.operator_norms({"5-8": points.kernel(), "8-10": points.kernel(8, 10)})
    operators, lift = labelled(drawn)
    assert len(operators.get_lines()) == 3 + 2 and len(lift.get_lines()) == 2
    assert lift.get_lines()[0].get_ydata().tolist() == pytest.approx([1, 1.1, 1.2, 1.3])
    assert legend(drawn) == ["block 5-8", "block 8-10", "$A_1$", "$A_2$", "$A_3$"]


def test_score_against_ratio():
    grid = points.grid()
    other = [point._replace(model="other") for point in grid]
    drawn = figures.score_against_ratio(tables.summarise([*grid, *other]))
    axes = labelled(drawn)
    assert len(axes) == 4 and [axis.get_ylabel() for axis in axes] == ["Accuracy (%)", "Perplexity"] * 2
    assert [axis.get_yscale() for axis in axes[:2]] == ["linear", "log"]
    kdp, = (line for line in axes[0].get_lines() if line.get_color() == figures.COLORS[0] and len(line.get_xdata()) == 2
            and line.get_linestyle() == "-")
    assert list(kdp.get_xdata()) == pytest.approx([19, 38]) and list(kdp.get_ydata()) == pytest.approx([55, 40])
    assert legend(drawn) == ["kdp", "remove", "lossy", "dense"]
    bars = [bar.get_segments() for bar in axes[0].collections]
    assert len(bars) == 1 + 3  # dense and three methods carry their errors
    assert bars[1][0][:, 1].tolist() == pytest.approx([55 - 0.70711, 55 + 0.70711], abs=1e-4)


def test_lines_split_by_k_max():
    more = [*points.grid(), points.pruned("kdp", points.scores(24.0, 0.4, 0.6), k_max=5)]
    drawn = figures.score_against_ratio(tables.summarise(more), metrics=("rp",))
    assert legend(drawn) == ["kdp, k 3", "remove, k 3", "lossy, k 3", "kdp, k 5", "dense"]


def test_pruned_layers():
    drawn = figures.pruned_layers(points.grid())
    axis, = labelled(drawn)
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        "kdp, 20 %", "kdp, 40 %", "remove, 20 %", "remove, 40 %", "lossy, 20 %", "lossy, 40 %"]
    assert len(drawn.data) == 12
    assert drawn.data.loc[2, ["start", "stop"]].tolist() == [2, 5]
    paths = axis.collections[1].get_paths()
    assert [tuple(path.get_extents().x0 + 0.42 for path in paths)] == [pytest.approx((5, 8))]


def diagnosis(dropped, first_error: float, layers: int = 12) -> Diagnosis:
    """Equal to the dense model before the first dropped layer, then errors that double with every state."""
    states = [k for k in range(layers) if k not in dropped] + [layers]
    error = [0.0 if k < min(dropped) else first_error * 2.0 ** (k - min(dropped)) for k in states]
    return Diagnosis(states, error, [1 - e / 100 for e in error], [2] * len(states), 1024, 8, list(dropped), 8.0, 1016,
                     0.5, 0.05, 0.8, 0.01, 3.0, 0.1, 3.4, 0.1, 0.4, 0.02)


def test_error_by_layer():
    drawn = figures.error_by_layer({"kdp": diagnosis([4, 5, 8], 0.01), "remove": diagnosis([10, 11], 0.5)})
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
    row = drawn.data.set_index(["label", "state"]).loc[("kdp", 6)]
    assert row.to_dict() == pytest.approx({"error": 0.04, "cosine": 0.9996, "masked": 2, "tokens": 1024})


def test_many_lines_of_errors_are_told_apart():
    drawn = figures.error_by_layer({str(i): diagnosis([4], 0.01 * (i + 1)) for i in range(12)})
    lines = drawn.figure.axes[0].get_lines()[1:]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 12


def test_nothing_to_draw():
    with pytest.raises(figures.FigureError, match="no training curves"):
        figures.training_curves({"5-8": points.kernel(epochs=0)}, {})
    with pytest.raises(figures.FigureError, match="no operator norms"):
        figures.operator_norms({})
    with pytest.raises(figures.FigureError, match="unknown metric 'beauty'"):
        figures.score_against_ratio(tables.summarise(points.grid()), metrics=("beauty",))
    with pytest.raises(figures.FigureError, match="no pruned model"):
        figures.score_against_ratio(tables.summarise([points.dense()]))
    with pytest.raises(figures.FigureError, match="no pruned model"):
        figures.pruned_layers([points.dense()])
    with pytest.raises(figures.FigureError, match="no error of states"):
        figures.error_by_layer({"dense": diagnosis([4], 0.0)})


def test_saved_files_are_equal_bytes_and_readable(tmp_path):
    before = dict(matplotlib.rcParams)
    written = []
    for name in ("one", "two"):
        drawn = figures.operator_norms({"5-8": points.kernel()})
        paths = figures.save(drawn, tmp_path / name / "norms-r0.25-k3", dpi=60)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert [path.name for path in paths] == [f"norms-r0.25-k3.{end}" for end in ("pdf", "png", "csv")]
    assert written[0][0].startswith(b"%PDF") and b"CreationDate" not in written[0][0]
    assert len(list(paths[0].parent.iterdir())) == 3  # no temporary files left
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), drawn.data)
    assert dict(matplotlib.rcParams) == before


def test_import_leaves_pyplot_alone():
    code = "import sys, kdp_core.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 0
