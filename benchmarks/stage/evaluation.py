"""Compares the fast scorer with lm-eval's HFLM, and measures the share of forward passes in the fast scorer's time.

The two scorers alternately score the same requests of the same items. HFLM uses batches of 8 sequences; the fast scorer
packs several sequences into one row of a batch. The requests are made before the timing starts. The time of the
tokenizer is included for both scorers. With `--data FOLDER`, the requests are lm-eval's own, from the first items of
the sets of TASKS (docs/benchmarks.md lists the files of the folder). Without `--data`, the requests are made from the
embedded news. Each of these items has a context of 60 words and four continuations; one continuation is the true one.
The time of forward passes is the time in the decoder and in the output head.

HFLM pads the sequences of a batch to one length and computes all logits. So the multiply-adds of both scorers are known
without a run. Their ratio is the speed-up that is possible if both scorers need the same time for a multiply-add.
"""
import time
from collections.abc import Callable
from typing import Any

import embedded
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kdp_core.model import checkpoints
from kdp_core.model.families import base_of, output_head
from kdp_core.model.sizes import count_macs
from kdp_core.score import benchmarks, fast, packing
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.fast import FastJudge
from kdp_core.score.packing import Scored
from stage.setup import Setup
from stage.timing import Row, figure, in_turns

TASKS = (("piqa", 0), ("arc_easy", 0), ("copa", 0), ("arc_easy", 5), ("lambada_openai", 0))
"""Pairs: a benchmark, and the number of examples before each prompt."""
WORDS, CHOICES, ENDING = 60, 4, 12
"""Size of a made-up item: words of its context, number of its continuations, and words of each continuation."""
BATCH = 8


def measure(setup: Setup) -> list[Row]:
    """Compare the scorers on all tasks. On the first task, also measure the share of forward passes."""
    tokenizer = checkpoints.load_tokenizer(setup.dense)
    judge = FastJudge(setup.model, tokenizer, batch_size=BATCH)
    hflm = HFLM(pretrained=setup.model, backend="causal", tokenizer=tokenizer, batch_size=BATCH)
    rows, items = [], setup.size(20, 4)
    # prompts with examples are long, so a quarter of the items is enough
    tasks = {f"{name}, {shots} examples": requests_of(name, shots, max(1, items // 4) if shots else items,
                                                      str(setup.options.data))
             for name, shots in TASKS} if setup.options.data else {"made-up choices": made_up(items)}
    for name, requests in tasks.items():
        rows += beside(f"{name}, {len(requests)} requests", requests, judge, hflm, setup)
    return [*rows, in_passes(next(iter(tasks.values())), judge), shared_once(next(iter(tasks.values())), judge)]


def requests_of(name: str, shots: int, items: int, data: str) -> list[Instance]:
    """The requests that lm-eval makes for the first items of a task."""
    with benchmarks.task_folder(Chosen([name], data=data, fewshot=shots)) as folders:
        task = TaskManager(include_path=folders, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, shots))
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(limit=items)
    return list(task.instances)


def made_up(items: int) -> list[Instance]:
    """Requests of made-up items from the embedded news.

    A made-up item has a context, its true continuation, and continuations from other documents.
    """
    config = embedded.default_config()
    texts = [text.split() for text in embedded.documents(next(iter(config["texts"])), config)]
    texts = [words for words in texts if len(words) >= 2 * ENDING][:max(items, CHOICES)]
    cuts = [min(WORDS, len(words) - ENDING) for words in texts]
    endings = [" " + " ".join(words[cut:cut + ENDING]) for words, cut in zip(texts, cuts, strict=True)]
    return [Instance("loglikelihood", {}, (" ".join(texts[item][:cuts[item]]), endings[(item + other) % len(texts)]),
                     CHOICES * item + other) for item in range(items) for other in range(CHOICES)]


def beside(name: str, requests: list[Instance], judge: FastJudge, hflm: HFLM, setup: Setup) -> list[Row]:
    """Compare the time and the results of the two scorers on the same requests."""
    kind, answers = requests[0].request_type, {}

    def scored(who: str, by: Any) -> Callable[[], None]:
        return lambda: answers.update({who: getattr(by, kind)(requests, disable_tqdm=True)})

    times = in_turns({"fast": scored("fast", judge), "hflm": scored("hflm", hflm)}, max(1, setup.repeats // 2))
    apart = max(abs(ours[0] - theirs[0]) for ours, theirs in zip(answers["fast"], answers["hflm"], strict=True))
    return [times.row(name, "fast", "hflm", target=3.0, against="lm-eval's HFLM"),
            figure(f"{name}: multiply-adds of HFLM over ours", possible(requests, judge), "times", "goal", 3.0),
            figure(f"{name}: largest difference", apart, "nats", "limit", 1e-3, target=1.0, at_most=True)]


def possible(requests: list[Instance], judge: FastJudge) -> float:
    """Multiply-adds of HFLM divided by those of the fast scorer."""
    sequences = sequences_of(requests, judge)
    head = output_head(judge.model).weight.numel()
    layers = count_macs(judge.model) - head
    lengths = sorted((len(one.ids) for one in sequences), reverse=True)
    padded = sum(len(lengths[first:first + BATCH]) * lengths[first] for first in range(0, len(lengths), BATCH))
    groups = packing.pack(sequences, fast.ROW_TOKENS)
    scored = sum(len({node for number, end in row.ends for node in row.path(end, len(sequences[number].targets))})
                 for group in groups for row in group.rows)
    return padded * (layers + head) / (sum(group.tokens for group in groups) * layers + scored * head)


def sequences_of(requests: list[Instance], judge: FastJudge) -> list[Scored]:
    """The token sequences of the requests."""
    pairs = [judge._encode_pair(*request.args) for request in requests]
    return [fast._scored(context, ids, judge.max_length) for context, ids in pairs]


def in_passes(requests: list[Instance], judge: FastJudge) -> Row:
    """The share of the fast scorer's time that is spent in forward passes."""
    passed = [0.0]
    with_clock = [(base_of(judge.model), "forward"), (output_head(judge.model), "forward")]
    kept = [getattr(module, name) for module, name in with_clock]
    for (module, name), inner in zip(with_clock, kept, strict=True):
        setattr(module, name, _clocked(inner, passed))
    began = time.perf_counter()
    judge.loglikelihood(requests, disable_tqdm=True)
    whole = time.perf_counter() - began
    for module, name in with_clock:
        delattr(module, name)
    return figure("share of the time in forward passes", passed[0] / whole, "", "whole", 1.0, target=0.95)


def _clocked(inner: Callable[..., Any], passed: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        found = inner(*args, **kwargs)
        passed[0] += time.perf_counter() - began
        return found

    return run


def shared_once(requests: list[Instance], judge: FastJudge) -> Row:
    """Compare the number of tokens in the fast scorer's passes with the number of tokens of all requests."""
    sequences = sequences_of(requests, judge)
    packed = sum(group.tokens for group in packing.pack(sequences, fast.ROW_TOKENS))
    return figure("tokens that run", packed, "tokens", "tokens of all requests", sum(len(one.ids) for one in sequences))
