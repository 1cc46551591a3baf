"""Items of the benchmarks: their prompts, those that are left out, and the same from the hub and from files."""
import datasets
import pytest

from kdp_core.score import benchmark_data
from kdp_core.score.benchmarks import BenchmarkError, Chosen
from tests.kdp_core.score.hub import HUB_ITEMS, built, local

PROMPTS = {
    "cmnli": ("他去，对吗？", ["对，他走", "也许，他走", "不对，他走"], 0),
    "hellaswag": ("Rain: It rains. She", [" goes. in.", " sits.", " runs.", " sings."], 2),
    "piqa": ("Question: Dry.\nAnswer:", [" Sun.", " Rain."], 1),
    "chid": ("前", ["甲甲甲甲中甲甲甲甲后", "乙乙乙乙中甲甲甲甲后", "丙丙丙丙中甲甲甲甲后"], 1),
    "coqa": ("Tom sat.\n\nQ: Who sat?\n\nA: Tom\n\nQ: Why?\n\nA:", None, ["Tired", "He was tired"]),
    "boolq": ("Rain is wet.\nQuestion: is rain wet?\nAnswer:", [" no", " yes"], 1),
    "race_middle": ("Article: Text 1.\n\nQuestion: Who is it?\nAnswer: Bo\nWhere is it?",
                    [" in", " on", " by", " at"], 3),
    "c3": ("男：走。\n女：好。\n问：谁走？\n答：", ["男", "女", "都走"], 2),
    "cmmlu": ("以下是关于农学的单项选择题，请直接给出正确答案的选项。\n\n问一？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",
              [" A", " B", " C", " D"], 1),
    "mmlu": ("The following are multiple choice questions (with answers) about anatomy.\n\nWhich 0?\nA. a\nB. b\nC. c\n"
             "D. d\nAnswer:", [" A", " B", " C", " D"], 0),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_choices_and_answers_are_these(name, hub):
    task = built(Chosen([name]), name)
    task.build_all_requests(limit=1)
    context, choices, gold = PROMPTS[name]
    if choices is None:
        assert task.instances[0].arguments[0] == context
    else:
        assert [one.arguments for one in task.instances] == [(context, choice) for choice in choices]
    assert task.doc_to_target(task.eval_docs[0]) == gold


def test_items_without_label_or_text_are_left_out(hub):
    assert [item["label"] for item in built(Chosen(["cmnli"]), "cmnli").eval_docs] == ["entailment", "neutral",
                                                                                    "contradiction"]
    assert len(built(Chosen(["xsum"]), "xsum").eval_docs) == 1


def test_every_gap_of_the_hubs_passages_becomes_an_item_with_the_others_filled(hub):
    items = built(Chosen(["chid"]), "chid").eval_docs
    assert [(item["content"], item["answer"]) for item in items] == [
        ("前#idiom#中甲甲甲甲后", 1), ("前乙乙乙乙中#idiom#后", 0), ("独#idiom#", 2)]


def test_subjects_come_in_turn_and_examples_are_of_the_own_subject(hub):
    task = built(Chosen(["mmlu"], fewshot=1), "mmlu")
    assert [item["subject"] for item in task.eval_docs] == ["anatomy", "astronomy", "anatomy", "anatomy"]
    task.build_all_requests(limit=2)
    first, second = task.instances[0].arguments[0], task.instances[4].arguments[0]
    assert first.startswith("The following are multiple choice questions (with answers) about anatomy.\n\nWhich 0?")
    assert second.startswith("The following are multiple choice questions (with answers) about astronomy.\n\nWhich 2?")
    assert second.count("Answer:") == 2


def test_code_examples_are_the_papers_three(hub):
    task = built(Chosen(["mbpp"], allow_code=True), "mbpp")
    task.build_all_requests(limit=1)
    prompt = task.instances[0].arguments[0]
    assert [f"Write {i}." in prompt for i in (1, 2, 3, 4, 5)] == [True, True, True, True, False]
    assert prompt.count("[DONE]") == 3 and prompt.endswith("Write 1. Your code should pass these tests:\n\nassert x\n"
                                                           "assert x > 0\nx\n[BEGIN]\n")


@pytest.mark.parametrize("name", HUB_ITEMS)
def test_local_files_give_the_same_prompts_as_the_hub(name, hub, tmp_path):
    data = local(tmp_path / "data", name)
    both = [built(Chosen([name], data=source, allow_code=True, fewshot=0), name) for source in ("hub", data)]
    for task in both:
        task.build_all_requests(limit=3)
    assert len(hub) == 1
    assert [one.arguments for one in both[0].instances] == [one.arguments for one in both[1].instances]


@pytest.mark.parametrize("name", ["piqa", "gsm8k"])
def test_examples_are_drawn_alike_from_the_hub_and_from_local_files(name, hub, tmp_path, monkeypatch):
    fields = {key: value for key, value in HUB_ITEMS[name][0].items() if isinstance(value, str)}
    items = [HUB_ITEMS[name][0] | {key: f"{i} {value}" for key, value in fields.items()} for i in range(6)]
    monkeypatch.setitem(HUB_ITEMS, name, items)
    data = local(tmp_path / "data", name, fewshot=2)
    prompts = []
    for source in ("hub", data):
        task = built(Chosen([name], data=source, fewshot=2), name)
        task.build_all_requests(limit=2)
        prompts.append([one.arguments[0] for one in task.instances])
    assert prompts[0] == prompts[1]
    assert prompts[0][0].count("Answer:") == 3


def test_a_subject_that_lm_eval_does_not_know_is_named():
    with pytest.raises(BenchmarkError, match="mmlu_alchemy"):
        benchmark_data.subjects_in_turn(datasets.Dataset.from_list([{"subject": "alchemy"}]))
