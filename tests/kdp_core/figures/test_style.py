"""Figures: what is drawn equals what was given, labels with units, the same bytes twice, no traces left."""
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from kdp_core.figures import style
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
    drawn = style.similarity_maps(record)
    maps = labelled(drawn)
    assert [axis.get_title(loc="left") for axis in maps] == list(style.MAPS.values())
    np.testing.assert_allclose(maps[1].images[0].get_array(), record.cka_linear_LL.numpy())
    assert {axis.images[0].get_clim() for axis in maps[:3]} == {(0.3, 1.0)}
    assert "left out (12 of 1,000)" in drawn.figure.get_suptitle()
    assert len(drawn.data) == 49
    pair = drawn.data.set_index(["state_a", "state_b"]).loc[(2, 5)]
    assert pair["cosine"] == pytest.approx(float(record.cosine_LL[2, 5]))


def test_training_curves():
    drawn = style.training_curves({"8-10": points.kernel(8, 10), "5-8": points.kernel()}, {"5-8": points.inverse()})
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
    axes = labelled(style.training_curves({"5-8": bare}, {}))
    assert [len(axis.get_lines()) for axis in axes] == [1, 1, 0]
    assert axes[0].get_yscale() == "linear"  # a loss of 0 has no logarithm


def test_operator_norms():
    drawn = style.operator_norms({"5-8": points.kernel(), "8-10": points.kernel(8, 10)})
    operators, lift = labelled(drawn)
    assert len(operators.get_lines()) == 3 + 2 and len(lift.get_lines()) == 2
    assert lift.get_lines()[0].get_ydata().tolist() == pytest.approx([1, 1.1, 1.2, 1.3])
    assert legend(drawn) == ["block 5-8", "block 8-10", "$A_1$", "$A_2$", "$A_3$"]


def row_looks(count):
    return [style.look(style.Row(place, 0, "")) for place in range(count)]


def test_fifty_six_methods_differ_in_colour_or_marker():
    assert len({(own["color"], own["marker"]) for own in row_looks(56)}) == 56


def test_rows_on_one_method_keep_its_colour_and_are_told_apart():
    looks = [style.look(style.Row(3, variant, "")) for variant in range(9)]
    assert {own["color"] for own in looks} == {style.COLORS[3]}
    assert len({(own["marker"], own.get("fillstyle", "full")) for own in looks}) == 9
    assert "fillstyle" not in looks[0] and looks[1]["marker"] == looks[0]["marker"]


def test_a_row_looks_the_same_whoever_else_is_drawn():
    known = {"kdp": [3, 0, "replaced"], "lorp": [19, 0, "removed"]}
    alone, = style.lines_of([("lorp", 3, "lorp")], known)
    _, beside = style.lines_of([("kdp", 3, "kdp"), ("lorp", 3, "lorp")], known)
    assert alone == beside and alone.look["linestyle"] == "-"
    dashed = style.lines_of([("lorp", 3, "a"), ("lorp", 4, "b")], known)[1].look
    assert dashed["color"] == alone.look["color"] and dashed["linestyle"] == style.DASHES[1]


def dealt(sizes, most=12):
    """Titles and numbers of lines of panels, of groups of so many rows."""
    known = {f"{group}{i}": [0, 0, group] for group, count in sizes.items() for i in range(count)}
    lines = style.lines_of([(name, 3, name) for name in known], known)
    panels = style.deal(lines, known, most)
    assert sorted(line.method for _, own in panels for line in own) == sorted(known)
    return [(title, len(own)) for title, own in panels]


def test_few_lines_share_one_panel():
    assert dealt({"a": 7, "b": 5}) == [("", 12)]


def test_many_lines_are_dealt_out_by_what_the_rows_do():
    assert dealt({"a": 9, "b": 7}) == [("a", 9), ("b", 7)]
    # the two smallest groups fit into one panel, and a large one is cut into equal parts
    assert dealt({"a": 13, "b": 6, "c": 10, "d": 1}) == [("a (1 of 2)", 7), ("a (2 of 2)", 6), ("b; d", 7), ("c", 10)]


def test_lines_of_one_row_stay_together():
    known = {name: [place, 0, "all"] for place, name in enumerate("abcde")}
    lines = style.lines_of([(name, k, f"{name} {k}") for name in known for k in (3, 4, 5)], known)
    panels = style.deal(lines, known, 12)
    assert [[line.method for line in own] for _, own in panels] == [["a"] * 3 + ["b"] * 3, ["c"] * 3 + ["d"] * 3,
                                                                   ["e"] * 3]


def test_nothing_to_draw():
    with pytest.raises(style.FigureError, match="no training curves"):
        style.training_curves({"5-8": points.kernel(epochs=0)}, {})
    with pytest.raises(style.FigureError, match="no operator norms"):
        style.operator_norms({})


def test_saved_files_are_equal_bytes_and_readable(tmp_path):
    before = dict(matplotlib.rcParams)
    written = []
    for name in ("one", "two"):
        drawn = style.operator_norms({"5-8": points.kernel()})
        paths = style.save(drawn, tmp_path / name / "norms-r0.25-k3", dpi=60)
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    assert [path.name for path in paths] == [f"norms-r0.25-k3.{end}" for end in ("pdf", "png", "csv")]
    assert written[0][0].startswith(b"%PDF") and b"CreationDate" not in written[0][0]
    assert len(list(paths[0].parent.iterdir())) == 3  # no temporary files left
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), drawn.data)
    assert dict(matplotlib.rcParams) == before


def test_import_leaves_pyplot_alone():
    code = "import sys, kdp_core.figures.style; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env={**os.environ}).returncode == 0
