"""Words of made-up results: a clear win, a tie, a loss, and what a paired test changes."""
import pandas as pd
import pytest

from kdp_core.results import findings
from kdp_core.results.summary import summarise
from tests.kdp_core import points


def said(grid, **known) -> dict[str, dict[str, findings.Claim]]:
    """Claims by target and topic; no-break spaces as spaces."""
    found = findings.headline(summarise(grid), **known)
    return {finding.target: {claim.topic: claim._replace(text=claim.text.replace("\N{NO-BREAK SPACE}", " "))
                             for claim in finding.claims} for finding in found}


def compared(p, *, method="kdp", other="remove", against="best", task="all", metric="acc", ratio=0.2, other_k_max=3):
    return {"model": "tiny", "calib": "news", "method": method, "ratio": ratio, "k_max": 3, "other": other,
            "other_calib": "news", "other_k_max": other_k_max, "against": against, "metric": metric, "task": task,
            "difference": 0.1, "stderr": 0.01, "p": p, "p_holm": p, "items": 96}


def frame(*rows):
    return pd.DataFrame(list(rows))


def test_a_clear_win_and_a_loss_by_standard_errors():
    found = said(points.grid())
    assert found[""]["Dense"].text == (
        "The dense model has 60.0 ± 0.7 % mean accuracy, 20.00 ± 0.20 perplexity and 100.0 M parameters.")
    # 15 points apart, sqrt(2) * 0.7071 = 1.0 points combined
    assert found["20 %"]["Accuracy"] == ("Accuracy", "clear", (
        "kdp kept the most accuracy (55.0 ± 0.7 %, 91.7 % of dense), 15.0 points ahead of remove (40.0 ± 0.7 %): this "
        "is a clear difference (15.0 combined standard errors)."), "kdp")
    assert found["20 %"]["Perplexity"].text == (
        "kdp had the lowest perplexity (25.00 ± 0.25, 1.25 times dense), 15.00 below remove (40.00 ± 0.40): this "
        "is a clear difference (31.8 combined standard errors).")
    assert found["20 %"]["Compared with “remove”"].text == "Clearly more accurate: kdp. Less accurate: lossy."
    assert found["20 %"]["Removed"].text == (
        "19.0 to 21.0 % of the parameters and 4 layers were removed in 3 models.")


def test_a_tie_by_standard_errors():
    tie = said(points.grid())["40 %"]
    assert tie["Accuracy"][1:] == ("tie", (
        "kdp has the best value (40.0 ± 0.7 %, 66.7 % of dense), but does not differ clearly from remove (at most one "
        "combined standard error apart)."), "kdp")
    assert "No clear difference in accuracy: kdp." in tie["Compared with “remove”"].text


def test_a_paired_test_overrules_standard_errors_both_ways():
    found = said(points.grid(), comparisons=frame(
        compared(0.3), compared(1e-5, ratio=0.4), compared(0.6, other="lossy"),
        compared(2e-5, other="lossy", ratio=0.4)))
    assert found["20 %"]["Accuracy"].level == "tie"
    assert found["20 %"]["Accuracy"].text.endswith(
        "but does not differ clearly from remove and lossy (paired tests on the same items, p at least 0.3).")
    assert found["40 %"]["Accuracy"][1:3] == ("clear", (
        "kdp kept the most accuracy (40.0 ± 0.7 %, 66.7 % of dense), 0.3 points ahead of remove (39.8 ± 0.7 %): "
        "this is a clear difference (paired test on the same 96 items, p < 0.001)."))
    # perplexity had no test
    assert found["20 %"]["Perplexity"].text.endswith("this is a clear difference (31.8 combined standard errors).")


def test_which_tests_count():
    def accuracy(*rows):
        return said(points.grid(), comparisons=frame(*rows))["20 %"]["Accuracy"]

    assert accuracy(compared(0.04)).text.endswith("(paired test on the same 96 items, p = 0.04).")
    assert accuracy(compared(0.04, method="remove", other="kdp")).text.endswith("p = 0.04).")
    # a task of several, another K max, another metric, no p, nothing at all: not this question's
    for rows in ([compared(0.5, task="lastword")], [compared(0.5, other_k_max=4)], [compared(0.5, metric="ppl")],
                 [compared(0.5, against="baseline")], [compared(None)], []):
        assert accuracy(*rows).text.endswith("this is a clear difference (15.0 combined standard errors)."), rows
    both = said(points.grid(), comparisons=frame(compared(0.2, metric="ppl")))
    assert both["20 %"]["Perplexity"].level == "tie" and both["20 %"]["Accuracy"].level == "clear"


def test_the_baseline_has_tests_of_its_own():
    def beside(p):
        rows = [compared(0.4), compared(p, against="baseline"), compared(p, method="lossy", against="baseline")]
        return said(points.grid(), comparisons=frame(*rows))["20 %"]["Compared with “remove”"].text

    assert beside(0.01) == "Clearly more accurate: kdp. Less accurate: lossy."
    assert beside(0.2) == "No clear difference in accuracy: kdp and lossy."


@pytest.mark.parametrize("acc, stderr, level, words", [
    # half of 0.03 = 1.5 points apart, 1.0 combined
    (0.43, 0.01, "suggestive", "this is suggestive, but not clear (1.5 combined standard errors)."),
    (0.43, None, "unknown", "the standard errors are not known."),
    (0.4, None, "tie", "but does not differ clearly from b (at most one combined standard error apart)."),
])
def test_between_one_and_two_errors_and_without_errors(acc, stderr, level, words):
    claim = said([points.dense(), points.pruned("a", points.scores(30.0, acc, 0.6, stderr=stderr)),
                  points.pruned("b", points.scores(30.0, 0.4, 0.6, stderr=stderr))])["20 %"]["Accuracy"]
    assert claim.level == level and claim.text.endswith(words)


def test_one_method_alone_and_its_cost():
    found = said([points.dense(), points.pruned("kdp", points.scores(30.0, 0.4, 0.6), share=0.2)])["20 %"]
    assert found["Accuracy"][1:3] == ("", "Only kdp was scored for accuracy: 50.0 ± 0.7 %, 83.3 % of dense.")
    assert found["Cost of kdp"].text == (
        "The fit took 12 s. The model has 80.0 M parameters. Prefill is 1.25 times as fast as dense and decode is 1.25 "
        "times as fast as dense.")
    assert "All fits" not in found and "Compared with “remove”" not in found
    searched = points.pruned("sleb", points.scores(30.0, 0.4, 0.6))._replace(fit_seconds=None, search_seconds=1995.0)
    cost = said([points.dense(), searched])["20 %"]["Cost of sleb"].text
    assert cost.startswith("The search took 33 min. Nothing was fitted. ")


def test_zeros_are_compared_among_themselves_and_a_fine_tuned_first_place_says_so():
    def zeroed(method, acc):
        point = points.pruned(method, points.scores(30.0, acc, 0.6), share=0.0)
        return point._replace(facts=point.facts._replace(params_zeroed=2 * 10**7))

    grid = [*points.grid()[:3], zeroed("wanda", 0.6), zeroed("magnitude", 0.2),
            points.pruned("tuned", points.scores(24.0, 0.55, 0.65))._replace(finetuned=True)]
    found = said(grid)["20 %"]
    assert found["Accuracy, zeros only"].first == "wanda" and found["Accuracy, zeros only"].level == "clear"
    assert found["Accuracy"].first == "tuned†" and found["Accuracy, not fine-tuned"].first == "kdp"
    assert "in 3 models. 20.0 % of the parameters were set to zero and kept in 2 models." in found["Removed"].text
    assert "wanda" not in found["Compared with “remove”"].text


def test_names_say_what_varies_and_long_lists_are_counted():
    grid = [points.dense(), points.pruned("kdp", points.scores(30.0, 0.4, 0.6)),
            points.pruned("kdp", points.scores(30.0, 0.4, 0.6), k_max=4)]
    assert said(grid)["20 %"]["Accuracy"].text.startswith("kdp (k 3) has the best value")
    assert findings.listing(list("abcdef")) == "a, b, c, d, e and f"
    assert findings.listing(list("abcdefg")) == "a, b, c, d, e and 2 others"
    assert [findings.duration(seconds) for seconds in (0.4, 119, 120, 7199, 9000)] == [
        "0 s", "119 s", "2 min", "120 min", "2.5 h"]
    assert findings.counted(1, "fit") == "1 fit" and findings.counted(findings.interval(1, 1), "layer") == "1 layer"


def test_the_outcome_of_a_run_in_one_sentence_and_the_next_best_in_others():
    summary = summarise(points.grid())
    best = ("kdp removed 38 % of the parameters of tiny, and the smaller model has 2.50 times the perplexity and 67 % "
            "of the accuracy of the dense model.")
    assert findings.sentence(summary).replace("\N{NO-BREAK SPACE}", " ") == best
    # removal alone takes 41 %, which is another size
    assert findings.next_best(summary) == ""
    level = summary.assign(params_removed=summary["params_removed"].clip(upper=0.388))
    assert findings.sentence(level).replace("\N{NO-BREAK SPACE}", " ") == best
    assert findings.next_best(level).replace("\N{NO-BREAK SPACE}", " ") == (
        "At about the size of the best model, remove is the next best method. It removed 39 % of the parameters, and "
        "its model has 2.51 times the perplexity and 66 % of the accuracy. Neither difference is clear.")
    assert findings.next_best(level, comparisons=frame(compared(0.01, metric="ppl", ratio=0.4))).endswith(
        "The difference in perplexity is clear, but the difference in accuracy is not.")
    assert findings.sentence(summary[summary["method"] == "dense"]) == ""
    held = summary.assign(params_zeroed=[0.4 if method == "kdp" else 0 for method in summary["method"]])
    assert findings.sentence(held).startswith("remove removed")
