"""Tiny items as the hub has them, for every benchmark; what the tests of benchmarks share."""
import json

from lm_eval.tasks import TaskManager

from kdp_core.score import benchmarks

PROBLEMS = [{"question": "Who is it?", "answer": "B", "options": ["Al", "Bo", "Cy", "Di"]},
            {"question": "Where is it?", "answer": "D", "options": ["in", "on", "by", "at"]}]
MMLU_SUBJECTS = ("anatomy", "anatomy", "astronomy", "anatomy")
HUB_ITEMS = {
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
HUB_ITEMS |= {"race_middle": HUB_ITEMS["race_high"], "arc_challenge": HUB_ITEMS["arc_easy"]}
CMMLU = "\ufeff,Question,A,B,C,D,Answer\n0,问一？,甲,乙,丙,丁,B\n1,问二？,甲,乙,丙,丁,C\n"


def built(chosen, name):
    """lm-eval's task, with the number of examples set as an evaluation sets it."""
    with benchmarks.task_folder(chosen) as folders:
        task = TaskManager(include_path=folders, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, chosen.fewshot))
    task.set_fewshot_seed(seed=0)
    return task


def local(folder, *names, fewshot=0):
    """A local data folder with the items of the hub."""
    for name in names:
        for file in benchmarks.local_files(name, fewshot=fewshot):
            (folder / file).parent.mkdir(exist_ok=True, parents=True)
            (folder / file).write_text("".join(json.dumps(item) + "\n" for item in HUB_ITEMS[name]), encoding="utf-8")
    return str(folder)
