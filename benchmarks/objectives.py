"""Compares the layers that different objectives and searches choose: `python benchmarks/objectives.py`.

Each row is one search for the layers to remove from the embedded model. Three settings distinguish the searches: the
objective, the search algorithm and the draw. A draw is a part of the calibration text, and two draws have no text in
common. All searches have the same budget of layer passes (kdp_core.methods.searching). After a search, the loss and the
accuracy of the model without the chosen layers are measured on held-out text. For the accuracy, the model reads the
beginning of a text window. The model must then choose the true end of this window among several ends. With --data,
`margin` and `accuracy` use items of ARC easy and OpenBookQA. The search uses the items in calib/, and the held-out
accuracy uses the items in eval/.

The command prints its plan first (--plan prints only the plan). A row is written to <out>/objectives/ as soon as it is
measured, and no row is measured twice. So the run can be stopped, continued and split. The command writes
    <out>/objectives.csv         a row for each search: layers, value, cost, held-out loss and accuracy
    <out>/objectives_pairs.csv   Jaccard and Spearman of every two searches that differ in one thing
    <out>/objectives_claims.csv  the claims of "Rethinking Layer Redundancy" (arXiv 2604.24938) with their intervals
With --speed, the command only compares the time of the evaluator with the time of full passes, on the same sets of
layers and in one process. With --layers 2 --sequences 4 --length 32 --threads 1 this comparison needs about half a
minute of processor time.
"""
import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import embedded
import pandas as pd
import torch

from kdp_core import methods
from kdp_core.base import store, texts
from kdp_core.base.records import ModelFacts, Tokens
from kdp_core.methods._search.evaluator import Evaluator
from kdp_core.methods._search.objectives import Goal, items_of_file, items_of_text, objective_of
from kdp_core.methods._search.strategies import Strategy
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.model.passes import Passes
from kdp_core.study import objectives

SETS = {"arc_easy": ("calib/arc_easy_train.jsonl", "eval/arc_easy_test.jsonl"),
        "openbookqa": ("calib/openbookqa_train.jsonl", "eval/openbookqa_test.jsonl")}
"""Set -> (file of calibration items, file of held-out items), both below the folder of --data."""
UNLIMITED = 10**9


class Setup(NamedTuple):
    """The data that all rows share."""
    folder: Path
    dense: Path
    facts: ModelFacts
    tokens: Tokens
    heldout_ST: torch.Tensor
    items: tuple[Path, Path] | None
    """Files of real items, for the search and for the held-out accuracy; None without --data."""


# Items ----------------------------------------------------------------------------------------------------------------

def real_items(data: Path, which: int) -> list[dict[str, Any]]:
    """The items of ARC easy and OpenBookQA, alternately one item of each set.

    Each item has a context, choices and the number of the answer.
    """
    found = []
    for files in SETS.values():
        rows = [json.loads(line) for line in (data / files[which]).read_text(encoding="utf-8").splitlines()]
        found.append([{"context": f"Question: {row.get('question', row.get('question_stem'))}\nAnswer:",
                       "choices": row["choices"]["text"],
                       "answer": row["choices"]["label"].index(row["answerKey"])} for row in rows])
    return [item for both in zip(*found, strict=False) for item in both]


def write_items(folder: Path, data: Path) -> tuple[Path, Path]:
    """Write the items for the search and the held-out items into two files in the folder of the results."""
    paths = folder / "items-calib.jsonl", folder / "items-heldout.jsonl"
    for which, path in enumerate(paths):
        store.write_text(path, "".join(json.dumps(item) + "\n" for item in real_items(data, which)))
    return paths


# What is measured -----------------------------------------------------------------------------------------------------

def prepare(options: argparse.Namespace) -> Setup:
    """The dense model, the calibration text and the held-out text."""
    config, folder = embedded.default_config(), options.out / "objectives"
    dense, facts = embedded.dense_model(folder, config)
    tokenizer, start = checkpoints.load_tokenizer(dense), first_token(checkpoints.config_of(dense))
    name = next(iter(next(iter(config["calibrations"].values()))["mix"]))
    part = texts.Part(name, embedded.documents(name, config), options.sequences * (max(options.draws) + 1))
    tokens = texts.pack(tokenizer, [part], length=options.length, seed=0, vocabulary=facts.vocabulary, start=start)
    windows_ST = texts.windows(tokenizer, embedded.documents("lee", config), length=options.length, start=start)
    places = torch.linspace(0, len(windows_ST) - 1, min(options.heldout, len(windows_ST))).long()
    items = write_items(folder, options.data) if options.data else None
    return Setup(folder, dense, facts, tokens, windows_ST[places], items)


def judged(setup: Setup, goal: str, options: argparse.Namespace) -> Evaluator:
    """An evaluator without a limit on its number of layer passes.

    The evaluator removes a set of layers from the embedded model, and measures the resulting model on held-out text or
    items.
    """
    ids_ST, items = setup.heldout_ST, None
    if goal == "accuracy":
        items = items_of_text(ids_ST, 4) if setup.items is None else items_of_file(
            setup.items[1], checkpoints.load_tokenizer(setup.dense), first_token(checkpoints.config_of(setup.dense)),
            options.heldout_items, 0)
    made = objective_of(goal, ids_ST, items)
    passes = Passes(checkpoints.load_model(setup.dense), made.ids_ST.shape[1])
    return Evaluator(passes, made, size=options.layers, budget=UNLIMITED, batch_sequences=8)


def measure(setup: Setup, objective: str, strategy: str, draw: int, options: argparse.Namespace) -> dict[str, Any]:
    """One search."""
    method = methods.method_of("layer_search")
    share = sum(setup.facts.params_per_layer[:options.layers]) / setup.facts.params_total
    selection = method.select(None, setup.facts, ratio=share, k_max=3, module_params=0)
    real = {"items": str(setup.items[0])} if setup.items else {}
    found = method.compose(setup.dense, None, setup.tokens, selection, objective=objective, strategy=strategy,
                           budget=options.budget, sequences=options.sequences, positions=options.positions, draw=draw,
                           seed=draw, **real)
    return found.stats


def row_path(setup: Setup, objective: str, strategy: str, draw: int, options: argparse.Namespace) -> Path:
    """The file of a row.

    The name of the file contains the sizes, so that rows of different sizes have different files.
    """
    sizes = f"n{options.layers}-s{options.sequences}x{options.length}-p{options.positions}-b{options.budget}"
    items = "-real" if setup.items else ""
    return setup.folder / "rows" / f"{objective}-{strategy}-d{draw}-{sizes}{items}.json"


def heldout(rows: list[dict[str, Any]], setup: Setup, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows, with the held-out loss and accuracy of the models without the chosen layers.

    Each set of layers is judged only once.
    """
    both = {name: judged(setup, goal, options) for name, goal in (("nats", "loss"), ("accuracy", "accuracy"))}
    sign = {"nats": 1, "accuracy": -1}
    return [{**row, **{f"heldout_{name}": sign[name] * one.value(frozenset(row["removed"]))
                       for name, one in both.items()},
             **{f"dense_{name}": sign[name] * one.values[frozenset()] for name, one in both.items()}} for row in rows]


def speed(setup: Setup, options: argparse.Namespace) -> str:
    """Compare a greedy search with and without stored states, on the same sets, in one process.

    The time is processor time, because wall-clock time depends on other programs on the machine.
    """
    seconds, spent = {}, {}
    for trails in (0, 4):
        goal = objective_of("last_state", setup.tokens.ids_ST[:options.sequences], None)
        passes = Passes(checkpoints.load_model(setup.dense), options.length)
        one = Evaluator(passes, goal, size=options.layers, budget=UNLIMITED, batch_sequences=8, trails=trails)
        began = time.process_time()
        for removed in greedy_sets(setup.facts.layers, options.layers):
            if trails:
                one.value(removed)
            else:
                passes.run_batches(one.start_STD, [n for n in range(setup.facts.layers) if n not in removed], 8)
        seconds[trails] = time.process_time() - began
        spent[trails] = one.spent - setup.facts.layers if trails else None
    full = sum(setup.facts.layers - len(removed) for removed in greedy_sets(setup.facts.layers, options.layers))
    return (f"Processor time: {full} layer passes in {seconds[0]:.1f} s by full passes, {spent[4]} in "
            f"{seconds[4]:.1f} s by the evaluator: {full / spent[4]:.2f} times fewer, "
            f"{seconds[0] / seconds[4]:.2f} times faster")


def greedy_sets(layers: int, size: int) -> list[frozenset[int]]:
    """The sets of layers that a greedy search measures if its choices are layers 4, 7, 10, ... in this order."""
    order = [3 * n % (layers - 2) + 1 for n in range(1, size)]
    return [frozenset([*order[:round_], layer]) for round_ in range(size) for layer in range(1, layers - 1)
            if layer not in order[:round_]]


# The command ----------------------------------------------------------------------------------------------------------

def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--objectives", nargs="+", default=list(get_args(Goal)), choices=get_args(Goal))
    parser.add_argument("--strategies", nargs="+", default=list(get_args(Strategy)), choices=get_args(Strategy))
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1], help="draws of calibration text (0 1)")
    parser.add_argument("--layers", type=int, default=9, help="layers to remove (9)")
    parser.add_argument("--sequences", type=int, default=16, help="sequences or items of a draw (16)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence (128)")
    parser.add_argument("--positions", type=int, default=16, help="tokens of a sequence that predict (16)")
    parser.add_argument("--budget", type=int, default=1500, help="layer passes of a search (1500)")
    parser.add_argument("--heldout", type=int, default=32, help="windows of held-out text (32)")
    parser.add_argument("--heldout-items", type=int, default=200, help="held-out items, with --data (200)")
    parser.add_argument("--data", type=Path, help="folder of the real sets, with calib/ and eval/ (none)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--plan", action="store_true", help="print the plan and measure nothing")
    parser.add_argument("--speed", action="store_true", help="only compare the evaluator with full passes")
    parser.add_argument("--out", type=Path, default=embedded.ROOT / "results/benchmarks",
                        help="folder of the results (results/benchmarks)")
    options = parser.parse_args(given)
    if options.data and not (options.data / "calib").is_dir():
        parser.error(f"--data {options.data}: it has no folder calib/; name the folder of the real sets")
    return options


def planned(missing: int, every: int, setup: Setup, options: argparse.Namespace) -> str:
    """The plan: how many searches are not measured yet, their layer passes, and the expected hours on this machine."""
    passes = Passes(checkpoints.load_model(setup.dense), options.length)
    ids_ST = setup.tokens.ids_ST[:options.sequences]
    began = time.perf_counter()
    h_STD = passes.model.get_input_embeddings()(ids_ST)
    passes.run_batches(h_STD, range(setup.facts.layers), 8)
    each = (time.perf_counter() - began) / setup.facts.layers
    return (f"{missing} of {every} searches are left: at most {options.budget} layer passes each, {options.sequences} "
            f"sequences of {options.length} tokens, about {missing * options.budget * each / 3600:.2f} hours here "
            "without the output head")


def main(given: Sequence[str] | None = None) -> pd.DataFrame | None:
    """Print the plan, measure the rows that are not on disk, write the tables."""
    options = arguments(given)
    embedded.set_threads(options.threads)
    setup = prepare(options)
    if options.speed:
        print(speed(setup, options))
        return None
    # order: for each draw, for each search algorithm, all objectives
    every = list(itertools.product(options.draws, options.strategies, options.objectives))
    paths = {one: row_path(setup, one[2], one[1], one[0], options) for one in every}
    print(planned(sum(not path.exists() for path in paths.values()), len(every), setup, options), flush=True)
    if options.plan:
        return None
    for (draw, strategy, objective), path in paths.items():
        if not path.exists():
            store.write_json(path, measure(setup, objective, strategy, draw, options))
    return tables([store.read_json(path) for path in paths.values()], setup, options)


def tables(rows: list[dict[str, Any]], setup: Setup, options: argparse.Namespace) -> pd.DataFrame:
    """Write and print the three tables."""
    rows = heldout(rows, setup, options)
    frame = pd.DataFrame([{**row, "removed": " ".join(map(str, row["removed"])),
                           "heldout_ppl_ratio": math.exp(row["heldout_nats"] - row["dense_nats"])} for row in rows])
    frame = frame.drop(columns=["single", "best_so_far", "eligible"])
    found, told = objectives.pairs(rows), objectives.claims(rows)
    for name, one in (("objectives", frame), ("objectives_pairs", found), ("objectives_claims", told)):
        store.write_text(options.out / f"{name}.csv", one.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    print(frame[["objective", "strategy", "draw", "removed", "value", "passes", "seconds", "heldout_ppl_ratio",
                 "heldout_accuracy"]].to_string(index=False, float_format="%.3f"))
    print(found.groupby("varies")[["jaccard", "spearman"]].mean().to_string(float_format="%.2f"))
    print(told.to_string(index=False, float_format="%.2f"))
    return frame


if __name__ == "__main__":
    embedded.log_to_stderr()
    main()
