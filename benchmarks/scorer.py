"""How much faster log-likelihoods are scored than by lm-eval's HFLM: `python benchmarks/scorer.py --data FOLDER`.

Both score the same first items of each task on the embedded model, in one process and in turns: HFLM with batches of
--batch sequences, all threads in each operation, and the fast scorer with a row on each thread. The requests are
lm-eval's own, built before the clock starts; the tokenizer runs on both clocks. Each turn takes the requests of
--chunk items, so both see the same load of the machine. The table, also written to <out>/scorer.csv, has a row a task:
    items, requests           what was scored
    fast_s, hflm_s            seconds of wall-clock time for 100 items
    fast_cpu_s, hflm_cpu_s    seconds of processor time for 100 items
    ratio, cpu_ratio          HFLM's over the fast scorer's; processor time is the same on a busy machine
    difference                largest difference of two log-likelihoods, nats
    greedy_differs            answers of which one scorer alone says that greedy decoding gives them
"""
import argparse
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import embedded
import pandas as pd
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from kdp_core.base import store
from kdp_core.model import checkpoints
from kdp_core.score import benchmarks
from kdp_core.score.benchmarks import Chosen
from kdp_core.score.fast import FastJudge

logger = logging.getLogger("scorer")
TASKS = ("piqa", "arc_easy", "hellaswag", "lambada_openai", "openbookqa", "copa", "sst2")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the local files of docs/benchmarks.md")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help=f"benchmarks to score ({' '.join(TASKS)})")
    parser.add_argument("--items", type=int, default=100, help="first items of each task (100)")
    parser.add_argument("--chunk", type=int, default=50, help="items of a turn (50)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of a batch of HFLM (8)")
    parser.add_argument("--fewshot", type=int, default=0, help="examples in a prompt (0)")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results" / "benchmarks",
                        help="folder of the table (results/benchmarks)")
    return parser.parse_args(given)


def requests_of(name: str, options: argparse.Namespace) -> list[list[Instance]]:
    """lm-eval's requests of the first items of a task, in turns of some items."""
    chosen = Chosen([name], data=str(options.data), fewshot=options.fewshot)
    with benchmarks.task_folder(chosen) as folders:
        task = TaskManager(include_path=folders, include_defaults=False).load([name])["tasks"][name]
    task.set_config(key="num_fewshot", value=benchmarks.shots_of(name, options.fewshot))
    task.set_fewshot_seed(seed=0)
    task.build_all_requests(limit=options.items)
    turns: dict[int, list[Instance]] = {}
    for one in task.instances:
        turns.setdefault(one.doc_id // options.chunk, []).append(one)
    return list(turns.values())


def timed(score: Callable[..., list[Any]], requests: list[Instance]) -> tuple[list[Any], float, float]:
    """What a scorer says, with its seconds of wall-clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = score(requests, disable_tqdm=True)
    return found, time.perf_counter() - wall, time.process_time() - cpu


def measure(name: str, fast: FastJudge, hflm: HFLM, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one task."""
    turns = requests_of(name, options)
    items = len({one.doc_id for requests in turns for one in requests})
    kind = turns[0][0].request_type
    seconds = dict.fromkeys(("fast_s", "hflm_s", "fast_cpu_s", "hflm_cpu_s"), 0.0)
    pairs: list[tuple[Any, Any]] = []
    for turn, requests in enumerate(turns):
        answers = {}
        # who comes first changes from turn to turn
        for who, judge in (("fast", fast), ("hflm", hflm))[::1 if turn % 2 else -1]:
            answers[who], wall, cpu = timed(getattr(judge, kind), requests)
            seconds[f"{who}_s"] += wall * 100 / items
            seconds[f"{who}_cpu_s"] += cpu * 100 / items
        pairs += zip(answers["fast"], answers["hflm"], strict=True)
    if kind == "loglikelihood_rolling":
        pairs = [((ours, False), (theirs, False)) for ours, theirs in pairs]
    return {"task": name, "items": items, "requests": len(pairs), **seconds,
            "ratio": seconds["hflm_s"] / seconds["fast_s"],
            "cpu_ratio": seconds["hflm_cpu_s"] / seconds["fast_cpu_s"],
            "difference": max(abs(ours[0] - theirs[0]) for ours, theirs in pairs),
            "greedy_differs": sum(ours[1] != theirs[1] for ours, theirs in pairs)}


def main(given: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure every task, write the table after each, and print it."""
    options = arguments(given)
    benchmarks.check(Chosen(options.tasks, data=str(options.data), fewshot=options.fewshot))
    checkpoint, _ = embedded.dense_model(options.out / "scorer", embedded.default_config())
    model, tokenizer = checkpoints.load_model(checkpoint), checkpoints.load_tokenizer(checkpoint)
    fast = FastJudge(model, tokenizer, batch_size=options.batch)
    hflm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=options.batch)
    warm = [Instance("loglikelihood", {}, ("It rained and", " it rained"), 0)]
    for judge in (fast, hflm):
        judge.loglikelihood(warm, disable_tqdm=True)
    rows = []
    for name in options.tasks:
        rows.append(measure(name, fast, hflm, options))
        frame = pd.DataFrame(rows)
        store.write_text(options.out / "scorer.csv", frame.to_csv(index=False, lineterminator="\n"))
        logger.info("%s: %.2f times as fast", name, rows[-1]["ratio"])
    print(f"threads {torch.get_num_threads()}, batch {options.batch}")
    print(frame.to_string(index=False, float_format="%.4g"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
