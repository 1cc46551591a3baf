"""Benchmarks as lm-eval tasks, data from the hub or a local folder: the KDP paper's 15 and others beside them.

The paper (Ma et al., ICLR 2026, section 4.1) scores with the "LM Evaluation Harness with default parameters": 12 tasks
by accuracy, two corpora by perplexity, XSum by ROUGE-1. Where lm-eval has a task its own file is used and only the data
source is replaced; `task_files/` holds the definitions it lacks. docs/benchmarks.md argues each prompt.
Two tasks are put together otherwise than in lm-eval: MMLU and CMMLU are one task each instead of groups of 57 and 67,
with the prompts of the groups, the subjects in turn, so that a limit of n items takes n and not 57 n.
What lm-eval calls from task files (`!function kdp_core.score.benchmarks.…`) stands here too; none of it needs torch.
"""
import contextlib
import csv
import difflib
import importlib.util
import io
import json
import math
import re
import string
import tempfile
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import huggingface_hub
import yaml
from datasets import Dataset

from kdp_core.score import sandbox

FILES = Path(__file__).parent / "task_files"
HUB = "hub"
CLUE = "7a92286c90a77a495dcaeba0fe34939053ef7dc5"
CMMLU_ARCHIVE = "cmmlu_v1_0_1.zip"
C4_SHARD = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "verification_mode": "no_checks"}
BLANK = "#idiom#"
CMNLI_LABELS = ("neutral", "entailment", "contradiction")
"""In the order of the hub data set's numbers."""


class BenchmarkError(ValueError):
    """A benchmark cannot be run as it was asked for."""


class Source(NamedTuple):
    """A data set of the hub."""
    path: str
    name: str | None = None
    """Its configuration."""
    revision: str = "main"
    """A commit where one is known to hold the data as plain files."""
    options: Mapping[str, Any] = {}
    """Further arguments of datasets.load_dataset."""


class Benchmark(NamedTuple):
    """A row of the table: where definition and data come from, and how the score is read."""
    stock: str | None
    """lm-eval's own file, below its folder of tasks; task_files/<name>.yaml, where there is one, is laid over it."""
    hub: Source
    split: str
    """The scored split, also the name under which a local file is given to the task."""
    local: str
    """Below a local data folder."""
    shots: str | None
    """Likewise: where examples of a few-shot prompt come from."""
    metric: str
    """The one that counts in tables."""
    chance: float | None
    """Expected score of guessing; None where there is nothing to guess."""
    note: str
    shots_split: str = "train"
    fewshot: int = 0
    """Examples of a prompt unless the user says otherwise."""
    fixed: bool = False
    """Whether the number of examples belongs to the task."""
    code: bool = False
    """Whether the model's answers are run as programs."""


def _row(stock: str | None, hub: Source, split: str, files: tuple[str, str | None], score: tuple[str, float | None],
         note: str, **more: Any) -> Benchmark:
    local, shots = (name and f"{name}.jsonl" for name in files)
    return Benchmark(stock, hub, split, local, shots, *score, note, **more)


SUPER_GLUE = "aps/super_glue"
RACE = "2fec9fd81f1dc971569a9b729c43f2f0e6436637"
BENCHMARKS: dict[str, Benchmark] = {
    "cmnli": _row(None, Source("clue/clue", "cmnli", CLUE), "validation", ("eval/cmnli_dev", "calib/cmnli_dev_rest"),
                  ("acc", 1 / 3), "Chinese: does a sentence follow from another"),
    "hellaswag": _row("hellaswag/hellaswag.yaml", Source("Rowan/hellaswag"), "validation",
                      ("eval/hellaswag_val_text", "calib/hellaswag_train"), ("acc_norm", 0.25), "how a scene goes on"),
    "piqa": _row("piqa/piqa.yaml", Source("baber/piqa"), "validation", ("eval/piqa_val", "calib/piqa_train"),
                 ("acc_norm", 0.5), "which of two ways reaches a goal"),
    "chid": _row(None, Source("clue/clue", "chid", CLUE), "validation", ("eval/chid_test", "calib/chid_train"),
                 ("acc", 1 / 7),
                 "Chinese: the idiom of a gap; 7 candidates in a local FewCLUE file, 10 on the hub (chance 0.1)"),
    "wsc": _row("super_glue/wsc/default.yaml", Source(SUPER_GLUE, "wsc.fixed"), "validation",
                ("eval/wsc_val", "calib/wsc_train_few"), ("acc", 0.5), "whom a pronoun means"),
    "coqa": _row(None, Source("EleutherAI/coqa"), "validation", ("eval/coqa_val", "calib/coqa_train"), ("em", None),
                 "the last question of a conversation about a passage"),
    "boolq": _row("super_glue/boolq/default.yaml", Source(SUPER_GLUE, "boolq"), "validation",
                  ("eval/boolq_val", "calib/boolq_train_few"), ("acc", 0.5), "yes or no about a passage"),
    "mmlu": _row("mmlu/default/_default_template_yaml", Source("cais/mmlu", "all"), "test",
                 ("eval/mmlu_test", "eval/mmlu_dev"), ("acc", 0.25), "57 subjects, in turn", shots_split="dev"),
    "cmmlu": _row("cmmlu/_default_template_yaml", Source("haonan-li/cmmlu"), "test",
                  ("eval/cmmlu_test", "eval/cmmlu_dev"), ("acc_norm", 0.25), "Chinese: 67 subjects, in turn",
                  shots_split="dev"),
    "race_high": _row("race/race.yaml", Source("ehovy/race", "high", RACE), "test",
                      ("eval/race_high_test", "calib/race_high_train"), ("acc", 0.25),
                      "the last question of a school text"),
    "race_middle": _row("race/race.yaml", Source("ehovy/race", "middle", RACE), "test",
                        ("eval/race_middle_test", "calib/race_middle_train"), ("acc", 0.25),
                        "the same, of easier texts"),
    "sst2": _row("glue/sst2/default.yaml", Source("nyu-mll/glue", "sst2"), "validation",
                 ("eval/sst2_val", "calib/sst2_train"), ("acc", 0.5),
                 "is a sentence of praise; beside it the area under the curve"),
    "c3": _row(None, Source("clue/clue", "c3", CLUE), "validation", ("eval/c3_test", "calib/c3_train"),
               ("acc_norm", 0.25), "Chinese: a question about a text or dialogue, two to four choices"),
    "wikitext": _row("wikitext/wikitext.yaml", Source("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
                     "test", ("eval/wikitext2_test", None), ("word_perplexity", None), "whole pages, rolling windows",
                     fixed=True),
    "c4": _row("c4/c4.yaml", Source("allenai/c4", "en", options=C4_SHARD), "validation", ("eval/c4_sample", None),
               ("word_perplexity", None),
               "web pages, rolling windows; the validation shard alone is fetched", fixed=True),
    "xsum": _row(None, Source("EdinburghNLP/xsum", None, "refs/convert/parquet"), "test", ("eval/xsum_dev", None),
                 ("rouge1", None), "a news story in one sentence, 64 tokens, greedy", fixed=True),
    "lambada_openai": _row("lambada/lambada_openai.yaml", Source("EleutherAI/lambada_openai", "default"), "test",
                           ("eval/lambada_openai_test", None), ("acc", 0.0), "the last word of a passage", fixed=True),
    "arc_easy": _row("arc/arc_easy.yaml", Source("allenai/ai2_arc", "ARC-Easy"), "test",
                     ("eval/arc_easy_test", "calib/arc_easy_train"), ("acc_norm", 0.25), "school science"),
    "arc_challenge": _row("arc/arc_challenge.yaml", Source("allenai/ai2_arc", "ARC-Challenge"), "test",
                          ("eval/arc_challenge_test", "calib/arc_challenge_train"), ("acc_norm", 0.25),
                          "school science that simple methods miss"),
    "openbookqa": _row("openbookqa/openbookqa.yaml", Source("allenai/openbookqa", "main"), "test",
                       ("eval/openbookqa_test", "calib/openbookqa_train"), ("acc_norm", 0.25), "elementary science"),
    "winogrande": _row("winogrande/default.yaml", Source("allenai/winogrande", "winogrande_xl"), "validation",
                       ("eval/winogrande_val", "calib/winogrande_train"), ("acc", 0.5), "whom a gap means"),
    "copa": _row("super_glue/copa/default.yaml", Source(SUPER_GLUE, "copa"), "validation",
                 ("eval/copa_val", "calib/copa_train"), ("acc", 0.5), "cause or effect"),
    "gsm8k": _row("gsm8k/gsm8k.yaml", Source("openai/gsm8k", "main"), "test", ("eval/gsm8k_test", "calib/gsm8k_train"),
                  ("exact_match", 0.0), "sums in words, worked out in text", fewshot=5),
    "humaneval": _row(None, Source("openai/openai_humaneval"), "test", ("eval/humaneval_test", None), ("pass@1", 0.0),
                      "a function to its docstring, run against tests", fixed=True, code=True),
    "mbpp": _row(None, Source("google-research-datasets/mbpp", "full"), "test", ("eval/mbpp_test", "calib/mbpp_train"),
                 ("pass@1", 0.0), "a function to one sentence, run against tests", shots_split="prompt", fewshot=3,
                 fixed=True, code=True),
}
PAPER = tuple(BENCHMARKS)[:16]
"""The paper's 15; its RACE stands for two."""
STRONGEST = ("lambada_openai", "arc_easy", "hellaswag", "piqa", "copa", "wikitext")
"""Where SmolLM2-135M is furthest from chance for its cost, so that methods on it can be told apart."""


class Chosen(NamedTuple):
    """The benchmarks of one evaluation."""
    tasks: Sequence[str] = ()
    data: str = HUB
    """`hub`, or a folder that holds the local files of the table."""
    limit: int | None = None
    """Items a task at most, the first ones."""
    limits: Mapping[str, int] = {}
    """The same for single tasks."""
    fewshot: int | None = None
    """Examples a prompt, of tasks that leave it open; the table's unless set."""
    allow_code: bool = False
    """Whether programs that the model writes may be run, by other tasks too."""


def write_tasks(folder: str | Path, chosen: Chosen) -> None:
    """Write a task file for each chosen benchmark, for TaskManager(include_path=folder) of this installation.

    Raises BenchmarkError, before anything is written, for an unknown name, a missing local file, or a task that runs
    programs without `allow_code`.
    """
    check(chosen)
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in chosen.tasks:
        text = yaml.dump(_definition(name, chosen), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
        (Path(folder) / f"{name}.yaml").write_text(text, encoding="utf-8")


@contextlib.contextmanager
def task_folder(chosen: Chosen | None) -> Iterator[list[Path]]:
    """A folder of the chosen benchmarks for as long as the body runs, in a list; no folder where none is chosen."""
    if chosen is None:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="kdp-benchmarks-") as folder:
        write_tasks(folder, chosen)
        yield [Path(folder)]


def check(chosen: Chosen) -> None:
    """Raise BenchmarkError for what cannot be run."""
    for name in [*chosen.tasks, *chosen.limits]:
        if name not in BENCHMARKS:
            near = difflib.get_close_matches(name, BENCHMARKS, n=1)
            raise BenchmarkError(f"benchmark {name!r} is unknown; " + (f"did you mean {near[0]!r}?" if near else
                                                                       f"known are {', '.join(BENCHMARKS)}"))
    for name in chosen.tasks:
        if BENCHMARKS[name].code and not chosen.allow_code:
            raise BenchmarkError(f"benchmark {name!r} runs programs that the model writes; set evaluate.benchmarks."
                                 "allow_code to true (allow_code=True) to run them with limits, or leave it out")
        for file in local_files(name, fewshot=chosen.fewshot) if chosen.data != HUB else []:
            if not (Path(chosen.data) / file).is_file():
                raise BenchmarkError(f"benchmark {name!r}: {Path(chosen.data) / file} does not exist; put it there, "
                                     f"take data: {HUB}, or leave the task out")


def shots_of(name: str, fewshot: int | None) -> int:
    """Examples in a prompt of a benchmark."""
    row = BENCHMARKS[name]
    return row.fewshot if row.fixed or fewshot is None else fewshot


def local_files(name: str, *, fewshot: int | None = None) -> list[str]:
    """Files below a local data folder that a benchmark needs."""
    row = BENCHMARKS[name]
    shots = [row.shots] if row.shots and shots_of(name, fewshot) else []
    return [row.local, *shots]


class _Function(str):
    """A dotted name that lm-eval resolves."""


class _Dumper(yaml.SafeDumper):
    """YAML with lm-eval's tag for functions."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _definition(name: str, chosen: Chosen) -> dict[str, Any]:
    """A task file's content: what is included, and where the data come from."""
    row = BENCHMARKS[name]
    own = FILES / f"{name}.yaml"
    files = ([stock_folder() / row.stock] if row.stock else []) + ([own] if own.exists() else [])
    made: dict[str, Any] = {"include": [str(file) for file in files], "task": name}
    if chosen.data != HUB:
        return made | _local(name, chosen)
    if name == "cmmlu":
        return made | {"custom_dataset": _Function("kdp_core.score.benchmarks.read_cmmlu"),
                       "dataset_kwargs": {"path": row.hub.path, "revision": row.hub.revision}}
    splits = {"training_split": None} if name == "c4" else {}
    return made | splits | {"dataset_path": row.hub.path, "dataset_name": row.hub.name,
                            "dataset_kwargs": {"revision": row.hub.revision, **row.hub.options}}


def _local(name: str, chosen: Chosen) -> dict[str, Any]:
    row = BENCHMARKS[name]
    paths = [str((Path(chosen.data) / file).resolve()) for file in local_files(name, fewshot=chosen.fewshot)]
    splits = dict(zip((row.split, row.shots_split), paths, strict=False))
    shots = row.shots_split if row.shots_split in splits else None
    return {"custom_dataset": _Function("kdp_core.score.benchmarks.read_local"), "dataset_kwargs": {"files": splits},
            "validation_split": row.split if row.split == "validation" else None,
            "test_split": row.split if row.split == "test" else None,
            "training_split": shots if shots == "train" else None,
            "fewshot_split": shots if shots != "train" else None}


@cache
def stock_folder() -> Path:
    """lm-eval's own tasks, found without importing it."""
    return Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"


# Rows -----------------------------------------------------------------------------------------------------------------

def read_local(*, files: Mapping[str, str], **_: Any) -> dict[str, Dataset]:
    """Splits of JSONL files, in memory."""
    return {split: Dataset.from_list([json.loads(line, parse_constant=lambda _: None) for line in
                                      Path(path).read_text(encoding="utf-8").split("\n") if line])
            for split, path in files.items()}


def read_cmmlu(*, path: str, revision: str, **_: Any) -> dict[str, Dataset]:
    """CMMLU's splits from its archive: on the hub it comes with a loading script, which `datasets` runs no more."""
    archive = huggingface_hub.hf_hub_download(path, CMMLU_ARCHIVE, repo_type="dataset", revision=revision)
    rows: dict[str, list[dict[str, str]]] = defaultdict(list)
    with zipfile.ZipFile(archive) as opened:
        for name in sorted(opened.namelist()):
            parts = PurePosixPath(name).parts
            if parts[-1].endswith(".csv") and len(parts) > 1 and parts[0] != "__MACOSX":
                text = io.TextIOWrapper(opened.open(name), encoding="utf-8-sig", newline="")
                kept = ("Question", "A", "B", "C", "D", "Answer")
                rows[parts[-2]] += [{"Subject": PurePosixPath(name).stem, **{key: row[key] for key in kept}}
                                    for row in csv.DictReader(text)]
    return {split: Dataset.from_list(found) for split, found in rows.items()}


def subject_rows(dataset: Dataset) -> Dataset:
    """MMLU's or CMMLU's rows with the subjects in turn, and lm-eval's own description of each subject."""
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


def article_rows(dataset: Dataset) -> Dataset:
    """RACE with a row an article, as lm-eval's task reads it; the hub has a row a question."""
    if "problems" in dataset.column_names:
        return dataset
    articles: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in dataset:
        articles[row["example_id"], row["article"]].append({key: row[key] for key in ("question", "answer", "options")})
    return Dataset.from_list([{"article": article, "problems": repr(problems)}
                              for (_, article), problems in articles.items()])


def hellaswag_rows(dataset: Dataset) -> Dataset:
    """HellaSwag as lm-eval prepares it; rows that come prepared stay as they are."""
    if "query" in dataset.column_names:
        return dataset
    from lm_eval.tasks.hellaswag.utils import process_docs
    return process_docs(dataset)


def cmnli_rows(dataset: Dataset) -> Dataset:
    """CMNLI's rows with a label, by name; the hub has numbers."""
    rows = [{**row, "label": CMNLI_LABELS[row["label"]] if row["label"] in range(3) else row["label"]}
            for row in dataset]
    return Dataset.from_list([row for row in rows if row["label"] in CMNLI_LABELS])


def c3_rows(dataset: Dataset) -> Dataset:
    """C3's rows {content, question, choices, label}; the hub names the answer by its text."""
    if "choices" in dataset.column_names:
        return dataset
    return Dataset.from_list([{"content": row["context"], "question": row["question"], "choices": row["choice"],
                               "label": row["choice"].index(row["answer"])} for row in dataset])


def chid_rows(dataset: Dataset) -> Dataset:
    """ChID's rows {content, candidates, answer} with one gap each; on the hub a row has several passages and gaps.

    Other gaps of the same passage are filled with their idioms.
    """
    if "answer" in dataset.column_names:
        return dataset
    return Dataset.from_list([made for row in dataset for made in _gaps(row)])


def _gaps(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    answers = row["answers"]
    # `datasets` has given sequences of records as records of lists, and as lists
    right = list(answers["candidate_id"]) if isinstance(answers, dict) else [one["candidate_id"] for one in answers]
    first = 0
    for passage in row["content"]:
        parts = re.split(r"#idiom\d+#", passage)
        mine = right[first:first + len(parts) - 1]
        first += len(mine)
        for gap, answer in enumerate(mine):
            filled = [row["candidates"][other] if place != gap else BLANK for place, other in enumerate(mine)]
            text = "".join(part + fill for part, fill in zip(parts, [*filled, ""], strict=True))
            yield {"content": text, "candidates": row["candidates"], "answer": answer}


def chid_choices(row: Mapping[str, Any]) -> list[str]:
    """Each idiom with the rest of the passage; what stands before the gap is the context, the same for all."""
    rest = row["content"].split(BLANK, 1)[1]
    return [idiom + rest for idiom in row["candidates"]]


def xsum_rows(dataset: Dataset) -> Dataset:
    """XSum without stories that have no text."""
    return dataset.select([place for place, text in enumerate(dataset["document"]) if text and text.strip()])


def coqa_text(row: Mapping[str, Any]) -> str:
    """A passage, what was asked and answered about it, and the last question."""
    questions, answers = row["questions"]["input_text"], row["answers"]["input_text"][:-1]
    turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions, answers, strict=False)]
    return f"{row['story']}\n\n{''.join(turns)}Q: {questions[-1]}\n\nA:"


def coqa_answers(row: Mapping[str, Any]) -> list[str]:
    """The right answers to the last question: the asker's, and those of further people that differ from it."""
    last = len(row["questions"]["input_text"]) - 1
    found = [row["answers"]["input_text"][last]]
    for other in (row.get("additional_answers") or {}).values():
        answer = other["input_text"][last]
        if answer.lower() not in map(str.lower, found):
            found.append(answer)
    return found


def mbpp_shots(dataset: Dataset) -> Dataset:
    """The three examples of the paper's prompt (tasks 2, 3 and 4), or the first three rows of a set without them."""
    places = [place for place, number in enumerate(dataset["task_id"]) if number in (2, 3, 4)]
    return dataset.select(places if len(places) == 3 else range(3))


# Scores ---------------------------------------------------------------------------------------------------------------

def score_xsum(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """ROUGE-1 (F, stemmed) of the answer's first line that is not empty."""
    lines = [line for line in results[0].split("\n") if line.strip()]
    return {"rouge1": _rouge().score(row["summary"], lines[0] if lines else "")["rouge1"].fmeasure}


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    return RougeScorer(["rouge1"], use_stemmer=True)


def score_coqa(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of the answer's first line, as CoQA's authors score people.

    Of several right answers each is left out in turn, and the best match with the others counts.
    """
    said, right = _words(results[0].strip().split("\n")[0]), [_words(answer) for answer in coqa_answers(row)]
    turns = [right[:i] + right[i + 1:] for i in range(len(right))] if len(right) > 1 else [right]
    return {name: sum(max(score(answer, said) for answer in others) for others in turns) / len(turns)
            for name, score in (("em", lambda one, other: float(one == other)), ("f1", _overlap))}


def _words(text: str) -> list[str]:
    """Words without case, punctuation and articles, as SQuAD compares answers."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _overlap(right: list[str], said: list[str]) -> float:
    if not right or not said:
        return float(right == said)
    # F1 = 2 |common| / (|right| + |said|)
    return 2 * (Counter(right) & Counter(said)).total() / (len(right) + len(said))


def score_sst2(row: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Accuracy, and for the area under the curve how much likelier `positive` is (nats), with the label."""
    margin = results[1][0] - results[0][0]
    return {"acc": float((margin > 0) == bool(row["label"])), "auc": (margin, row["label"])}


def auc(items: Sequence[tuple[float, int]]) -> float:
    """Share of pairs of one good and one bad item that the margin orders rightly, ties half; NaN without such pairs."""
    good, _ = _placements(items)
    return sum(good) / len(good) if good else math.nan


def auc_stderr(items: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of `auc` over both kinds of items (DeLong et al. 1988); None for fewer than two of a kind."""
    kinds = _placements(items)
    if min(map(len, kinds)) < 2:
        return None
    # se^2 = var(V_good) / n_good + var(V_bad) / n_bad, V the share of the other kind that an item is ordered against
    means = [sum(kind) / len(kind) for kind in kinds]
    return math.sqrt(sum(sum((v - mean) ** 2 for v in kind) / (len(kind) - 1) / len(kind)
                         for kind, mean in zip(kinds, means, strict=True)))


def _placements(items: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """For each good item the share of bad ones below it, for each bad one the share of good ones above it."""
    good, bad = ([margin for margin, label in items if bool(label) is kind] for kind in (True, False))
    if not good or not bad:
        return [], []

    def above(high: float, low: float) -> float:
        return 1.0 if high > low else 0.5 if high == low else 0.0

    return ([sum(above(high, low) for low in bad) / len(bad) for high in good],
            [sum(above(high, low) for high in good) / len(good) for low in bad])


def score_humaneval(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the completed function passes its tests."""
    program = f"{row['prompt']}{results[0]}\n{row['test']}\ncheck({row['entry_point']})\n"
    return {"pass@1": float(sandbox.passes(program))}


def score_mbpp(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the function passes its tests."""
    program = "\n".join([results[0], row.get("test_setup_code") or "", *row["test_list"]])
    return {"pass@1": float(sandbox.passes(program))}
