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
    chosen = [{**row, "removed": row["removed"].split(), "single": {}} for row in rows.to_dict("records")]
    assert objectives.pairs(chosen)["jaccard"].tolist() == pytest.approx(pairs["jaccard"].tolist(), abs=1e-5)


def test_data_hold_one_row_for_each_search_pair_and_claim(page):
    record = compared()
    record.stats.update(windows=8, dense_nats=3.0)
    found = page.frames(record)
    assert [len(found[name]) for name in page.NAMES] == [4, len(record.pairs), 4]
    assert found["objectives"]["removed"].tolist() == ["1 2", "1 3", "2 3", "2 3"]
    assert page.table_searches(found["objectives"]).splitlines()[2] == \
        "| `kl` | `one_shot` | 0 | 1 2 | 10 | 20 | 1.50 | 50 |"
    lines = page.table_pairs(found["objectives_pairs"]).splitlines()
    assert "| two draws, `kl` by `one_shot` | 1 | 0.33 | 0.33 | 0.33 | 1.00 |" in lines
    assert "| `one_shot` and `greedy`, same draw | 2 | 0.33 | 0.33 | 0.33 | 1.00 |" in lines
    assert page.table_claims(found["objectives_claims"]).count("cannot be told here") >= 1
