"""Benchmarks: every task built from the hub's schema and from local files, prompts, metrics by another route."""
import json
import random
import socket
import zipfile
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import yaml
from lm_eval.tasks import TaskManager

from kdp_core.score import benchmarks
from kdp_core.score.benchmarks import BENCHMARKS, BenchmarkError, Chosen

PROBLEMS = [{"question": "Who is it?", "answer": "B", "options": ["Al", "Bo", "Cy", "Di"]},
            {"question": "Where is it?", "answer": "D", "options": ["in", "on", "by", "at"]}]
MMLU_SUBJECTS = ("anatomy", "anatomy", "astronomy", "anatomy")
HUB_ROWS = {
    "cmnli": [{"sentence1": "他去。", "sentence2": "他走", "label": label, "idx": 0} for label in (1, 0, 2, -1)],
    "hellaswag": [{"activity_label": "Rain", "ctx_a": "It rains.", "ctx_b": "she", "label": "2",
                   "endings": ["goes [title] in.", "sits.", "runs.", "sings."]}],
    "piqa": [{"goal": "Dry.", "sol1": "Sun.", "sol2": "Rain.", "label": 1}],
    "chid": [{"idx": 0, "candidates": ["甲甲甲甲", "乙乙乙乙", "丙丙丙丙"],
              "content": ["前#idiom000001#中#idiom000002#后", "独#idiom000003#"],
              "answers": {"text": ["乙乙乙乙", "甲甲甲甲", "丙丙丙丙"], "candidate_id": [1, 0, 2]}}],
    "wsc": [{"text": "Ann met Bea when she came .", "span1_index": 0, "span2_index": 4, "span1_text": "Ann",
             "span2_text": "she", "idx": 0, "label": 1}],
    "coqa": [{"story": "Tom sat.", "questions": {"input_text": ["Who sat?", "Why?"], "turn_id": [1, 2]},
              "answers": {"input_text": ["Tom", "Tired"], "turn_id": [1, 2]},
              "additional_answers": {"0": {"input_text": ["Tom", "He was tired"]}}}],
    "boolq": [{"passage": "Rain is wet.", "question": "is rain wet", "label": 1, "idx": 0}],
    "mmlu": [{"question": f"Which {i}?", "subject": subject, "choices": ["a", "b", "c", "d"], "answer": i}
             for i, subject in enumerate(MMLU_SUBJECTS)],
    "race_high": [{"example_id": f"high{i}.txt", "article": f"Text {i}.", **problem} for i in (1, 2)
                  for problem in PROBLEMS],
    "sst2": [{"sentence": "it shines", "label": 1, "idx": 0}],
    "c3": [{"id": 0, "context": ["男：走。", "女：好。"], "question": "谁走？", "choice": ["男", "女", "都走"],
            "answer": "都走"}],
    "wikitext": [{"page": " = Rain = \n It rained , twice ."}],
    "c4": [{"text": "It rained twice.", "timestamp": "", "url": ""}],
    "xsum": [{"document": "It rained twice.", "summary": "Rain fell.", "id": "1"},
             {"document": "", "summary": "Lost.", "id": "2"}],
    "lambada_openai": [{"text": "It rained and then it rained again"}],
    "arc_easy": [{"id": "1", "question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]},
                  "answerKey": "B"}],
    "openbookqa": [{"id": "1", "question_stem": "Rain is", "choices": {"text": ["wet", "dry"], "label": ["A", "B"]},
                    "answerKey": "A"}],
    "winogrande": [{"sentence": "Ann beat Bea as _ ran.", "option1": "Ann", "option2": "Bea", "answer": "1"}],
    "copa": [{"premise": "It rained.", "choice1": "Ants drowned.", "choice2": "Ants flew.", "question": "effect",
              "label": 0, "idx": 0}],
    "gsm8k": [{"question": "1 + 1?", "answer": "Two. #### 2"}],
    "humaneval": [{"task_id": "x/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n",
                   "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}],
    "mbpp": [{"task_id": i, "text": f"Write {i}.", "code": f"x = {i}", "test_list": ["assert x", "assert x > 0", "x"],
              "test_setup_code": ""} for i in (1, 2, 3, 4, 5)],
}
HUB_ROWS |= {"race_middle": HUB_ROWS["race_high"], "arc_challenge": HUB_ROWS["arc_easy"]}
CMMLU = "\ufeff,Question,A,B,C,D,Answer\n0,问一？,甲,乙,丙,丁,B\n1,问二？,甲,乙,丙,丁,C\n"
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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub, stubbed where it would be asked: tiny rows of the right form, and a list of what was asked for."""
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options))
        found = next(task for task, row in BENCHMARKS.items() if row.hub[:2] == (path, name))
        rows = datasets.Dataset.from_list(HUB_ROWS[found])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test", "dev", "prompt"), rows))

    def download(path, filename, **options):
        asked.append((path, None, {key: options[key] for key in ("revision",)}))
        with zipfile.ZipFile(tmp_path / filename, "w") as archive:
            for split in ("dev", "test"):
                archive.writestr(f"{split}/agronomy.csv", CMMLU)
        return str(tmp_path / filename)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a task reached for the network"))
    return asked


def built(chosen, name):
    """lm-eval's task, with the number of examples set as an evaluation sets it."""
    with benchmarks.task_folder(chosen) as folders:
        task = TaskManager(include_path=folders, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, chosen.fewshot))
    task.set_fewshot_seed(seed=0)
    return task


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hubs_data_set_is_asked_for_and_prompts_are_made(name, hub):
    row = BENCHMARKS[name]
    task = built(Chosen([name], allow_code=True, fewshot=0), name)
    (path, config, options), = hub
    assert (path, config) == row.hub[:2] and options == {"revision": row.hub.revision, **row.hub.options}
    task.build_all_requests(limit=2)
    assert task.instances and all(text for one in task.instances for text in one.arguments if text != "")
    target = task.doc_to_target(task.eval_docs[0])
    assert target is not None and target != ""
    metrics = {metric if isinstance(metric, str) else metric.__name__ for metric in task.aggregation()}
    assert row.metric in metrics


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


def test_rows_without_label_or_text_are_left_out(hub):
    assert [row["label"] for row in built(Chosen(["cmnli"]), "cmnli").eval_docs] == ["entailment", "neutral",
                                                                                    "contradiction"]
    assert len(built(Chosen(["xsum"]), "xsum").eval_docs) == 1


def test_every_gap_of_the_hubs_passages_becomes_a_row_with_the_others_filled(hub):
    rows = built(Chosen(["chid"]), "chid").eval_docs
    assert [(row["content"], row["answer"]) for row in rows] == [
        ("前#idiom#中甲甲甲甲后", 1), ("前乙乙乙乙中#idiom#后", 0), ("独#idiom#", 2)]


def test_subjects_come_in_turn_and_examples_are_of_the_own_subject(hub):
    task = built(Chosen(["mmlu"], fewshot=1), "mmlu")
    assert [row["subject"] for row in task.eval_docs] == ["anatomy", "astronomy", "anatomy", "anatomy"]
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


def local(folder, *names, fewshot=0):
    """A local data folder with the hub's rows."""
    for name in names:
        for file in benchmarks.local_files(name, fewshot=fewshot):
            (folder / file).parent.mkdir(exist_ok=True, parents=True)
            (folder / file).write_text("".join(json.dumps(row) + "\n" for row in HUB_ROWS[name]), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("name", HUB_ROWS)
def test_local_files_give_the_same_prompts_as_the_hub(name, hub, tmp_path):
    data = local(tmp_path / "data", name)
    both = [built(Chosen([name], data=source, allow_code=True, fewshot=0), name) for source in ("hub", data)]
    for task in both:
        task.build_all_requests(limit=3)
    assert len(hub) == 1
    assert [one.arguments for one in both[0].instances] == [one.arguments for one in both[1].instances]


@pytest.mark.parametrize("name", ["piqa", "gsm8k"])
def test_examples_are_drawn_alike_from_the_hub_and_from_local_files(name, hub, tmp_path, monkeypatch):
    fields = {key: value for key, value in HUB_ROWS[name][0].items() if isinstance(value, str)}
    rows = [HUB_ROWS[name][0] | {key: f"{i} {value}" for key, value in fields.items()} for i in range(6)]
    monkeypatch.setitem(HUB_ROWS, name, rows)
    data = local(tmp_path / "data", name, fewshot=2)
    prompts = []
    for source in ("hub", data):
        task = built(Chosen([name], data=source, fewshot=2), name)
        task.build_all_requests(limit=2)
        prompts.append([one.arguments[0] for one in task.instances])
    assert prompts[0] == prompts[1]
    assert prompts[0][0].count("Answer:") == 3


def test_what_cannot_be_run_is_refused_before_anything_is_written(tmp_path):
    data = local(tmp_path / "data", "piqa")
    for chosen, words in (
            (Chosen(["piqqa"]), "'piqqa' is unknown; did you mean 'piqa'"),
            (Chosen(["piqa"], limits={"pika": 2}), "'pika' is unknown"),
            (Chosen(["humaneval"]), "runs programs that the model writes; set evaluate.benchmarks.allow_code"),
            (Chosen(["piqa", "copa"], data=data), "eval/copa_val.jsonl does not exist; put it there"),
            (Chosen(["piqa"], data=data, fewshot=2), "calib/piqa_train.jsonl does not exist")):
        with pytest.raises(BenchmarkError, match=words):
            benchmarks.write_tasks(tmp_path / "out", chosen)
    assert not (tmp_path / "out").exists()


def test_a_subject_that_lm_eval_does_not_know_is_named():
    with pytest.raises(BenchmarkError, match="mmlu_alchemy"):
        benchmarks.subject_rows(datasets.Dataset.from_list([{"subject": "alchemy"}]))


def test_the_paper_is_covered():
    assert set(benchmarks.PAPER) == {"cmnli", "hellaswag", "piqa", "chid", "wsc", "coqa", "boolq", "mmlu", "cmmlu",
                                     "race_high", "race_middle", "sst2", "c3", "wikitext", "c4", "xsum"}
    assert set(benchmarks.STRONGEST) < set(BENCHMARKS)


def test_every_definition_is_used_and_every_benchmark_has_one():
    own = {path.stem for path in benchmarks.FILES.glob("*.yaml") if not path.stem.startswith("heldout")}
    assert own <= set(BENCHMARKS)
    assert all(name in own or (benchmarks.stock_folder() / row.stock).is_file()
               for name, row in BENCHMARKS.items())
    assert yaml.safe_load((benchmarks.FILES / "xsum.yaml").read_text().replace("!function ", ""))[
        "generation_kwargs"]["max_gen_toks"] == 64


def test_rouge_reads_the_first_line_that_is_not_empty():
    row = {"summary": "The old council met."}
    # stems and case do not count: 3 of 4 words are found, all 3 are right
    assert benchmarks.score_xsum(row, ["\n\n the Councils meeting met \nThe old"])["rouge1"] == pytest.approx(6 / 8)
    assert benchmarks.score_xsum(row, ["\n \n"]) == {"rouge1": 0.0}
    assert benchmarks.score_xsum(row, ["The old council met."])["rouge1"] == 1.0


def test_answers_of_a_conversation_are_compared_with_all_people_but_one():
    row = HUB_ROWS["coqa"][0]
    # right are `tired` and `he was tired`; beside the first F1 is 1, beside the other 2 / 4
    assert benchmarks.score_coqa(row, [" The tired!\nQ: more"]) == {"em": 0.5, "f1": pytest.approx((1 + 0.5) / 2)}
    assert benchmarks.score_coqa(row, [""]) == {"em": 0.0, "f1": 0.0}
    alone = {**row, "additional_answers": None}
    assert benchmarks.score_coqa(alone, ["tired"]) == {"em": 1.0, "f1": 1.0}


def test_area_under_the_curve_agrees_with_scikit_learn_and_the_bootstrap():
    from sklearn.metrics import roc_auc_score

    rng = random.Random(0)
    items = [(round(rng.gauss(0.6 * label, 1), 1), label) for label in [0, 1] * 60]
    margins, labels = zip(*items, strict=True)
    assert benchmarks.auc(items) == pytest.approx(roc_auc_score(labels, margins))
    draws = [benchmarks.auc(rng.choices(items, k=len(items))) for _ in range(600)]
    mean = sum(draws) / len(draws)
    spread = (sum((draw - mean) ** 2 for draw in draws) / (len(draws) - 1)) ** 0.5
    assert benchmarks.auc_stderr(items) == pytest.approx(spread, rel=0.15)
    assert benchmarks.auc_stderr([(1.0, 1), (0.0, 0)]) is None


def test_sentiment_gives_accuracy_and_a_margin():
    assert benchmarks.score_sst2({"label": 1}, [(-2.0, False), (-1.5, False)]) == {"acc": 1.0, "auc": (0.5, 1)}
    assert benchmarks.score_sst2({"label": 0}, [(-2.0, False), (-1.5, False)])["acc"] == 0.0


def test_programs_of_the_right_and_of_a_wrong_answer():
    humaneval, mbpp = HUB_ROWS["humaneval"][0], HUB_ROWS["mbpp"][0]
    for answer, passed in (("    return 1\n", 1.0), ("    return 2\n", 0.0), ("", 0.0)):
        assert benchmarks.score_humaneval(humaneval, [answer]) == {"pass@1": passed}
    for answer, passed in (("x = 1", 1.0), ("x = 0", 0.0)):
        assert benchmarks.score_mbpp(mbpp, [answer]) == {"pass@1": passed}


def test_the_page_has_every_benchmark_as_the_table_does():
    lines = (Path(__file__).parents[3] / "docs" / "benchmarks.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split(" | ")[0][2:]: line for line in lines if line.startswith("| ")}
    for name, row in BENCHMARKS.items():
        chance = "–" if row.chance is None else f"{row.chance:.3g}"
        told = [f"`{row.hub.path}`", f"| {row.metric} | {chance} |", f"`{row.local}`"]
        assert all(part in rows[name] for part in told + [f"(`{row.shots}`)"] * bool(row.shots)), name
