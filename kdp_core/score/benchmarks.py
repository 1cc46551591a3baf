"""Benchmarks as lm-eval tasks, with data from the hub or from a local folder: the KDP paper's 15, and others.

The paper (Ma et al., ICLR 2026, section 4.1) scores with the "LM Evaluation Harness with default parameters": 12 tasks
by accuracy, two corpora by perplexity, and XSum by ROUGE-1. If lm-eval has a task, its own task file is used, and only
the data source is replaced. `task_files/` has the definitions that lm-eval lacks. The reasons for each prompt are in
docs/benchmarks.md. MMLU and CMMLU differ from lm-eval, which has groups of 57 and 67 tasks. Here MMLU is one task and
CMMLU is one task, each with the prompts of its group. The items of such a task alternate between the subjects, so a
limit of n items scores n items and not 57 n.
The task files name two modules: kdp_core.score.benchmark_data prepares the items, and kdp_core.score.benchmark_scores
scores the answers.
"""
import contextlib
import difflib
import importlib.util
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

FILES = Path(__file__).parent / "task_files"
DATA = "kdp_core.score.benchmark_data"
"""The module whose functions read the data; lm-eval imports it by this name."""
HUB = "hub"
Scorer = Literal["fast", "lm_eval"]
"""The code that computes log-likelihoods: kdp_core.score.fast or lm-eval."""
CLUE = "7a92286c90a77a495dcaeba0fe34939053ef7dc5"
C4_SHARD = {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}, "verification_mode": "no_checks"}


class BenchmarkError(ValueError):
    """A benchmark cannot be run with the given settings."""


class Source(NamedTuple):
    """A data set of the hub."""
    path: str
    name: str | None = None
    """Its configuration."""
    revision: str = "main"
    """A branch or a commit of the data set. A commit is used if it is known to contain the data as plain files."""
    options: Mapping[str, Any] = {}
    """Further arguments of datasets.load_dataset."""


class Benchmark(NamedTuple):
    """One benchmark: the sources of its definition and of its data, and the way in which it is scored."""
    stock: str | None
    """Path of lm-eval's task file in lm-eval's folder of tasks. If task_files/<name>.yaml exists, its fields override
    the fields of lm-eval's file."""
    hub: Source
    split: str
    """The split that is scored. If the data are local, the split of the local file also has this name."""
    local: str
    """Path of the file of scored items in a local data folder."""
    shots: str | None
    """Path of the file of few-shot examples in a local data folder; None if there is no such file."""
    metric: str
    """The metric that tables print for the task."""
    chance: float | None
    """Expected score of random guesses; None if random guesses are never right."""
    note: str
    shots_split: str = "train"
    fewshot: int = 0
    """Number of examples in a prompt, unless the user sets another number."""
    fixed: bool = False
    """Whether the task fixes the number of examples, so that the user cannot change it."""
    code: bool = False
    """Whether the model's answers are run as programs."""


def _task(stock: str | None, hub: Source, split: str, files: tuple[str, str | None], score: tuple[str, float | None],
          note: str, **more: Any) -> Benchmark:
    local, shots = (name and f"{name}.jsonl" for name in files)
    return Benchmark(stock, hub, split, local, shots, *score, note, **more)


SUPER_GLUE = "aps/super_glue"
RACE = "2fec9fd81f1dc971569a9b729c43f2f0e6436637"
BENCHMARKS: dict[str, Benchmark] = {
    "cmnli": _task(None, Source("clue/clue", "cmnli", CLUE), "validation", ("eval/cmnli_dev", "calib/cmnli_dev_rest"),
                   ("acc", 1 / 3), "Chinese: does a sentence follow from another"),
    "hellaswag": _task("hellaswag/hellaswag.yaml", Source("Rowan/hellaswag"), "validation",
                       ("eval/hellaswag_val_text", "calib/hellaswag_train"), ("acc_norm", 0.25), "how a scene goes on"),
    "piqa": _task("piqa/piqa.yaml", Source("baber/piqa"), "validation", ("eval/piqa_val", "calib/piqa_train"),
                  ("acc_norm", 0.5), "which of two ways reaches a goal"),
    "chid": _task(None, Source("clue/clue", "chid", CLUE), "validation", ("eval/chid_test", "calib/chid_train"),
                  ("acc", 1 / 7),
                  "Chinese: the idiom of a gap; 7 candidates in a local FewCLUE file, 10 on the hub (chance 0.1)"),
    "wsc": _task("super_glue/wsc/default.yaml", Source(SUPER_GLUE, "wsc.fixed"), "validation",
                 ("eval/wsc_val", "calib/wsc_train_few"), ("acc", 0.5), "whom a pronoun means"),
    "coqa": _task(None, Source("EleutherAI/coqa"), "validation", ("eval/coqa_val", "calib/coqa_train"), ("em", None),
                  "the last question of a conversation about a passage"),
    "boolq": _task("super_glue/boolq/default.yaml", Source(SUPER_GLUE, "boolq"), "validation",
                   ("eval/boolq_val", "calib/boolq_train_few"), ("acc", 0.5), "yes or no about a passage"),
    "mmlu": _task("mmlu/default/_default_template_yaml", Source("cais/mmlu", "all"), "test",
                  ("eval/mmlu_test", "eval/mmlu_dev"), ("acc", 0.25), "57 subjects, in turn", shots_split="dev"),
    "cmmlu": _task("cmmlu/_default_template_yaml", Source("haonan-li/cmmlu"), "test",
                   ("eval/cmmlu_test", "eval/cmmlu_dev"), ("acc_norm", 0.25), "Chinese: 67 subjects, in turn",
                   shots_split="dev"),
    "race_high": _task("race/race.yaml", Source("ehovy/race", "high", RACE), "test",
                       ("eval/race_high_test", "calib/race_high_train"), ("acc", 0.25),
                       "the last question of a school text"),
    "race_middle": _task("race/race.yaml", Source("ehovy/race", "middle", RACE), "test",
                         ("eval/race_middle_test", "calib/race_middle_train"), ("acc", 0.25),
                         "the same, of easier texts"),
    "sst2": _task("glue/sst2/default.yaml", Source("nyu-mll/glue", "sst2"), "validation",
                  ("eval/sst2_val", "calib/sst2_train"), ("acc", 0.5),
                  "is a sentence of praise; beside it the area under the curve"),
    "c3": _task(None, Source("clue/clue", "c3", CLUE), "validation", ("eval/c3_test", "calib/c3_train"),
                ("acc_norm", 0.25), "Chinese: a question about a text or dialogue, two to four choices"),
    "wikitext": _task("wikitext/wikitext.yaml", Source("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"),
                      "test", ("eval/wikitext2_test", None), ("word_perplexity", None), "whole pages, rolling windows",
                      fixed=True),
    "c4": _task("c4/c4.yaml", Source("allenai/c4", "en", options=C4_SHARD), "validation", ("eval/c4_sample", None),
                ("word_perplexity", None),
                "web pages, rolling windows; the validation shard alone is fetched", fixed=True),
    "xsum": _task(None, Source("EdinburghNLP/xsum", None, "refs/convert/parquet"), "test", ("eval/xsum_dev", None),
                  ("rouge1", None), "a news story in one sentence, 64 tokens, greedy", fixed=True),
    "lambada_openai": _task("lambada/lambada_openai.yaml", Source("EleutherAI/lambada_openai", "default"), "test",
                            ("eval/lambada_openai_test", None), ("acc", 0.0), "the last word of a passage", fixed=True),
    "arc_easy": _task("arc/arc_easy.yaml", Source("allenai/ai2_arc", "ARC-Easy"), "test",
                      ("eval/arc_easy_test", "calib/arc_easy_train"), ("acc_norm", 0.25), "school science"),
    "arc_challenge": _task("arc/arc_challenge.yaml", Source("allenai/ai2_arc", "ARC-Challenge"), "test",
                           ("eval/arc_challenge_test", "calib/arc_challenge_train"), ("acc_norm", 0.25),
                           "school science that simple methods miss"),
    "openbookqa": _task("openbookqa/openbookqa.yaml", Source("allenai/openbookqa", "main"), "test",
                        ("eval/openbookqa_test", "calib/openbookqa_train"), ("acc_norm", 0.25), "elementary science"),
    "winogrande": _task("winogrande/default.yaml", Source("allenai/winogrande", "winogrande_xl"), "validation",
                        ("eval/winogrande_val", "calib/winogrande_train"), ("acc", 0.5), "whom a gap means"),
    "copa": _task("super_glue/copa/default.yaml", Source(SUPER_GLUE, "copa"), "validation",
                  ("eval/copa_val", "calib/copa_train"), ("acc", 0.5), "cause or effect"),
    "gsm8k": _task("gsm8k/gsm8k.yaml", Source("openai/gsm8k", "main"), "test", ("eval/gsm8k_test", "calib/gsm8k_train"),
                   ("exact_match", 0.0), "sums in words, worked out in text", fewshot=5),
    "humaneval": _task(None, Source("openai/openai_humaneval"), "test", ("eval/humaneval_test", None), ("pass@1", 0.0),
                       "a function to its docstring, run against tests", fixed=True, code=True),
    "mbpp": _task(None, Source("google-research-datasets/mbpp", "full"), "test", ("eval/mbpp_test", "calib/mbpp_train"),
                  ("pass@1", 0.0), "a function to one sentence, run against tests", shots_split="prompt", fewshot=3,
                  fixed=True, code=True),
}
class Chosen(NamedTuple):
    """The benchmarks of one evaluation."""
    tasks: Sequence[str] = ()
    data: str = HUB
    """`hub`, or a local folder that contains the files named in BENCHMARKS."""
    limit: int | None = None
    """Largest number of items of a task; the first items are used. None means all items."""
    limits: Mapping[str, int] = {}
    """Largest number of items of single tasks, by name. For a named task, this number replaces `limit`."""
    fewshot: int | None = None
    """Number of examples in a prompt, for tasks that do not fix this number. None means the number that BENCHMARKS
    gives."""
    allow_code: bool = False
    """Whether programs that the model writes may be run. The permission also covers tasks that are not benchmarks."""


def write_tasks(folder: str | Path, chosen: Chosen) -> None:
    """Write a task file for each chosen benchmark, to be read by TaskManager(include_path=folder) of this installation.

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
    """A list with one temporary folder of task files, which exists while the body of the `with` statement runs. Without
    benchmarks the list of folders is empty."""
    if chosen is None:
        yield []
        return
    with tempfile.TemporaryDirectory(prefix="kdp-benchmarks-") as folder:
        write_tasks(folder, chosen)
        yield [Path(folder)]


def check(chosen: Chosen) -> None:
    """Raise BenchmarkError for an unknown name, a missing local file, or a benchmark that runs programs without
    permission."""
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
    """Number of examples in a prompt of a benchmark. `fewshot` is the number that the user sets, or None."""
    benchmark = BENCHMARKS[name]
    return benchmark.fewshot if benchmark.fixed or fewshot is None else fewshot


def local_files(name: str, *, fewshot: int | None = None) -> list[str]:
    """The files of a local data folder that a benchmark needs. The file of few-shot examples is included if the
    benchmark's prompts have examples."""
    benchmark = BENCHMARKS[name]
    shots = [benchmark.shots] if benchmark.shots and shots_of(name, fewshot) else []
    return [benchmark.local, *shots]


class _Function(str):
    """A dotted name of a function, which lm-eval imports."""


class _Dumper(yaml.SafeDumper):
    """Writes YAML with lm-eval's tag for functions."""


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _definition(name: str, chosen: Chosen) -> dict[str, Any]:
    """The content of a task file: the files that it includes, and the source of the data."""
    benchmark = BENCHMARKS[name]
    own = FILES / f"{name}.yaml"
    files = ([stock_folder() / benchmark.stock] if benchmark.stock else []) + ([own] if own.exists() else [])
    made: dict[str, Any] = {"include": [str(file) for file in files], "task": name}
    if chosen.data != HUB:
        return made | _local(name, chosen)
    if name == "cmmlu":
        return made | {"custom_dataset": _Function(f"{DATA}.read_cmmlu"),
                       "dataset_kwargs": {"path": benchmark.hub.path, "revision": benchmark.hub.revision}}
    splits = {"training_split": None} if name == "c4" else {}
    return made | splits | {"dataset_path": benchmark.hub.path, "dataset_name": benchmark.hub.name,
                            "dataset_kwargs": {"revision": benchmark.hub.revision, **benchmark.hub.options}}


def _local(name: str, chosen: Chosen) -> dict[str, Any]:
    """The part of a task file that assigns the local files to splits."""
    benchmark = BENCHMARKS[name]
    paths = [str((Path(chosen.data) / file).resolve()) for file in local_files(name, fewshot=chosen.fewshot)]
    splits = dict(zip((benchmark.split, benchmark.shots_split), paths, strict=False))
    shots = benchmark.shots_split if benchmark.shots_split in splits else None
    return {"custom_dataset": _Function(f"{DATA}.read_local"), "dataset_kwargs": {"files": splits},
            "validation_split": benchmark.split if benchmark.split == "validation" else None,
            "test_split": benchmark.split if benchmark.split == "test" else None,
            "training_split": shots if shots == "train" else None,
            "fewshot_split": shots if shots != "train" else None}


@cache
def stock_folder() -> Path:
    """The folder of lm-eval's own tasks, found without importing lm-eval."""
    return Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
