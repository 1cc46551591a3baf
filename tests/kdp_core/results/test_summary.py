"""Numbers of the summary against hand arithmetic, and the paper's retained performance."""
import math

import pytest

from kdp_core.base.measurements import Score, Scores
from kdp_core.results import tables
from kdp_core.results.columns import TableError
from kdp_core.results.summary import fits, retained, retained_ppl, summarise, tidy
from tests.kdp_core import points


@pytest.fixture(scope="module")
def summary():
    return summarise(points.grid())


def row(summary, method, ratio):
    return summary[(summary["method"] == method) & (summary["ratio"] == ratio)].iloc[0]


def test_summary_by_hand(summary):
    kdp = row(summary, "kdp", 0.2)
    # acc_norm counts for continuation (its acc of 0.11 does not), acc for lastword
    assert kdp["acc"] == pytest.approx((0.45 + 0.65) / 2)
    assert kdp["acc_stderr"] == pytest.approx(math.sqrt(0.01**2 + 0.01**2) / 2)
    assert kdp["rp"] == pytest.approx(100 * 0.55 / 0.60)
    assert kdp["rp_stderr"] == pytest.approx(100 * kdp["acc_stderr"] / 0.60)
    # the word perplexity of lastword is no perplexity of text
    assert kdp["ppl"] == pytest.approx(25.0) and kdp["ppl_stderr"] == pytest.approx(0.25)
    assert kdp["ppl_ratio"] == pytest.approx(1.25) and kdp["ppl_ratio_stderr"] == pytest.approx(0.0125)
    assert kdp["rp_ppl"] == pytest.approx(80.0) and kdp["rp_ppl_stderr"] == pytest.approx(0.8)
    assert (kdp["params_removed"], kdp["layers_removed"], kdp["blocks"]) == (0.19, 4, "5-8 8-11")
    assert kdp["params_millions"] == pytest.approx(81.0) and kdp["macs_giga"] == pytest.approx(81e6 * 128 / 1e9)
    assert kdp["speedup_prefill"] == pytest.approx(1 / 0.81) and kdp["fit_seconds"] == 12.5


def test_dense_row_is_first_and_whole(summary):
    dense = summary.iloc[0]
    assert (dense["method"], dense["params_removed"], dense["rp"], dense["ppl_ratio"]) == ("dense", 0, 100, 1)
    assert math.isnan(dense["fit_seconds"]) and math.isnan(dense["search_seconds"])
    assert list(summary["method"]) == ["dense", *["kdp", "remove", "lossy"] * 2]


def test_units_of_perplexity_are_not_averaged_and_other_shares_are_no_accuracy():
    def measured(token, wiki, c4):
        return Scores([Score("heldout_ppl", "ppl", token, 1.0, 9, False, "ppl"),
                       Score("wikitext", "word_perplexity", wiki, 2.0, 9, False, "ppl"),
                       Score("wikitext", "byte_perplexity", 2.0, 0.1, 9, False, "ppl"),
                       Score("c4", "word_perplexity", c4, 2.0, 9, False, "ppl"),
                       Score("piqa", "acc", 0.5, 0.1, 9, True, "share"),
                       Score("xsum", "rouge1", 0.1, 0.01, 9, True, "share"),
                       Score("humaneval", "pass@1", 0.0, 0.0, 9, True, "share"),
                       Score("sst2", "auc", 0.9, 0.1, 9, True, "share")], 1.0, {})
    points_ = [points.dense(scores=measured(10, 30, 40)), points.pruned("kdp", measured(20, 60, 50))]
    kdp = summarise(points_).iloc[1]
    assert (kdp["ppl"], kdp["ppl_ratio"], kdp["acc"]) == pytest.approx((20, 2, 0.5))
    assert kdp["rp_ppl"] == pytest.approx(100 * (30 / 60 + 40 / 50) / 2)
    every = tidy(points_).set_index(["method", "task", "metric"])
    assert tuple(every.loc[("kdp", "xsum", "rouge1"), ["value", "stderr", "unit"]]) == (0.1, 0.01, "share")


def test_several_perplexities_against_resampling_free_route():
    def measured(*values):
        return Scores([Score(f"t{i}", "ppl", v, e, 9, False, "ppl") for i, (v, e) in enumerate(values)], 1.0, {})
    frame = summarise([points.dense(scores=measured((10, 1), (40, 1))),
                              points.pruned("kdp", measured((20, 1.0), (50, 5.0)))])
    kdp = frame.iloc[1]
    assert kdp["ppl"] == pytest.approx(math.sqrt(20 * 50))
    assert kdp["rp_ppl"] == pytest.approx(100 * (10 / 20 + 40 / 50) / 2)

    def slopes(function):
        # numerical derivatives: an independent route to the error propagation
        return math.hypot(*((function(20 + h, 50 + k) - function(20, 50)) / 1e-6 * error
                            for h, k, error in ((1e-6, 0, 1.0), (0, 1e-6, 5.0))))
    assert kdp["ppl_stderr"] == pytest.approx(slopes(lambda a, b: math.sqrt(a * b)), rel=1e-5)
    assert kdp["rp_ppl_stderr"] == pytest.approx(slopes(lambda a, b: 50 * (10 / a + 40 / b)), rel=1e-5)
    assert math.isnan(kdp["acc"])


def test_retained_performance_of_the_paper():
    assert round(retained(47.02, 59.14), 1) == 79.5  # Table 1, SLEB on LLaMA-2-7B
    dense, streamline = [5.5, 7.0, 4.9, 6.5, 6.1, 8.8], [9.9, 17.1, 43.7, 81.7, 377.1, 201.1]
    assert round(retained_ppl(streamline, dense, reading="ratio_of_sums"), 1) == 5.3  # Table 2
    assert round(retained_ppl(streamline, dense), 1) == 20.3  # the same row in the other reading
    assert round(retained_ppl([28.0, 37.2], [15.1, 31.3]), 1) == 69.0  # Table 7, OPT-2.7B
    assert round(retained_ppl([13.9, 22.1], [10.9, 12.3]), 1) == 67.0  # Table 7, OPT-6.7B


def test_members_of_a_group_do_not_count_twice():
    members = [Score(name, "acc", value, 0.1, 9, True, "share") for name, value in
               (("mmlu", 0.5), ("mmlu/law", 0.2), ("mmlu/physics", 0.8), ("piqa", 0.6))]
    frame = summarise([points.dense(scores=Scores(members, 1.0, {}))])
    assert frame.loc[0, "acc"] == pytest.approx((0.5 + 0.6) / 2)


def test_missing_numbers_stay_missing():
    lost = points.scores(None, 0.4, 0.6, stderr=None)
    frame = summarise([points.dense(), points.pruned("kdp", points.scores(25.0, 0.4, 0.6, stderr=None)),
                              points.pruned("lost", lost)._replace(efficiency=None)])
    assert frame.loc[1, "acc"] == pytest.approx(0.5) and math.isnan(frame.loc[1, "acc_stderr"])
    assert math.isnan(frame.loc[2, "ppl"]) and math.isnan(frame.loc[2, "speedup_decode"])
    assert frame.loc[2, "params_millions"] == pytest.approx(81.0)
    assert "nan" not in tables.render(frame, "md")


def test_tidy_holds_every_number():
    frame = tidy(points.grid())
    assert len(frame) == 7 * (5 + 9)
    assert set(frame["unit"]) == {"ppl", "share", "ms", "mib", "macs", "params", "x"}
    one = frame[(frame["method"] == "kdp") & (frame["ratio"] == 0.4)].set_index(["task", "metric"])["value"]
    assert one["continuation", "acc_norm"] == 0.5 and one["efficiency", "prefill_ms"] == pytest.approx(62.0)


def test_refusals():
    grid = points.grid()
    with pytest.raises(TableError, match=r"tiny/news/kdp/0\.2/3 was given twice"):
        tidy([*grid, grid[1]])
    with pytest.raises(TableError, match="no dense point for model 'tiny'"):
        summarise(grid[1:])
    fewer = grid[1].scores._replace(scores=grid[1].scores.scores[:3])
    with pytest.raises(TableError, match="on lastword:acc but the dense tiny on continuation:acc_norm"):
        summarise([grid[0], grid[1]._replace(scores=fewer)])


def test_fits_reads_stats_then_the_last_epoch():
    frame = fits([({"method": "kdp"}, points.kernel()), ({"method": "kdp"}, points.inverse())])
    assert frame["step"].tolist() == ["kernel", "inverse"] and frame["block"].tolist() == ["5-8", "5-8"]
    assert frame.loc[0, "heldout_cos"] == 0.875 and frame.loc[0, "heldout_loss"] == pytest.approx(0.3)
    assert frame.loc[1, "heldout_error"] == 0.25 and "name" not in frame
