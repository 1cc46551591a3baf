"""Numbers of the tables against hand arithmetic, the paper's retained performance, marks and escaping."""
import io
import math
import re

import pandas as pd
import pytest

from kdp_core.base.records import Score, Scores
from kdp_core.results import tables
from tests.kdp_core import points


@pytest.fixture(scope="module")
def summary():
    return tables.summarise(points.grid())


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
    kdp = tables.summarise(points_).iloc[1]
    assert (kdp["ppl"], kdp["ppl_ratio"], kdp["acc"]) == pytest.approx((20, 2, 0.5))
    assert kdp["rp_ppl"] == pytest.approx(100 * (30 / 60 + 40 / 50) / 2)
    every = tables.tidy(points_).set_index(["method", "task", "metric"])
    assert tuple(every.loc[("kdp", "xsum", "rouge1"), ["value", "stderr", "unit"]]) == (0.1, 0.01, "share")


def test_several_perplexities_against_resampling_free_route():
    def measured(*values):
        return Scores([Score(f"t{i}", "ppl", v, e, 9, False, "ppl") for i, (v, e) in enumerate(values)], 1.0, {})
    frame = tables.summarise([points.dense(scores=measured((10, 1), (40, 1))),
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
    assert round(tables.retained(47.02, 59.14), 1) == 79.5  # Table 1, SLEB on LLaMA-2-7B
    dense, streamline = [5.5, 7.0, 4.9, 6.5, 6.1, 8.8], [9.9, 17.1, 43.7, 81.7, 377.1, 201.1]
    assert round(tables.retained_ppl(streamline, dense, reading="ratio_of_sums"), 1) == 5.3  # Table 2
    assert round(tables.retained_ppl(streamline, dense), 1) == 20.3  # the same row in the other reading
    assert round(tables.retained_ppl([28.0, 37.2], [15.1, 31.3]), 1) == 69.0  # Table 7, OPT-2.7B
    assert round(tables.retained_ppl([13.9, 22.1], [10.9, 12.3]), 1) == 67.0  # Table 7, OPT-6.7B


def test_tasks_can_be_named():
    frame = tables.summarise(points.grid(), tasks=["lastword", "text"])
    assert row(frame, "kdp", 0.2)["acc"] == 0.45


def test_members_of_a_group_do_not_count_twice():
    members = [Score(name, "acc", value, 0.1, 9, True, "share") for name, value in
               (("mmlu", 0.5), ("mmlu/law", 0.2), ("mmlu/physics", 0.8), ("piqa", 0.6))]
    frame = tables.summarise([points.dense(scores=Scores(members, 1.0, {}))])
    assert frame.loc[0, "acc"] == pytest.approx((0.5 + 0.6) / 2)


def test_primary_metrics_are_those_of_evaluate():
    from kdp_core.score import evaluate
    assert tables.PRIMARY["acc"] == evaluate.PRIMARY


def test_missing_numbers_stay_missing():
    lost = points.scores(None, 0.4, 0.6, stderr=None)
    frame = tables.summarise([points.dense(), points.pruned("kdp", points.scores(25.0, 0.4, 0.6, stderr=None)),
                              points.pruned("lost", lost)._replace(efficiency=None)])
    assert frame.loc[1, "acc"] == pytest.approx(0.5) and math.isnan(frame.loc[1, "acc_stderr"])
    assert math.isnan(frame.loc[2, "ppl"]) and math.isnan(frame.loc[2, "speedup_decode"])
    assert frame.loc[2, "params_millions"] == pytest.approx(81.0)
    assert "nan" not in tables.render(frame, "md")


def test_tidy_holds_every_number():
    frame = tables.tidy(points.grid())
    assert len(frame) == 7 * (5 + 9)
    assert set(frame["unit"]) == {"ppl", "share", "ms", "mib", "macs", "params", "x"}
    one = frame[(frame["method"] == "kdp") & (frame["ratio"] == 0.4)].set_index(["task", "metric"])["value"]
    assert one["continuation", "acc_norm"] == 0.5 and one["efficiency", "prefill_ms"] == pytest.approx(62.0)


def test_refusals():
    grid = points.grid()
    with pytest.raises(tables.TableError, match=r"tiny/news/kdp/0\.2/3 was given twice"):
        tables.tidy([*grid, grid[1]])
    with pytest.raises(tables.TableError, match="no dense point for model 'tiny'"):
        tables.summarise(grid[1:])
    fewer = grid[1].scores._replace(scores=grid[1].scores.scores[:3])
    with pytest.raises(tables.TableError, match="on lastword:acc but the dense tiny on continuation:acc_norm"):
        tables.summarise([grid[0], grid[1]._replace(scores=fewer)])
    with pytest.raises(tables.TableError, match="unknown table format 'xls'"):
        tables.render(tables.summarise(grid), "xls")
    with pytest.raises(tables.TableError, match="unknown column 'beauty'"):
        tables.render(tables.summarise(grid), "md", columns=["beauty"])


def test_marks_follow_the_noise(summary):
    # 20 %: 25 points ahead with errors of 0.7; 40 %: 0.25 points ahead, a tie
    at20, at40 = summary.index[summary["ratio"] == 0.2], summary.index[summary["ratio"] == 0.4]
    assert tables.marks(summary, "acc") == {at20[0]: "best", at20[1]: "second", at40[0]: "second", at40[1]: "second"}
    assert tables.marks(summary, "ppl") == {at20[0]: "best", at20[1]: "second", at40[0]: "second", at40[1]: "second"}
    # without errors values compare as printed: 1/0.79, 1/0.8, 1/0.81
    found = tables.marks(summary[summary["ratio"] == 0.2], "speedup_prefill")
    assert found == {at20[1]: "best", at20[2]: "second"}
    assert tables.marks(summary, "params_removed") == {}
    assert tables.marks(summary.iloc[:2], "acc") == {}


@pytest.mark.parametrize("given, corrected", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x 0.01; then 2 x 0.03, which holds for 0.04 too
    ([0.5, 0.9, 0.001], [1.0, 1.0, 0.003]),
    ([math.nan, 0.02], [math.nan, 0.02]),
    ([], []),
])
def test_holm_by_hand(given, corrected):
    assert tables.holm(given) == pytest.approx(corrected, nan_ok=True)


def with_p(summary, p_values, metric="acc"):
    """Comparisons of the rows of one group, {(row, row): p}, as compare.compare writes them."""
    rows = [{**dict(zip(tables.KEYS, summary.loc[a, list(tables.KEYS)], strict=True)), "metric": metric, "task": "all",
             "other": summary.loc[b, "method"], "other_calib": summary.loc[b, "calib"],
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
    assert tables.marks(summary.iloc[:4], "acc", comparisons=p_values) == marked
    assert tables.marks(summary.iloc[:4], "rp", comparisons=p_values) == marked
    # no such tests of perplexities, and none of a column of costs: the errors and the printed values stay
    assert tables.marks(summary.iloc[:4], "ppl", comparisons=p_values) == {1: "best", 2: "second"}
    assert tables.marks(summary.iloc[:4], "speedup_prefill", comparisons=p_values) == {2: "best", 3: "second"}


def test_a_pair_without_a_test_leaves_the_group_to_its_errors(summary):
    p_values = with_p(summary, {(1, 2): 0.4, (1, 3): 0.4})
    assert tables.marks(summary.iloc[:4], "acc", comparisons=p_values) == {1: "best", 2: "second"}


def test_equal_values_share_their_mark():
    frame = tables.summarise([points.dense(), *(points.pruned(m, points.scores(25.0, a, 0.6, stderr=None))
                                                for m, a in (("a", 0.4), ("b", 0.4), ("c", 0.3)))])
    assert tables.marks(frame, "acc") == {1: "best", 2: "best"}
    assert tables.marks(frame, "ppl") == {}


def test_models_of_zeros_stand_apart_and_compete_among_themselves():
    sparse = [point._replace(facts=point.facts._replace(params_zeroed=20_000_000)) for point in (
        points.pruned("wanda", points.scores(15.0, 0.6, 0.8)),
        points.pruned("sparsegpt", points.scores(12.0, 0.7, 0.9)))]
    frame = tables.summarise([points.dense(), sparse[0], *points.grid()[2:4], sparse[1]])
    assert frame["method"].tolist() == ["dense", "remove", "lossy", "wanda", "sparsegpt"]
    assert frame["params_zeroed"].tolist()[3:] == [0.2, 0.2]
    marked = tables.marks(frame, "acc")
    assert marked[4] == "best" and marked[3] == "second" and sorted(marked.values()) == sorted(["best", "second"] * 2)
    assert "wanda (zeros)" in tables.render(frame, "md") and "wanda (zeros)" in tables.render(frame, "tex")


def test_csv_comes_back_whole(summary):
    back = pd.read_csv(io.StringIO(tables.render(summary, "csv")), keep_default_na=True)
    assert list(back.columns) == list(tables.SUMMARY)
    assert back["acc"].tolist() == summary["acc"].tolist()


def test_markdown(summary):
    lines = tables.render(summary, "md").splitlines()
    assert len(lines) == 2 + len(summary)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| 20 | kdp | 19.0 | 4 | **55.0** ± 0.7 |" in lines[3]
    assert lines[4].startswith("|  |  | remove |") and "<u>40.0</u>" in lines[4]
    assert "K max" not in lines[0] and "Calibration" not in lines[0]


def test_varying_keys_get_a_column():
    more = [*points.grid(), points.pruned("kdp", points.scores(25.0, 0.45, 0.65), k_max=5)]
    assert "| K max |" in tables.render(tables.summarise(more), "md").splitlines()[0]


def test_latex_escapes_and_balances():
    odd = "a_b&c%d#e$f{g}~^\\"
    frame = tables.summarise([points.dense(odd), points.pruned("kdp_m256", points.scores(25.0, 0.4, 0.6), model=odd)])
    text = tables.render(frame, "tex", caption="50 % & more", label="tab:x")
    assert r"a\_b\&c\%d\#e\$f\{g\}\textasciitilde{}\textasciicircum{}\textbackslash{}" in text
    assert r"\caption{50 \% \& more}" in text and r"\label{tab:x}" in text and r"kdp\_m256" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {len(tables.MAIN) + 3 - 1}
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")


def test_wide_tables_and_notes(summary):
    note = "p < 0.05 & more_\u2020"
    text = tables.render(summary, "tex", caption="Wide", wide=True, note=note)
    lines = text.splitlines()
    assert lines[0] == r"% needs \usepackage{booktabs,graphicx}" and lines[1] == r"\begin{table*}[t]"
    assert text.count(r"\begin{") == text.count(r"\end{") == 2 and r"\end{tabular}}" in lines
    assert r"p \textless{} 0.05 \& more\_\textdagger{}" in text
    bare = re.sub(r"\\[{}%]", "", text)
    assert bare.count("{") == bare.count("}")
    assert tables.render(summary, "md", note="a_b").endswith("|\n\na\\_b\n")


def test_fits_reads_stats_then_the_last_epoch():
    frame = tables.fits([({"method": "kdp"}, points.kernel()), ({"method": "kdp"}, points.inverse())])
    assert frame["step"].tolist() == ["kernel", "inverse"] and frame["block"].tolist() == ["5-8", "5-8"]
    assert frame.loc[0, "heldout_cos"] == 0.875 and frame.loc[0, "heldout_loss"] == pytest.approx(0.3)
    assert frame.loc[1, "heldout_error"] == 0.25 and "name" not in frame


@pytest.mark.parametrize(("value", "text"), [(0.5512, "55.1"), (math.nan, "–"), (None, "–"), (1e7, "1.0e9")])
def test_number(value, text):
    assert tables.number(tables.COLUMNS["acc"], value) == text
