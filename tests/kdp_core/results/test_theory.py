"""Tables of Theorems 1 and 2: they hold the record, and a bound that says nothing is said to be vacuous."""
import pandas as pd
import pytest

from kdp_core.results import theory
from tests.kdp_core.figures.test_theory import ERRORS, record


def test_tidy_holds_every_row_of_every_record():
    frame = theory.tidy({("a", "news"): record(), ("b", "news"): record()})
    assert len(frame) == 2 * (3 + 1 + 9 + 1)
    assert list(frame["what"].unique()) == ["horizon", "ridge", "risk", "condition"]
    row = frame[(frame["model"] == "b") & (frame["what"] == "condition")].iloc[0]
    assert row["samples_proof"] == 3e9 and row["theorem"] == 2 and pd.isna(row["horizon"])


def test_markdown_says_where_a_bound_is_vacuous():
    page = theory.markdown({("a", "news"): record()})
    tables = [line for line in page.splitlines() if line.startswith("|")]
    columns = [theory.HORIZON_COLUMNS, theory.RIDGE_COLUMNS, theory.RISK_COLUMNS,
               theory.CONDITION_COLUMNS]
    assert {line.count("|") for line in tables} == {len(names) + 1 for names in columns}
    assert "L_ERM = 0.01" in page and "n = 1,000 tokens of 40 sequences" in page
    first, second = (line for line in tables[2:4])
    assert first.endswith("| below the error of a constant | above the error of a constant |")
    assert second.endswith("| below the error of a constant | nothing: vacuous |")
    assert "| 2 | random | 32 | 3 | 1,000 | 0.01 | 40 | yes | yes | no | 0.1 | 0.02 | 0 | 3e+09 |" in page


@pytest.mark.parametrize("value, words", [
    (0.3, "below the error of a constant"), (0.4, "above the error of a constant"),
    (1.9, "above the error of a constant"), (2.0, "nothing: vacuous"),
])
def test_words_for_a_bound(value, words):
    assert theory._worth(ERRORS | {"bound": value}, "bound") == words
