"""Hashes of library code: what an edit of the library reruns."""
import shutil

import pytest
from planning import code

from tests.workflow.project import ROOT


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library that plumbing hashes instead of the real one."""
    for name in ("kdp_core", "workflow_scripts"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(code, "ROOT", tmp_path)
    monkeypatch.setattr(code, "TABLE", tmp_path / "kdp_core/methods/__init__.py")
    fresh(monkeypatch)
    yield tmp_path
    fresh(monkeypatch)


def fresh(monkeypatch):
    for name in ("_imports", "of_script", "of_part", "function_code"):
        getattr(code, name).cache_clear()


def hashes():
    return {"hidden": code.of_script("hidden"), "figure": code.of_script("figure"),
            "kernel": code.of_part("kdp", "kernel"), "inverse": code.of_part("kdp", "inverse"),
            "fit": code.of_part("linear", "fit"), "blocks": code.of_blocks("kdp", "kdp"),
            "fold remove": code.of_script("fold", "remove"), "fold kdp": code.of_script("fold", "kdp")}


def changed_by(library, monkeypatch, file, old, new):
    before = hashes()
    text = (library / file).read_text(encoding="utf-8")
    assert old in text
    (library / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    fresh(monkeypatch)
    return {name for name, value in hashes().items() if value != before[name]}


def test_comments_and_docstrings_rerun_nothing(library, monkeypatch):
    for file, old, new in (("kernel", '"""Step 1 of KDP', '"""Words, step 1 of KDP'),
                           ("hidden", "HALF_MAX = 65504.0", "# words\nHALF_MAX = 65504.0")):
        assert changed_by(library, monkeypatch, f"kdp_core/{file}.py", old, new) == set()


def test_an_edit_reruns_the_stages_that_import_the_module(library, monkeypatch):
    assert changed_by(library, monkeypatch, "kdp_core/methods/linear.py", "1e-12", "1e-13") == {"fit"}
    assert changed_by(library, monkeypatch, "kdp_core/methods/kdp/inverse.py", "1e-12", "1e-13") == {"inverse", "fold kdp"}
    assert changed_by(library, monkeypatch, "kdp_core/methods/kdp/kernel.py", "1e-3", "2e-3") == {"kernel", "inverse", "fold kdp"}
    # figures print the score of LoRP, which selects blocks
    assert changed_by(library, monkeypatch, "kdp_core/methods/_select.py", "0.5", "0.6") == {"blocks", "fold remove", "fold kdp",
                                                                                   "figure"}
    assert changed_by(library, monkeypatch, "kdp_core/figures/style.py", "#0072B2", "#0072B3") == {"figure"}


def composed_hashes():
    return {"search": code.of_part("kdp_residual", "search"),
            **{f"compose {row}": code.of_part(row, "compose")
               for row in ("kdp_residual", "linear_prefix", "replaceme_lstsq")},
            **{f"blocks {row}": code.of_blocks(row, row)
               for row in ("kdp", "kdp_residual", "linear_prefix", "replaceme_lstsq")},
            "blocks linear, sized as kdp_residual": code.of_blocks("linear", "kdp_residual"),
            "kernel": code.of_part("kdp", "kernel"), "fold": code.of_script("fold", "kdp_residual")}


@pytest.mark.parametrize("file, old, new, reruns", [
    ("residual", "clamp_min(1e-12)", "clamp_min(1e-13)", {"search", "compose kdp_residual", "compose linear_prefix"}),
    # how many parameters a stand-in has counts for the choice of blocks, wherever it stands
    ("residual", 'return facts.width * (facts.width + 1) + rows', 'return 1 + facts.width * (facts.width + 1) + rows',
     {"search", "compose kdp_residual", "compose linear_prefix", "blocks kdp_residual",
      "blocks linear, sized as kdp_residual"}),
    ("inverse", "F // 2 * (facts", "F // 3 * (facts", {"blocks kdp"}),
    ("search", "round(largest", "int(largest", {"search"}),
    ("joint", "WARMUP = 8", "WARMUP = 9", {"search", "compose kdp_residual", "compose linear_prefix"}),
    ("replaceme", 'STARTS = ("identity", "lstsq")', 'STARTS = ("lstsq", "identity")', {"compose replaceme_lstsq"}),
])
def test_an_edit_of_a_whole_point_fit_reruns_what_calls_it(library, monkeypatch, file, old, new, reruns):
    before, path = composed_hashes(), library / f"kdp_core/{file}.py"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    fresh(monkeypatch)
    assert {name for name, value in composed_hashes().items() if value != before[name]} == reruns


def test_a_new_row_of_the_table_reruns_no_other(library, monkeypatch):
    row = '    "mine": Method("", blocks.most_similar, {}, None, _no_params),\n}'
    assert changed_by(library, monkeypatch, "kdp_core/methods/__init__.py", "\n}\n", f"\n{row}\n") == set()
