"""Tables of the comparison on real tasks, and the file that stores the outcome of every item.

A row is a record of one model. The field `outcomes` has the outcomes of the items of each task: 1 for a right answer
and 0 for a wrong one. In the file of rows each line is a row as JSON, and the outcomes of a task are one string of
these digits.
"""
import json
import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdp_core.base import store
from kdp_core.results import paired
from kdp_core.score.benchmarks import BENCHMARKS

Row = Mapping[str, Any]
NAME = re.compile(r"(?P<variant>\w+)(@(?P<sequences>[1-9]\d*))?(?P<tuned>\+\w+)?")
"""The name of a row: a variant, its own number of calibration sequences, and the suffix of the fine-tuned rows."""
OURS = "kdp_"
"""Prefix of the names of this project's methods."""
HELDOUT = ("news", "wiki", "web")
"""Held-out texts."""


def plain(name: str) -> str:
    """The name of a row without the number of calibration sequences."""
    found = NAME.fullmatch(name)
    return found["variant"] + (found["tuned"] or "") if found else name


def sequences_of(name: str, default: int) -> int:
    """The number of calibration sequences of a row: its own number, or that of the run."""
    found = NAME.fullmatch(name)
    return int(found["sequences"]) if found and found["sequences"] else default


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of rows."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row if "refused" in row else
            {**row, "outcomes": {task: [float(one) for one in digits] for task, digits in row["outcomes"].items()}}
            for row in rows]


def key_of(row: Row) -> tuple[str, float, int]:
    """What tells the rows of one model apart."""
    return row["method"], row["ratio"], row["seed"]


def by_model(rows: Sequence[Row]) -> dict[str, tuple[Row, list[Row]]]:
    """Model -> its dense row and the rows of its pruned versions."""
    return {dense["model"]: (dense, [row for row in rows if row["ratio"] and row["model"] == dense["model"]])
            for dense in rows if not dense["ratio"]}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a file of rows, in the order of models, ratios, seeds and methods."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["model"], row["ratio"], row.get("seed") or 0, row["method"])):
        outcomes = {task: "".join(f"{one:.0f}" for one in values) for task, values in row.get("outcomes", {}).items()}
        lines.append(json.dumps(dict(sorted({**row, **({"outcomes": outcomes} if outcomes else {})}.items()))))
    store.write_text(path, "".join(f"{line}\n" for line in lines))


def counted_tasks(dense: Row) -> list[str]:
    """The tasks on which the dense model is above chance by more than four standard errors."""
    found = []
    for task, values in dense["outcomes"].items():
        mean, chance = float(np.mean(values)), BENCHMARKS[task].chance or 0.0
        if mean - chance > 4 * (mean * (1 - mean) / len(values)) ** 0.5:
            found.append(task)
    return found


def entry(row: Row, dense: Row) -> dict[str, Any]:
    """One row of the table, from the stored measures of one pruned model."""
    known = {key: value for key, value in row.items() if key not in ("outcomes", "score_seconds")}
    if "refused" in row:
        return known
    tasks = counted_tasks(dense)
    means = {task: float(np.mean(row["outcomes"][task])) for task in row["outcomes"]}
    chance = float(np.mean([BENCHMARKS[task].chance or 0.0 for task in tasks]))
    acc, full = (float(np.mean([np.mean(one["outcomes"][task]) for task in tasks])) for one in (row, dense))
    variances = [means[task] * (1 - means[task]) / len(row["outcomes"][task]) for task in tasks]
    ratios = {f"ppl_ratio_{name}": row[f"ppl_{name}"] / dense[f"ppl_{name}"] for name in HELDOUT}
    return {**known, "acc": 100 * acc, "acc_stderr": 100 * sum(variances) ** 0.5 / len(tasks),
            "acc_above_chance_retained": 100 * (acc - chance) / (full - chance), **ratios,
            **{f"acc_{task}": 100 * mean for task, mean in means.items()}, "tasks": " ".join(tasks)}


FIRST = ("model", "method", "group", "ratio", "seed", "params_removed", "acc", "acc_stderr",
         "acc_above_chance_retained", "ppl_ratio_news", "ppl_ratio_wiki", "ppl_ratio_web", "fit_seconds", "peak_gib",
         "speedup_prefill", "speedup_decode")
"""The first columns of the table."""
TABLES = ("retention.csv", "retention_tests.csv", "retention_variants.csv")
"""The files of `write_tables`."""


def write_tables(measured: Mapping[str, tuple[Row, list[Row]]], out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Write the tables of TABLES and return the first two. `measured` has for each model its dense row and the rows
    of its pruned versions."""
    lines, tests, variants = [], [], []
    for model, (dense, rows) in sorted(measured.items()):
        lines += [entry(row, dense) for row in [dense, *rows]]
        tests += compared(model, rows, dense)
        variants += variant_pairs(model, rows, dense)
    # a dense row has no seed, and there may be no other rows yet
    frame = pd.DataFrame([{"seed": None, **line} for line in lines])
    frame = frame[[*[name for name in FIRST if name in frame], *sorted(set(frame) - set(FIRST))]]
    frame = frame.sort_values(["model", "ratio", "seed", "acc"], ascending=[True, True, True, False],
                              na_position="first", kind="stable")
    pairs = pd.DataFrame(tests, columns=["model", "ratio", "seed", "ours", "method", "difference", "stderr", "p",
                                         "p_holm"])
    own = pd.DataFrame(variants, columns=["model", "ratio", "seed", "method", "other", "task", "difference", "stderr",
                                          "p"])
    for name, one in zip(TABLES, (frame, pairs, own), strict=True):
        store.write_text(out / name, one.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    return frame, pairs


def compared(model: str, rows: Sequence[Row], dense: Row) -> list[dict[str, Any]]:
    """At each ratio and seed and in each group, compare our best method with each published method by item; Holm's
    method corrects p."""
    tasks, found = counted_tasks(dense), []
    measured = [row for row in rows if "refused" not in row]
    for ratio, seed, group in sorted({(row["ratio"], row["seed"], row["group"]) for row in measured}):
        here = [row for row in measured if (row["ratio"], row["seed"], row["group"]) == (ratio, seed, group)]
        ours = [row for row in here if row["method"].startswith(OURS)]
        others = [row for row in here if not row["method"].startswith(OURS)]
        if not ours or not others:
            continue
        best = max(ours, key=lambda row: sum(np.mean(row["outcomes"][task]) for task in tasks))
        values = {task: np.array([one["outcomes"][task] for one in (best, *others)]).T for task in tasks}
        pairs = [(0, number) for number in range(1, len(others) + 1)]
        table = paired.accuracies(values, dict.fromkeys(tasks, "acc"), pairs)[paired.ALL]
        p_values = [float(table.p_JJ[pair]) for pair in pairs]
        for number, (row, p, corrected) in enumerate(zip(others, p_values, paired.holm(p_values), strict=True), 1):
            found.append({"model": model, "ratio": ratio, "seed": seed, "ours": best["method"],
                          "method": row["method"], "difference": 100 * float(table.difference_JJ[0, number]),
                          "stderr": 100 * float(table.stderr_JJ[0, number]), "p": p, "p_holm": corrected})
    return found


def variant_pairs(model: str, rows: Sequence[Row], dense: Row) -> list[dict[str, Any]]:
    """At each ratio and seed, compare all our variants with each other and with the best published structured method:
    by item on each task, and in the mean over the tasks. p is not corrected, because these are comparisons of single
    settings."""
    tasks, found = counted_tasks(dense), []
    measured = sorted((row for row in rows if "refused" not in row), key=lambda row: row["method"])
    for ratio, seed in sorted({(row["ratio"], row["seed"]) for row in measured}):
        here = [row for row in measured if (row["ratio"], row["seed"]) == (ratio, seed)]
        others = [row for row in here if not row["method"].startswith(OURS) and row["group"] == "structured"]
        here = [row for row in here if row["method"].startswith(OURS)]
        # the best other method is the last row, so it is the second one of each of its pairs
        here += sorted(others, key=lambda row: sum(np.mean(row["outcomes"][task]) for task in tasks))[-1:]
        pairs = list(combinations(range(len(here)), 2))
        values = {task: np.array([row["outcomes"][task] for row in here]).T for task in tasks}
        for task, table in paired.accuracies(values, dict.fromkeys(tasks, "acc"), pairs).items() if pairs else ():
            found += [{"model": model, "ratio": ratio, "seed": seed, "method": here[one]["method"],
                       "other": here[other]["method"], "task": task,
                       "difference": 100 * float(table.difference_JJ[one, other]),
                       "stderr": 100 * float(table.stderr_JJ[one, other]), "p": float(table.p_JJ[one, other])}
                      for one, other in pairs]
    return found
