"""Items of the benchmarks: readers for local files and for the hub's archives, and conversions to the fields that the
prompts read.

The task files name the functions of this module, and lm-eval calls them by these names. Each function returns a data
set whose items have the fields that the task file's prompt reads. A data set that already has these fields is returned
unchanged. Torch is not needed.
"""
import csv
import io
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
import yaml
from datasets import Dataset

from kdp_core.score.benchmarks import BenchmarkError, stock_folder

CMMLU_ARCHIVE = "cmmlu_v1_0_1.zip"
BLANK = "#idiom#"
"""The mark of the gap in a passage of ChID."""
CMNLI_LABELS = ("neutral", "entailment", "contradiction")
"""The names of the labels; the index of a name is the label's number on the hub."""


def read_local(*, files: Mapping[str, str], **_: Any) -> dict[str, Dataset]:
    """The splits of JSONL files, read into memory; the keys are the names of the splits."""
    return {split: Dataset.from_list([json.loads(line, parse_constant=lambda _: None) for line in
                                      Path(path).read_text(encoding="utf-8").split("\n") if line])
            for split, path in files.items()}


def read_cmmlu(*, path: str, revision: str, **_: Any) -> dict[str, Dataset]:
    """CMMLU's splits, read from the hub's archive. The hub's loading script for this archive no longer runs in
    `datasets`."""
    archive = huggingface_hub.hf_hub_download(path, CMMLU_ARCHIVE, repo_type="dataset", revision=revision)
    items: dict[str, list[dict[str, str]]] = defaultdict(list)
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            parts = PurePosixPath(name).parts
            if parts[-1].endswith(".csv") and len(parts) > 1 and parts[0] != "__MACOSX":
                text = io.TextIOWrapper(opened.open(name), encoding="utf-8-sig", newline="")
                fields = ("Question", "A", "B", "C", "D", "Answer")
                items[parts[-2]] += [{"Subject": PurePosixPath(name).stem, **{field: row[field] for field in fields}}
                                     for row in csv.DictReader(text)]
    return {split: Dataset.from_list(found) for split, found in items.items()}


def subjects_in_turn(dataset: Dataset) -> Dataset:
    """MMLU's or CMMLU's items in turns: the first item of every subject, then the second item of every subject, and so
    on.

    Each item also gets lm-eval's description of the item's subject.

    Raises BenchmarkError for a subject that lm-eval does not know.
    """
    if "Subject" in dataset.column_names:
        field, pattern = "Subject", "cmmlu/cmmlu_{}.yaml"
    else:
        field, pattern = "subject", "mmlu/default/mmlu_{}.yaml"
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for place, subject in enumerate(dataset[field]):
        turns.append((seen[subject], place))
        seen[subject] += 1
    ordered = dataset.select([place for _, place in sorted(turns)])
    return ordered.add_column("description", [_description(pattern.format(subject)) for subject in ordered[field]])


@cache
def _description(file: str) -> str:
    path = stock_folder() / file
    if not path.is_file():
        raise BenchmarkError(f"lm-eval has no {file}: the data name a subject that it does not know; correct the data")
    return yaml.safe_load(path.read_text(encoding="utf-8"))["description"]


def articles(dataset: Dataset) -> Dataset:
    """RACE with one item for each article, as lm-eval's task reads it. On the hub, each question is an item."""
    if "problems" in dataset.column_names:
        return dataset
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for item in dataset:
        found[item["example_id"], item["article"]].append({key: item[key] for key in ("question", "answer", "options")})
    return Dataset.from_list([{"article": article, "problems": repr(problems)}
                              for (_, article), problems in found.items()])


def hellaswag_items(dataset: Dataset) -> Dataset:
    """HellaSwag's items as lm-eval prepares them; prepared items do not change."""
    if "query" in dataset.column_names:
        return dataset
    from lm_eval.tasks.hellaswag.utils import process_docs
    return process_docs(dataset)


def cmnli_items(dataset: Dataset) -> Dataset:
    """CMNLI's items that have a label. On the hub a label is a number, which is replaced by the label's name."""
    items = [{**item, "label": CMNLI_LABELS[item["label"]] if item["label"] in range(3) else item["label"]}
             for item in dataset]
    return Dataset.from_list([item for item in items if item["label"] in CMNLI_LABELS])


def c3_items(dataset: Dataset) -> Dataset:
    """C3's items {content, question, choices, label}. On the hub, an item has the text of its answer. This function
    replaces the text of the answer by its number."""
    if "choices" in dataset.column_names:
        return dataset
    return Dataset.from_list([{"content": item["context"], "question": item["question"], "choices": item["choice"],
                               "label": item["choice"].index(item["answer"])} for item in dataset])


def chid_items(dataset: Dataset) -> Dataset:
    """ChID's items {content, candidates, answer} with one gap each. An item of the hub has several passages, each with
    several gaps.

    In the text of an item, all other gaps are filled with their correct idioms.
    """
    if "answer" in dataset.column_names:
        return dataset
    return Dataset.from_list([made for item in dataset for made in _gaps(item)])


def _gaps(item: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The items made from one item of the hub, one for each gap in its passages."""
    answers = item["answers"]
    # some versions of `datasets` give sequences of records as records of lists, other versions as lists
    right = list(answers["candidate_id"]) if isinstance(answers, dict) else [one["candidate_id"] for one in answers]
    first = 0
    for passage in item["content"]:
        parts = re.split(r"#idiom\d+#", passage)
        mine = right[first:first + len(parts) - 1]
        first += len(mine)
        for gap, answer in enumerate(mine):
            filled = [item["candidates"][other] if place != gap else BLANK for place, other in enumerate(mine)]
            text = "".join(part + fill for part, fill in zip(parts, [*filled, ""], strict=True))
            yield {"content": text, "candidates": item["candidates"], "answer": answer}


def chid_choices(item: Mapping[str, Any]) -> list[str]:
    """The continuations: each idiom, followed by the text after the gap. All continuations have the same context, which
    is the text before the gap."""
    rest = item["content"].split(BLANK, 1)[1]
    return [idiom + rest for idiom in item["candidates"]]


def xsum_items(dataset: Dataset) -> Dataset:
    """XSum without the items whose story is empty."""
    return dataset.select([place for place, text in enumerate(dataset["document"]) if text and text.strip()])


def coqa_text(item: Mapping[str, Any]) -> str:
    """The prompt: a passage, the questions about it with their answers, and the last question."""
    questions, answers = item["questions"]["input_text"], item["answers"]["input_text"][:-1]
    turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions, answers, strict=False)]
    return f"{item['story']}\n\n{''.join(turns)}Q: {questions[-1]}\n\nA:"


def coqa_answers(item: Mapping[str, Any]) -> list[str]:
    """The correct answers to the last question: the asker's answer, and the answers of other people that differ from
    it."""
    last = len(item["questions"]["input_text"]) - 1
    found = [item["answers"]["input_text"][last]]
    for other in (item.get("additional_answers") or {}).values():
        answer = other["input_text"][last]
        if answer.lower() not in map(str.lower, found):
            found.append(answer)
    return found


def mbpp_shots(dataset: Dataset) -> Dataset:
    """The three examples of the prompt of MBPP's authors (tasks 2, 3 and 4).

    If an example is missing, the first three items of the data set are used.
    """
    places = [place for place, number in enumerate(dataset["task_id"]) if number in (2, 3, 4)]
    return dataset.select(places if len(places) == 3 else range(3))
