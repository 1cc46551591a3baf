"""The page on objectives: its tables are those of the data, and the claims follow from the kept pairs."""
import pandas as pd
import pytest

from kdp_core.study import objectives
from tests.benchmarks.command import load
from tests.kdp_core.figures.test_agreement import compared


@pytest.fixture(scope="module")
def page():
    return load("pages/objectives")


def test_the_tables_of_the_page_are_those_of_the_data(page):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text, page.tables()) == text, "run python benchmarks/pages/objectives.py RECORD"


def test_the_pairs_are_those_of_the_chosen_layers(page):
    rows, pairs = (pd.read_csv(page.DATA / f"{name}.csv") for name in page.NAMES[:2])
    for model, own in rows.groupby("model", sort=False):
        chosen = [{**row, "removed": row["removed"].split(), "single": {}} for row in own.to_dict("records")]
        assert objectives.pairs(chosen)["jaccard"].tolist() == pytest.approx(
            pairs[pairs["model"] == model]["jaccard"].tolist(), abs=1e-5)


def test_data_hold_one_row_for_each_search_pair_and_claim_of_each_model(page):
    record = compared()
    record.stats.update(windows=8, dense_nats=3.0)
    found = page.frames({"a": record, "b": record})
    assert [len(found[name]) for name in page.NAMES] == [8, 2 * len(record.pairs), 8]
    assert found["objectives"]["model"].tolist() == ["a"] * 4 + ["b"] * 4
    assert found["objectives"]["removed"].tolist()[:4] == ["1 2", "1 3", "2 3", "2 3"]
    searches = page.table_searches(found["objectives"]).splitlines()
    assert searches[0].startswith("| objective | search | a: perplexity / dense |") and len(searches) == 4
    cells = [cell.strip() for cell in searches[2].split("|")[1:-1]]
    own = found["objectives"].query("strategy == 'one_shot' and model == 'a'")
    assert cells[:2] == ["`kl`", "`one_shot`"] and cells[2:5] == cells[5:8]
    assert cells[2] == page.spread(own["heldout_ppl_ratio"], ".2f")
    lines = page.table_pairs(found["objectives_pairs"]).splitlines()
    assert ("| two draws, `kl` by `one_shot` | 1 | 0.33 (0.33–0.33) | 1.00 | 1 | 0.33 (0.33–0.33) | 1.00 |"
            in lines)
    assert page.table_claims(found["objectives_claims"]).count("cannot be told here") >= 2


def test_a_spread_is_the_median_with_the_extremes(page):
    assert page.spread(pd.Series([1.0, 3.0, 8.0]), ".1f") == "3.0 (1.0–8.0)"
    assert page.spread(pd.Series([16.75, 2071.2, 1789060.4]), ".2f") == "2,071 (16.75–1,789,060)"
