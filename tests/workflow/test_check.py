"""The rule `check`: a finished run passes it, and each kind of damage fails the test that looks for it."""
import shutil
from pathlib import Path

import pytest
from planning import figures, grid
from planning.config import check

from tests.results import test_built as tests
from tests.workflow.project import CONFIG

PRUNED = "pico/few/kdp/r0.1-k3/pruned.json"


@pytest.fixture(scope="module")
def folder(built, tmp_path_factory):
    """The files that `check` reads, to damage."""
    folder = tmp_path_factory.mktemp("checked")
    for path in (built.folder / "results").rglob("*"):
        if path.is_file() and ("figures" in path.parts or path.name in ("facts.json", "pruned.json", "efficiency.json")
                               or path.name in ("scores.csv", "summary.csv")):
            copy = folder / path.relative_to(built.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return folder


@pytest.fixture
def run(folder, monkeypatch):
    """The run as the rule describes it."""
    config = check(CONFIG)
    monkeypatch.setattr(tests, "RUN", {
        "folder": str(folder), "models": ["pico"],
        "points": [point | {"folder": grid.folder(point)} for point in grid.points(config)],
        "figures": [entry["name"] for entry in figures.figure_entries(config)]})
    return folder / "results"


def without_last_line(text):
    return b"".join(text.splitlines(keepends=True)[:-1])


def replaced(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new, 1)
    return change


ROWS, SIZES = "test_a_table_has_every_model_of_the_grid_and_no_other", "test_parameters_are_conserved"
FIGURES = "test_every_figure_is_there_and_not_empty"
DAMAGES = [
    ("summary.csv", without_last_line, ROWS, ["summary.csv"]),
    ("summary.csv", lambda text: text + text.splitlines(keepends=True)[-1], ROWS, ["summary.csv"]),
    ("scores.csv", replaced(b"few,kdp,", b"few,kdp_2,"), ROWS, ["scores.csv"]),
    (PRUNED, replaced(b'"params_added": ', b'"params_added": 1'), SIZES, []),
    (PRUNED, replaced(b'"params_removed": 0.', b'"params_removed": 0.9'), SIZES, []),
    ("pico/facts.json", replaced(b'"params_total": ', b'"params_total": 1'), SIZES, []),
    ("pico/few/linear/r0.1-k3/efficiency.json", replaced(b'"params": ', b'"params": 1'), SIZES, []),
    ("scores.csv", replaced(b"heldout_lastword,acc,", b"heldout_lastword,acc,7"), "test_accuracies_are_shares", []),
    ("scores.csv", replaced(b"heldout_ppl,ppl,", b"heldout_ppl,ppl,-"), "test_perplexities_are_numbers", []),
    ("scores.csv", replaced(b"heldout_ppl,ppl,", b"heldout_ppl,ppl,1000000000000"), "test_perplexities_are_numbers",
     []),
    ("figures/score-ratio.png", lambda text: b"", FIGURES, ["png"]),
    ("figures/score-ratio.pdf", lambda text: b"<svg></svg>", FIGURES, ["pdf"]),
]


@pytest.mark.parametrize("file, change, name, arguments", DAMAGES)
def test_damage_is_seen(run, file, change, name, arguments):
    path, test = run / file, getattr(tests, name)
    before = path.read_bytes()
    test(*arguments)
    path.write_bytes(change(before))
    try:
        with pytest.raises(AssertionError):
            test(*arguments)
    finally:
        path.write_bytes(before)


def test_a_figure_that_is_missing_is_seen(run):
    tests.RUN["figures"].append("no-such-figure")
    with pytest.raises(AssertionError, match=r"no-such-figure\.csv"):
        tests.test_every_figure_is_there_and_not_empty("csv")


def test_a_finished_run_names_the_tests_that_it_passed(built):
    names = (built.folder / "results/checked.txt").read_text(encoding="utf-8").splitlines()
    assert {name.split("::")[1].split("[")[0] for name in names} == \
        {name for name in vars(tests) if name.startswith("test_")}
    assert all(Path(name.split("::")[0]) == Path("tests/results/test_built.py") for name in names)


def test_a_run_that_fails_says_which_test_failed(copied):
    path = copied.folder / "results/pico/few/kdp/r0.1-k3/pruned.json"
    path.write_bytes(replaced(b'"params_added": ', b'"params_added": 1')(path.read_bytes()))
    text = copied.run("results/checked.txt", "--allowed-rules", "check", check=False)
    assert "ResultsFailed: pytest ended with `1 failed" in text and "test_parameters_are_conserved" in text
