"""Marks in a table: which rows of each group are the best, if the difference from the other rows is more than noise.

Two rows are compared by a paired test on the same items, or by their standard errors if there is no test.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from kdp_core.results.columns import COLUMNS, DENSE, KEYS, Column, number
from kdp_core.results.paired import SIGNIFICANT, holm

NOTE = ("Bold: the best row of its model and target, if it differs significantly from all other rows. Underlined: the "
        "best of the remaining rows, and all rows that do not differ significantly from this row; if these are all "
        "rows, no row is underlined. Scores are compared by paired tests on the same items (Holm's correction, p < "
        f"{SIGNIFICANT}). Without tests, scores that are more than one combined standard error apart differ "
        "significantly. Costs are compared as printed. ±: one standard error. †: fine-tuned after pruning. (zeros): "
        "weights were set to zero and not removed.")
"""The note below a table that explains its marks."""
Pairs = dict[frozenset[tuple[Any, ...]], float]
"""Keys of two rows -> p of their paired test."""


def marks(frame: pd.DataFrame, name: str, known: Mapping[str, Column] = COLUMNS,
          comparisons: pd.DataFrame | None = None) -> dict[Any, str]:
    """Which rows of a summary to mark in column `name`: {row label: "best" | "second"}.

    Only pruned rows of one model and one ratio are compared. Rows of models with weights set to zero are compared only
    with each other. A row is "best" only if it differs significantly from every other row of its group. Of the
    remaining rows, "second" marks the best row. It also marks each row that does not differ significantly from this
    best row. If no row of a group is "best", "second" marks all rows that may be the best. If "second" would mark all
    rows of a group, no row is marked.

    Significance comes from the paired tests in `comparisons`, with Holm's correction for the rows of the group (p <
    SIGNIFICANT). Without tests, two rows must differ by more than one combined standard error sqrt(se1^2 + se2^2).
    If rows have no standard errors, the printed values are compared, and rows with equal printed values get the same
    mark.
    """
    column, found = known[name], {}
    pruned = frame[(frame["method"] != DENSE) & frame[name].notna()] if column.better else frame.iloc[:0]
    tested = _tested(comparisons, column) if comparisons is not None else {}
    for _, group in pruned.groupby(["model", "ratio", zeros(pruned)], sort=True):
        if len(group) > 1:
            found |= _marks_of_group(group, name, column, tested)
    return found


def zeros(frame: pd.DataFrame) -> pd.Series:
    """Which rows of a summary describe models with zeroed weights. A model with zeroed weights has as many weights as
    the dense model."""
    return frame["params_zeroed"].gt(0).rename("zeros")


def _tested(comparisons: pd.DataFrame, column: Column) -> Pairs:
    """p of each pair of rows that has a paired test for the metric and the task of `column`."""
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
    """Marks of ranked rows. For each row after the first, `told` returns whether this row differs significantly from
    the first row."""
    apart = told(labels)
    if not any(apart):
        # any row may be the best, so no row is marked
        return {}
    made = {labels[0]: "best"} if all(apart) else {}
    left = labels[len(made):]
    return made | {left[0]: "second"} | {label: "second" for label, apart in zip(left[1:], told(left), strict=True)
                                         if not apart}


def _marks_as_printed(labels: list[Any], shown: list[str]) -> dict[Any, str]:
    """The marks of ranked rows if only the printed values are compared.

    All rows with the same printed value as the first row are "best". If only one row is "best", the rows with the next
    printed value are "second".
    """
    distinct = list(dict.fromkeys(shown))
    if len(distinct) == 1:
        # all values are equal, so no row is marked
        return {}
    words = {distinct[0]: "best"} | ({distinct[1]: "second"} if shown.count(distinct[0]) == 1 else {})
    return {label: words[text] for label, text in zip(labels, shown, strict=True) if text in words}
