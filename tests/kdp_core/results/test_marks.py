"""Marks against groups whose order is known: by paired tests, by standard errors, and as printed."""
import math

import pandas as pd
import pytest

from kdp_core.results import columns, marks
from kdp_core.results.summary import summarise
from tests.kdp_core import points


@pytest.fixture(scope="module")
def summary():
    return summarise(points.grid())


def test_marks_follow_the_noise(summary):
    # 20 %: 25 points ahead with errors of 0.7; 40 %: 0.25 points ahead, a tie
    at20, at40 = summary.index[summary["ratio"] == 0.2], summary.index[summary["ratio"] == 0.4]
    assert marks.marks(summary, "acc") == {at20[0]: "best", at20[1]: "second", at40[0]: "second", at40[1]: "second"}
    assert marks.marks(summary, "ppl") == {at20[0]: "best", at20[1]: "second", at40[0]: "second", at40[1]: "second"}
    # without errors values compare as printed: 1/0.79, 1/0.8, 1/0.81
    found = marks.marks(summary[summary["ratio"] == 0.2], "speedup_prefill")
    assert found == {at20[1]: "best", at20[2]: "second"}
    assert marks.marks(summary, "params_removed") == {}
    assert marks.marks(summary.iloc[:2], "acc") == {}


def with_p(summary, p_values, metric="acc"):
    """Comparisons of the rows of one group, {(row, row): p}, as compare.compare writes them."""
    rows = [{**dict(zip(columns.KEYS, summary.loc[a, list(columns.KEYS)], strict=True)), "metric": metric,
             "task": "all", "other": summary.loc[b, "method"], "other_calib": summary.loc[b, "calib"],
             "other_k_max": summary.loc[b, "k_max"], "p": p} for (a, b), p in p_values.items()]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("first_second, first_third, second_third, marked", [
    (0.01, 0.001, 0.01, {1: "best", 2: "second"}),
    (0.01, 0.001, 0.4, {1: "best", 2: "second", 3: "second"}),
    (0.4, 0.001, 0.4, {1: "second", 2: "second"}),
    # told from the second by 0.03, which is 0.06 once the third is asked about too
    (0.03, 0.04, 0.01, {}),
    (0.4, 0.4, 0.4, {}),
    (0.4, 0.01, math.nan, {1: "second", 2: "second"}),
])
def test_paired_tests_decide_the_marks(summary, first_second, first_third, second_third, marked):
    # errors would say best and second
    p_values = with_p(summary, {(2, 1): first_second, (1, 3): first_third, (3, 2): second_third})
    assert marks.marks(summary.iloc[:4], "acc", comparisons=p_values) == marked
    assert marks.marks(summary.iloc[:4], "rp", comparisons=p_values) == marked
    # no such tests of perplexities, and none of a column of costs: the errors and the printed values stay
    assert marks.marks(summary.iloc[:4], "ppl", comparisons=p_values) == {1: "best", 2: "second"}
    assert marks.marks(summary.iloc[:4], "speedup_prefill", comparisons=p_values) == {2: "best", 3: "second"}


def test_a_pair_without_a_test_leaves_the_group_to_its_errors(summary):
    p_values = with_p(summary, {(1, 2): 0.4, (1, 3): 0.4})
    assert marks.marks(summary.iloc[:4], "acc", comparisons=p_values) == {1: "best", 2: "second"}


def test_equal_values_share_their_mark():
    frame = summarise([points.dense(), *(points.pruned(m, points.scores(25.0, a, 0.6, stderr=None))
                                                for m, a in (("a", 0.4), ("b", 0.4), ("c", 0.3)))])
    assert marks.marks(frame, "acc") == {1: "best", 2: "best"}
    assert marks.marks(frame, "ppl") == {}
