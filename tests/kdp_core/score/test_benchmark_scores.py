"""Scores of answers, by hand."""
import pytest

from kdp_core.score.benchmark_scores import score_coqa, score_humaneval, score_mbpp, score_sst2, score_xsum
from tests.kdp_core.score.hub import HUB_ITEMS


def test_rouge_reads_the_first_line_that_is_not_empty():
    item = {"summary": "The old council met."}
    # stems and case do not count: 3 of 4 words are found, all 3 are right
    assert score_xsum(item, ["\n\n the Councils meeting met \nThe old"])["rouge1"] == pytest.approx(6 / 8)
    assert score_xsum(item, ["\n \n"]) == {"rouge1": 0.0}
    assert score_xsum(item, ["The old council met."])["rouge1"] == 1.0


def test_answers_of_a_conversation_are_compared_with_all_people_but_one():
    item = HUB_ITEMS["coqa"][0]
    # right are `tired` and `he was tired`; beside the first F1 is 1, beside the other 2 / 4
    assert score_coqa(item, [" The tired!\nQ: more"]) == {"em": 0.5, "f1": pytest.approx((1 + 0.5) / 2)}
    assert score_coqa(item, [""]) == {"em": 0.0, "f1": 0.0}
    alone = {**item, "additional_answers": None}
    assert score_coqa(alone, ["tired"]) == {"em": 1.0, "f1": 1.0}


def test_sentiment_gives_accuracy_and_a_margin():
    assert score_sst2({"label": 1}, [(-2.0, False), (-1.5, False)]) == {"acc": 1.0, "auc": (0.5, 1)}
    assert score_sst2({"label": 0}, [(-2.0, False), (-1.5, False)])["acc"] == 0.0


def test_programs_of_the_right_and_of_a_wrong_answer():
    humaneval, mbpp = HUB_ITEMS["humaneval"][0], HUB_ITEMS["mbpp"][0]
    for answer, passed in (("    return 1\n", 1.0), ("    return 2\n", 0.0), ("", 0.0)):
        assert score_humaneval(humaneval, [answer]) == {"pass@1": passed}
    for answer, passed in (("x = 1", 1.0), ("x = 0", 0.0)):
        assert score_mbpp(mbpp, [answer]) == {"pass@1": passed}
