"""Compares pairs of models on the same items, and tests which differences are larger than noise.

All models answer the same items. The standard error of a difference is therefore computed from the differences on
single items, and not from two independent means. So an item that is hard for both models does not increase the error.
    one accuracy task     McNemar's exact test with the mid p-value (Fagerland et al. 2013)
    `all` accuracy tasks  the plain mean over tasks; p by a paired bootstrap, items drawn again within each task
    perplexity            difference of nats per token over windows or documents, standard error by the delta method,
                          Student's t; `all` is the mean over texts, as for the geometric mean of perplexities
For a task with values other than 0 and 1, p also comes from a paired bootstrap. Items are treated as independent.
Neighbouring windows of one text are not quite independent, so p-values of perplexities are a little too low. Holm's
method corrects the p-values within one question about one group. The questions are: which models differ from the best
model, from the baseline, or from the dense model? The p-values of all other pairs are not corrected. If a table tests
other pairs, the code of this table must correct their p-values.
"""
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kdp_core.base.measurements import Score, Scores
from kdp_core.results.columns import BASELINE, DENSE, KEYS
from kdp_core.results.paired import ALL, DRAWS, Table, accuracies, holm, perplexities
from kdp_core.results.summary import main_scores
from kdp_core.score.metrics import PRIMARY

COLUMNS = (*KEYS, "other", "other_calib", "other_k_max", "against", "metric", "task", "difference", "stderr", "p",
           "p_holm", "unit", "test", "items")


class CompareError(ValueError):
    """The models cannot be compared item by item."""


class Outcomes(NamedTuple):
    """The outcomes of one model on all items of one task."""
    task: str
    metric: str
    kind: str
    """`acc` or `ppl`, as in PRIMARY."""
    ids: list[str]
    """Identity of each item: file, number and hash. The identities are equal for models that answered the same
    items."""
    values_I: np.ndarray
    """Accuracy, or log-likelihood in nats, of each item; NaN if the model gave no number."""
    weights_I: np.ndarray
    """Weight of each item: its number of tokens (or words) for perplexities, 1 for accuracies."""


class Entry(NamedTuple):
    """One model of a comparison."""
    key: tuple[str, str, str, float, int]
    """Model, calibration set, method, ratio and k_max, in the order of KEYS."""
    zeros: bool
    """Whether weights of the model are set to zero, while the number of weights stays that of the dense model. Such a
    pruned model is not compared with pruned models that have fewer weights."""
    outcomes: list[Outcomes]


# From disk ------------------------------------------------------------------------------------------------------------

def read_outcomes(folder: str | Path, scores: Scores) -> list[Outcomes]:
    """The outcomes on all tasks that a summary includes, read from the sample files of an evaluation.

    If the score of a group of tasks is the main score, the items of all tasks of the group are listed under the group's
    name. Raises CompareError if items are missing, or if their number differs from the number of items of the score.
    """
    found = []
    for kind, metrics in PRIMARY.items():
        for task, score in main_scores(scores.scores, metrics).items():
            parts = [_read_part(Path(folder) / f"{name}.jsonl", score.metric)
                     for name in _members(task, scores.scores)]
            items = list(itertools.chain.from_iterable(parts))
            if len(items) != score.items:
                raise CompareError(f"{folder} holds {len(items)} items of {task}, its score is of {score.items}; "
                                   "evaluate this model again")
            pairs = np.array([pair for _, pair in items], dtype=float)
            found.append(Outcomes(task, score.metric, kind, [name for name, _ in items], pairs[:, 0], pairs[:, 1]))
    return found


def _members(task: str, scores: Sequence[Score]) -> list[str]:
    """The names of the sample files of a task. If `task` is a group of tasks, these are the names of the tasks in the
    group: `law` for mmlu/law."""
    known = sorted({score.task for score in scores})
    below = [name for name in known if name.startswith(f"{task}/")]
    # a group within a group has a score but no items
    leaves = [name for name in below if not any(other.startswith(f"{name}/") for other in below)]
    return [name.rsplit("/", 1)[-1] for name in leaves or [task]]


def _read_part(path: Path, metric: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """(id, (value, weight)) of each item. If lm-eval applied several filters, the value comes from the first filter
    that has the metric."""
    if not path.is_file():
        raise CompareError(f"{path} does not exist; evaluate this model again and keep its samples")
    chosen = None
    with path.open(encoding="utf-8") as lines:
        for sample in map(json.loads, lines):
            if metric in sample and chosen in (None, sample["filter"]):
                chosen = sample["filter"]
                value, weight = sample[metric] if isinstance(sample[metric], list) else (sample[metric], 1)
                name = f"{path.stem}:{sample['doc_id']}:{sample['doc_hash']}"
                yield name, (math.nan if value is None else value, weight)


# Comparisons ----------------------------------------------------------------------------------------------------------

def compare(entries: Sequence[Entry], *, draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """One row for each pair of pruned models, for each metric and task. Both models of a pair come from the same dense
    model, and have the same ratio and kind of pruning.

    The columns are those of COLUMNS. Each pair of a pruned model and its dense model is a row too.
    difference  the row's model minus the other model: share of items, or nats per token (below 0 is better)
    against     `best` by this metric and task, `baseline` (BASELINE with the same calib and k_max), `dense`, or empty:
                any other pair, without p_holm
    Raises CompareError if two of the models did not answer the same items.
    """
    rows: list[dict[str, Any]] = []
    for model in dict.fromkeys(entry.key[0] for entry in entries):
        own = [entry for entry in entries if entry.key[0] == model]
        _check_items(own)
        for kind in PRIMARY:
            tested = _test(own, kind, _pairs(own), draws, seed)
            for task, table in tested.items():
                rows += _rows(own, kind if task == ALL else table.metric, task, table)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _pairs(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """The index pairs (j, k), j < k, of the models to compare: pairs within a group, and pairs with the dense model."""
    groups = [(entry.key[3], entry.zeros) for entry in entries]
    dense = [entry.key[2] == DENSE for entry in entries]
    return [(j, k) for j, k in itertools.combinations(range(len(entries)), 2)
            if dense[j] or dense[k] or groups[j] == groups[k]]


def _test(entries: Sequence[Entry], kind: str, pairs: Sequence[tuple[int, int]], draws: int,
          seed: int) -> dict[str, Table]:
    """The test results of all tasks of one kind, by task; the entry `all` comes last."""
    by_task = {first.task: [next(o for o in entry.outcomes if o.kind == kind and o.task == first.task)
                            for entry in entries] for first in entries[0].outcomes if first.kind == kind}
    if not by_task:
        return {}
    values = {task: np.stack([o.values_I for o in outcomes], axis=1) for task, outcomes in by_task.items()}
    metrics = {task: outcomes[0].metric for task, outcomes in by_task.items()}
    if kind == "ppl":
        weights = {task: outcomes[0].weights_I for task, outcomes in by_task.items()}
        return perplexities(values, weights, metrics)
    return accuracies(values, metrics, pairs, draws=draws, seed=seed)


def _check_items(entries: Sequence[Entry]) -> None:
    """Raise CompareError if models did not answer the same items of the same tasks, with the same lengths."""
    first = entries[0]
    known = {(o.kind, o.task): o for o in first.outcomes}
    for entry in entries[1:]:
        theirs = {(o.kind, o.task): o for o in entry.outcomes}
        both = f"{_name(first)} and {_name(entry)}"
        if set(theirs) != set(known):
            odd = sorted(set(theirs) ^ set(known))[0]
            raise CompareError(f"only one of {both} was scored on {odd[1]}; evaluate both on the same tasks")
        for place, outcomes in theirs.items():
            other = known[place]
            if outcomes.ids != other.ids or not np.array_equal(outcomes.weights_I, other.weights_I):
                odd = next((f"item {mine.split(':')[1]}" for mine, their in zip(other.ids, outcomes.ids, strict=False)
                            if mine != their), f"{len(other.ids)} and {len(outcomes.ids)} items, or their lengths")
                raise CompareError(f"{both} did not answer the same items of {outcomes.task} ({odd} differ); evaluate "
                                   "both on the same data and with the same limit")


def _name(entry: Entry) -> str:
    return "/".join(str(part) for part in entry.key)


# As rows --------------------------------------------------------------------------------------------------------------

def _rows(entries: Sequence[Entry], metric: str, task: str, table: Table) -> list[dict[str, Any]]:
    """One row for each pair in every group of one dense model, on one task."""
    places = {entry.key: place for place, entry in enumerate(entries)}
    dense = next((place for place, entry in enumerate(entries) if entry.key[2] == DENSE), None)
    rows = []
    groups = dict.fromkeys((entry.key[3], entry.zeros) for entry in entries if entry.key[2] != DENSE)
    for ratio, zeros in groups:
        group = [place for place, entry in enumerate(entries)
                 if (entry.key[3], entry.zeros) == (ratio, zeros) and entry.key[2] != DENSE]
        better = -1 if table.unit == "share" else 1
        # if several models have equal values, the first of these models is used
        best = min(group, key=lambda place: better * table.means_J[place])
        questions = {"best": [(place, best) for place in group if place != best],
                     "baseline": [(place, other) for place in group
                                  if entries[place].key[2] != BASELINE and
                                  (other := places.get(_with_method(entries[place].key, BASELINE))) in group],
                     "dense": [(place, dense) for place in group if dense is not None]}
        taken = {frozenset(pair) for pairs in questions.values() for pair in pairs}
        questions[""] = [pair for pair in itertools.combinations(group, 2) if frozenset(pair) not in taken]
        for against, pairs in questions.items():
            raw = [float(table.p_JJ[pair]) for pair in pairs]
            corrected = holm(raw) if against else [math.nan] * len(raw)
            rows += [_row(entries, metric, task, table, pair, against, p, p_holm)
                     for pair, p, p_holm in zip(pairs, raw, corrected, strict=True)]
    return rows


def _with_method(key: tuple[str, str, str, float, int], method: str) -> tuple[str, str, str, float, int]:
    return (key[0], key[1], method, key[3], key[4])


def _row(entries: Sequence[Entry], metric: str, task: str, table: Table, pair: tuple[int, int], against: str,
         p: float, p_holm: float) -> dict[str, Any]:
    mine, other = (entries[place].key for place in pair)
    return dict(zip(KEYS, mine, strict=True)) | {
        "other": other[2], "other_calib": other[1], "other_k_max": other[4], "against": against, "metric": metric,
        "task": task, "difference": float(table.difference_JJ[pair]), "stderr": float(table.stderr_JJ[pair]), "p": p,
        "p_holm": p_holm, "unit": table.unit, "test": table.test, "items": table.items}
