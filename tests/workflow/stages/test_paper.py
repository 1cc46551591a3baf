"""Comparisons, the paper's tables and calibration seeds through the workflow."""
import json

import pandas as pd

from kdp_core.base import store
from tests.workflow.project import Project


def test_comparisons_hold_every_pair_on_the_same_items(built):
    frame = pd.read_csv(built.folder / "results/tables/comparisons.csv", keep_default_na=False, na_values=[""])
    scores = pd.read_csv(built.folder / "results/scores.csv").set_index(["method", "task", "metric"])
    best = frame[(frame["against"] == "best") & (frame["task"] == "heldout_ppl")]
    assert len(best) == 2 and set(frame["against"].dropna()) == {"best", "baseline", "dense"}
    for row in frame[frame["task"] == "heldout_lastword"].itertuples():
        values = [scores.loc[(method, row.task, "acc"), "value"] for method in (row.method, row.other)]
        assert abs(row.difference - (values[0] - values[1])) < 1e-12 and row.items == 4


def test_the_papers_tables_and_their_index(built):
    folder = built.folder / "results/tables/paper"
    text = (folder / "index.md").read_text(encoding="utf-8")
    for number in (1, 2, 5, 8):
        assert f"[Table {number}](measured/table{number}.md)" in text
        assert all((folder / "measured" / f"table{number}.{form}").stat().st_size for form in ("csv", "md", "tex"))
    assert "Table 6: left out; it needs an OPT model" in text and not (folder / "measured/table6.md").exists()
    assert all((folder / f"table{number}.md").exists() for number in (10, 12))
    summary = pd.read_csv(built.folder / "results/summary.csv")
    assert pd.read_csv(folder / "measured/table1.csv")["acc"].tolist() == summary["acc"].tolist()
    assert "Underlined" in (built.folder / "results/tables/summary.md").read_text(encoding="utf-8")


def test_costs_of_the_papers_models_need_no_model(tmp_path):
    project = Project(tmp_path)  # neither model nor texts are there
    assert project.planned("results/tables/paper/table10.md") == {"paper_costs": 1}


def test_a_table_that_no_longer_has_its_numbers_is_removed(copied):
    copied.config["ablations"] = {"maps": {"title": "Maps", "caption": "Side by side.", "x": ["variant"], "paper": 3,
                                           "variants": ["kdp", "linear"], "metrics": ["ppl"]}}
    copied.run("results/tables/paper/index.md")
    table = copied.folder / "results/tables/paper/measured/table3.csv"
    assert pd.read_csv(table)["method"].tolist() == ["dense", "kdp", "linear"]
    del copied.config["ablations"]
    copied.run("results/tables/paper/index.md")
    assert not table.exists()


def test_other_items_are_named(copied):
    path = copied.folder / "results/pico/few/kdp/r0.1-k3/samples/heldout_lastword.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[2]["doc_hash"] = "of another text"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    text = copied.run("--force", "results/tables/comparisons.csv", check=False)
    assert "did not answer the same items of heldout_lastword (item 2 differ)" in text


def test_seeds_are_run_beside_what_there_is_and_tabulated(copied):
    copied.config["calibrations"]["few"]["seeds"] = [0, 5]
    copied.config["grid"]["methods"] = ["linear"]
    planned = copied.planned("results/tables/seeds.md")
    assert planned["tokens"] == planned["fold"] == planned["evaluate"] == 1 and "dense" not in planned
    copied.run("results/tables/seeds.md")
    assert store.read(copied.folder / "results/pico/few-s5/tokens.safetensors").provenance["seed"] == 5
    frame = pd.read_csv(copied.folder / "results/tables/seeds.csv", keep_default_na=False)
    summary = pd.read_csv(copied.folder / "results/summary.csv").set_index("method").loc["linear"]
    assert frame["method"].tolist() == ["dense", "linear"] and frame["seeds"].tolist() == [1, 2]
    assert abs(float(frame["ppl"][1]) - summary["ppl"].mean()) < 1e-9
    assert abs(float(frame["ppl_spread"][1]) - summary["ppl"].std()) < 1e-9
