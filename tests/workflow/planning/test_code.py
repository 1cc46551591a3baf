"""Hashes of library code: what an edit of the library reruns, on a copy of it."""
import re
import shutil

import pytest
from planning import code

from tests.workflow.project import ROOT


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A copy of the library, which is hashed instead of the real one."""
    for name in ("kdp_core", "workflow_scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(code, "ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget():
    for function in (code._cached, code._parsed, code._method_files):
        function.cache_clear()


def hashes():
    """The hash of every kind of job, by its name."""
    made = {name.split("/")[1]: code.of_script(name) for name in
            ("states/hidden", "states/similarity", "score/evaluate", "study/plan", "results/tables")}
    made |= {f"step {method} {step}": code.of_method("methods/step", method, step)
             for method, step in (("kdp", "kernel"), ("kdp", "inverse"), ("linear", "fit"))}
    made |= {f"search {method}": code.of_method("methods/search", method, "search")
             for method in ("sleb", "kdp_residual")}
    made |= {f"compose {method}": code.of_method("methods/compose", method, "compose")
             for method in ("kdp_residual", "replaceme_lstsq")}
    made |= {f"blocks {method}": code.of_blocks(method, method) for method in ("remove", "linear", "kdp", "sleb")}
    made["blocks linear as kdp"] = code.of_blocks("linear", "kdp")
    made["blocks remove as kdp_residual"] = code.of_blocks("remove", "kdp_residual")
    return made | {f"fold {method}": code.of_method("prune/fold", method, "module")
                   for method in ("remove", "kdp", "sleb")}


def reruns(library, file, old, new):
    """The jobs whose hash changes by an edit; `old` is a regular expression."""
    before, path = hashes(), library / "kdp_core" / file
    text = path.read_text(encoding="utf-8")
    assert re.search(old, text), f"{file} no longer holds {old}"
    path.write_text(re.sub(old, new, text, count=1), encoding="utf-8")
    forget()
    return {name for name, value in hashes().items() if value != before[name]}


SIZED_AS_KDP = {"blocks kdp", "blocks linear as kdp"}
"""The choices of blocks that count KDP's stand-ins, whose options are those of both steps."""


@pytest.mark.parametrize("file, old, new, expected", [
    ("methods/kdp/kernel.py", '"""', '"""Words. ', set()),
    ("states/hidden.py", "HALF_MAX = 65504.0", "# words\nHALF_MAX = 65504.0", set()),
    # a default that only the count of parameters reads, by the name of the function
    ("methods/kdp/kernel.py", r"features: (.+?) = 1024", r"features: \1 = 512",
     {"step kdp kernel", "step kdp inverse", "fold kdp", "plan", *SIZED_AS_KDP}),
    ("methods/kdp/inverse.py", r"width: (\w+) = 1024", r"width: \1 = 512",
     {"step kdp inverse", "fold kdp", "plan", *SIZED_AS_KDP}),
    ("methods/kdp/linear.py", r"7 \* sizes", "8 * sizes", {"step linear fit", "blocks linear", "plan"}),
    ("methods/kdp_residual/search.py", r"round\(largest", "int(largest", {"search kdp_residual", "plan"}),
])
def test_an_edit_reruns_the_jobs_that_import_the_module(library, file, old, new, expected):
    assert reruns(library, file, old, new) == expected


def test_a_new_method_and_an_edit_of_another_rerun_no_method(library):
    before = hashes()
    (library / "kdp_core/methods/mine.py").write_text("METHODS = ()\n", encoding="utf-8")
    forget()
    assert {name for name, value in hashes().items() if value != before[name]} == {"plan"}
    assert reruns(library, "methods/sleb.py", r"METHODS = \(", "MORE = 1\nMETHODS = (") == {"search sleb", "plan"}


def test_what_all_methods_share_reruns_all_of_them(library):
    changed = reruns(library, "methods/_method.py", r"GRID_ARGUMENTS = \(", "MORE = 1\nGRID_ARGUMENTS = (")
    assert changed >= {name for name in hashes() if name.split()[0] in ("step", "search", "compose", "blocks", "fold")}
    assert not changed & {"hidden", "similarity", "evaluate"}


def test_a_helper_of_scripts_counts_and_how_jobs_run_does_not(library):
    before = hashes()
    for name, changed in (("job.py", set()), ("planning/grid.py", set()), ("gather.py", {"tables"})):
        path = library / "workflow_scripts" / name
        path.write_text(path.read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
        forget()
        assert {name for name, value in hashes().items() if value != before[name]} == changed


def test_hashes_are_kept_until_a_file_changes(library, monkeypatch):
    before = hashes()
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(code, "_parsed", lambda path: pytest.fail(f"{path} is parsed again"))
        assert hashes() == before
    path = library / "kdp_core/states/hidden.py"
    path.write_text(path.read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
    forget()
    assert hashes()["hidden"] != before["hidden"]
    assert len(list((library / ".cache/code").iterdir())) == 2


def test_another_function_of_the_same_module_is_another_hash():
    assert code.of_blocks("kdp", "kdp") != code.of_blocks("shortgpt", "kdp")
    assert code.of_script("methods/step", ("kdp_core.methods.kdp.linear.direct",)) != \
        code.of_script("methods/step", ("kdp_core.methods.kdp.linear.sequential",))


def test_an_edit_of_a_family_of_figures_redraws_that_family_alone(library):
    def figures():
        return {name: code.of_figure(f"kdp_core.figures.{name}") for name in ("scores", "layers", "spaces", "style")}

    before, file = figures(), library / "kdp_core/figures/scores.py"
    file.write_text(file.read_text(encoding="utf-8").replace("ACROSS = 3", "ACROSS = 4"), encoding="utf-8")
    forget()
    assert {name for name, value in figures().items() if value != before[name]} == {"scores"}
