"""The shared style: looks of variants, panels of many lines, saved files with the same bytes twice."""
import os
import subprocess
import sys

import matplotlib
import pandas as pd

from kdp_core.figures import style
from kdp_core.figures.training import operator_norms
from tests.kdp_core import points


def looks_of_methods(count):
    return [style.marks(style.Look(place, 0, "")) for place in range(count)]


def test_fifty_six_methods_differ_in_colour_or_marker():
    assert len({(own["color"], own["marker"]) for own in looks_of_methods(56)}) == 56


def test_variants_of_one_method_keep_its_colour_and_are_told_apart():
    looks = [style.marks(style.Look(3, number, "")) for number in range(9)]
    assert {own["color"] for own in looks} == {style.COLORS[3]}
    assert len({(own["marker"], own.get("fillstyle", "full")) for own in looks}) == 9
    assert "fillstyle" not in looks[0] and looks[1]["marker"] == looks[0]["marker"]


def test_a_variant_looks_the_same_whatever_else_is_drawn():
    known = {"kdp": [3, 0, "replaced"], "lorp": [19, 0, "removed"]}
    alone, = style.lines_of([("lorp", 3, "lorp")], known)
    _, beside = style.lines_of([("kdp", 3, "kdp"), ("lorp", 3, "lorp")], known)
    assert alone == beside and alone.marks["linestyle"] == "-"
    dashed = style.lines_of([("lorp", 3, "a"), ("lorp", 4, "b")], known)[1].marks
    assert dashed["color"] == alone.marks["color"] and dashed["linestyle"] == style.DASHES[1]


def dealt(sizes, most=12):
    """Titles of panels and their numbers of lines, for groups of so many variants."""
    known = {f"{group}{i}": [0, 0, group] for group, count in sizes.items() for i in range(count)}
    lines = style.lines_of([(name, 3, name) for name in known], known)
    panels = style.deal(lines, known, most)
    assert sorted(line.variant for _, own in panels for line in own) == sorted(known)
    return [(title, len(own)) for title, own in panels]


def test_few_lines_share_one_panel():
    assert dealt({"a": 7, "b": 5}) == [("", 12)]


def test_many_lines_are_dealt_out_by_what_their_methods_do():
    assert dealt({"a": 9, "b": 7}) == [("a", 9), ("b", 7)]
    # the two smallest groups fit into one panel, and a large one is cut into equal parts
    assert dealt({"a": 13, "b": 6, "c": 10, "d": 1}) == [("a (1 of 2)", 7), ("a (2 of 2)", 6), ("b; d", 7), ("c", 10)]


def test_lines_of_one_variant_stay_together():
    known = {name: [place, 0, "all"] for place, name in enumerate("abcde")}
    lines = style.lines_of([(name, k, f"{name} {k}") for name in known for k in (3, 4, 5)], known)
    panels = style.deal(lines, known, 12)
    assert [[line.variant for line in own] for _, own in panels] == [["a"] * 3 + ["b"] * 3, ["c"] * 3 + ["d"] * 3,
                                                                   ["e"] * 3]


def test_saved_files_are_equal_bytes_and_readable(tmp_path):
    before = dict(matplotlib.rcParams)
    written = []
    for name in ("one", "two"):
        drawn = operator_norms({"5-8": points.kernel()})
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
