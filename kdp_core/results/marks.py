"""Marks of a table: the best rows of each group, if they differ from the other rows by more than noise.

Two rows are compared by a paired test on the same items, or by their standard errors if there is no test.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column, number
from kdp_core.results.paired import SIGNIFICANT, holm

NOTE = ("Bold: ahead of every other row of the same model and target. Underlined: the best of the others, and all that "
        "cannot be told from it; nothing where these are all rows. Scores are told apart by paired tests on the same "
        f"items, Holm's correction, p < {SIGNIFICANT}, or, where items were not compared, by one combined standard "
        "error; costs as printed. ±: one standard error. †: fine-tuned after pruning. (zeros): weights set to zero, "
        "none taken out.")
"""What the marks of a table mean, for print below it."""
Pairs = dict[frozenset[tuple[Any, ...]], float]
"""p of two rows, by their keys."""


def marks(frame: pd.DataFrame, name: str, known: Mapping[str, Column] = COLUMNS,
          comparisons: pd.DataFrame | None = None) -> dict[Any, str]:
    """Which rows of a summary to mark in column `name`: {row label: "best" | "second"}.

    The pruned rows of one model and ratio are compared; rows of models with weights set to zero are compared among
    themselves. A row is "best" only if it differs significantly from every other row of its group. "second" are the
    best of the remaining rows and all rows that do not differ significantly from that row. So if no row is "best", the
    rows that may be the best are "second". If all rows may be the best, no row is marked.

    Two rows differ significantly by the paired tests in `comparisons`, corrected for the rows of the group (Holm,
    p < SIGNIFICANT). Without tests they must differ by more than one combined standard error sqrt(se1^2 + se2^2).
    Without errors, values are compared as printed, and equal values have the same mark.
    """
    column, found = known[name], {}
    pruned = frame[(frame["method"] != DENSE) & frame[name].notna()] if column.better else frame.iloc[:0]
    tested = _tested(comparisons, column) if comparisons is not None else {}
    for _, group in pruned.groupby(["model", "ratio", zeros(pruned)], sort=True):
        if len(group) > 1:
            found |= _marks_of_group(group, name, column, tested)
    return found


def zeros(frame: pd.DataFrame) -> pd.Series:
    """Which rows of a summary are models with weights set to zero instead of fewer weights."""
    return frame["params_zeroed"].gt(0).rename("zeros")


def _tested(comparisons: pd.DataFrame, column: Column) -> Pairs:
    """p of all pairs that were tested on the metric and task of a column."""
    own = comparisons[(comparisons["metric"] == column.test[0]) & (comparisons["task"] == column.test[1])]
    return {frozenset(((row.model, row.calib, row.method, row.ratio, row.k_max),
                       (row.model, row.other_calib, row.other, row.ratio, row.other_k_max))): row.p
            for row in own.itertuples()}


def _marks_of_group(group: pd.DataFrame, name: str, column: Column, tested: Pairs) -> dict[Any, str]:
    ranked = group.sort_values(name, ascending=column.better < 0, kind="stable")
    keys = {row.Index: tuple(row[1:]) for row in ranked[list(KEYS)].itertuples()}

    def p_values(labels: Sequence[Any]) -> list[float | None]:
        return [tested.get(frozenset((keys[labels[0]], keys[label]))) for label in labels[1:]]

    labels = ranked.index.tolist()
    if None not in p_values(labels) and None not in p_values(labels[1:]):
        return _marks_of_ranks(labels, lambda labels: [p < SIGNIFICANT for p in holm(p_values(labels))])
    if column.stderr and ranked[column.stderr].notna().all():
        values, errors = ranked[name], ranked[column.stderr]
        return _marks_of_ranks(labels, lambda labels: [
            abs(values[label] - values[labels[0]]) > math.hypot(errors[label], errors[labels[0]])
            for label in labels[1:]])
    return _marks_as_printed(labels, [number(column, value) for value in ranked[name]])


def _marks_of_ranks(labels: list[Any], told: Callable[[list[Any]], list[bool]]) -> dict[Any, str]:
    """Marks of ranked rows; `told` says for each row but the first whether it differs significantly from the first."""
    apart = told(labels)
    if not any(apart):
        # any row may be the best, so no row is marked
        return {}
    made = {labels[0]: "best"} if all(apart) else {}
    left = labels[len(made):]
    return made | {left[0]: "second"} | {label: "second" for label, apart in zip(left[1:], told(left), strict=True)
                                         if not apart}


def _marks_as_printed(labels: list[Any], shown: list[str]) -> dict[Any, str]:
    """Marks of ranked rows by their printed values.

    The rows equal to the first row are marked. If the first row is alone, the rows with the next value are marked too.
    """
    distinct = list(dict.fromkeys(shown))
    if len(distinct) == 1:
        # all values are equal, so no row is marked
        return {}
    words = {distinct[0]: "best"} | ({distinct[1]: "second"} if shown.count(distinct[0]) == 1 else {})
    return {label: words[text] for label, text in zip(labels, shown, strict=True) if text in words}
