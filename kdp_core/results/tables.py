"""Tables of results: every measured number (`tidy`), one row a model (`summarise`), and both for print (`render`).

The summary follows the KDP paper (Ma et al., ICLR 2026) where the paper is clear. Retained performance (RP, its
Tables 1 and 6) is the ratio of the mean accuracies. RP(PPL) is computed in two ways in the paper: Table 2 divides the
sums over models and corpora, Table 7 takes the mean of the ratios; see `retained_ppl`. No science is done here, only
means, ratios and their standard errors.
"""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import pandas as pd

from kdp_core.base.records import (
    Block,
    Composed,
    Efficiency,
    Inverse,
    KernelMap,
    LinearMap,
    PrunedFacts,
    Score,
    Scores,
    Selection,
)

PRIMARY: Mapping[str, Sequence[str]] = {
    "acc": ("acc_norm", "acc", "exact_match", "em"),
    "ppl": ("ppl", "word_perplexity"),
}
"""For each kind of score, the metrics that count, first choice first; a task counts once with the first it has.

Those for accuracy are evaluate.PRIMARY, written out here so that tables need not load the evaluation harness. Shares of
another kind do not count: ROUGE-1 is an overlap, pass@1 and areas under the curve have other scales of chance. A metric
`perplexity` (of LAMBADA's last words) is not one of text and does not count either. Perplexities per token and per word
are never averaged: the summary's `ppl` takes those per token where there are any, `rp_ppl` those per word, as the
paper's."""
WORD_PPL = "word_perplexity"

DENSE = "dense"
KEYS = ("model", "calib", "method", "ratio", "k_max")


class TableError(ValueError):
    """The points do not make a table."""


class Point(NamedTuple):
    """One evaluated model: a point of the grid, or the dense model itself."""
    model: str
    calib: str
    """Calibration set; empty for the dense model."""
    method: str
    """A method of the configuration, or `dense`."""
    ratio: float
    """Share of all parameters to remove, 0 for the dense model."""
    k_max: int
    """Layers of context of a block, 0 for the dense model."""
    facts: PrunedFacts | None
    """None for the dense model."""
    selection: Selection | None
    scores: Scores
    efficiency: Efficiency | None
    fit_seconds: float | None
    """Seconds spent on fitting what stands in for the blocks, and on fine-tuning; None where nothing is fitted."""
    finetuned: bool = False
    """Whether the model was fine-tuned after pruning: its row has a dagger in print."""
    search_seconds: float | None = None
    """Seconds spent on choosing what goes, once for all ratios; None where the similarity of layers chooses."""


class Column(NamedTuple):
    """How a column of the summary is printed and read."""
    header: str
    unit: str
    what: str
    """One plain sentence."""
    digits: int = 2
    scale: float = 1.0
    """Factor from the stored to the printed value."""
    better: int = 0
    """1 if higher is better, -1 if lower is, 0 if neither; columns with 0 are never marked."""
    stderr: str = ""
    """Column of the standard error, if there is one."""
    test: tuple[str, str] = ("", "")
    """Metric and task of compare's tests that order rows as this column does, if there are any."""


COLUMNS: dict[str, Column] = {
    "params_removed": Column("Removed", "%", "Share of all parameters removed, stand-ins counted back in.", 1, 100),
    "layers_removed": Column("Layers removed", "", "Decoder layers fewer than in the dense model.", 0),
    "acc": Column("Accuracy", "%", "Plain mean of the accuracy tasks.", 1, 100, 1, "acc_stderr",
                  ("acc", "all")),
    "rp": Column("Retained", "%", "Mean accuracy as a percentage of the dense model's.", 1, 1, 1, "rp_stderr",
                 ("acc", "all")),
    "ppl": Column("Perplexity", "", "Per token, on held-out text; lower is better.", 2, 1, -1, "ppl_stderr",
                  ("ppl", "all")),
    "ppl_ratio": Column("Perplexity / dense", "", "Perplexity divided by the dense model's.", 2, 1, -1,
                        "ppl_ratio_stderr", ("ppl", "all")),
    "rp_ppl": Column("Retained (ppl)", "%", "Mean over texts of dense / pruned perplexity.", 1, 1, 1,
                     "rp_ppl_stderr"),
    "speedup_prefill": Column("Speed-up, prefill", "x", "Median of paired dense / pruned times, whole prompt.",
                              2, 1, 1),
    "speedup_decode": Column("Speed-up, decode", "x", "Median of paired dense / pruned times, one cached token.",
                             2, 1, 1),
    "params_millions": Column("Parameters", "M", "All parameters, tied ones counted once.", 1),
    "macs_giga": Column("Multiply-adds", "G", "Of the linear layers, for one pass over the timed prompt.", 2),
    "blocks": Column("Blocks", "", "Replaced layers, first to one past the last."),
    "search_seconds": Column("Search", "s", "Time spent on choosing what goes, once for all ratios.", 0),
    "fit_seconds": Column("Fit", "s", "Time spent on fitting the stand-ins.", 0),
}
RELATIVE = ("rp", "ppl_ratio", "rp_ppl")
"""Printed without their errors, which are those of acc and ppl over again."""
MAIN = ("params_removed", "layers_removed", "acc", "rp", "ppl", "ppl_ratio", "speedup_prefill", "speedup_decode",
        "params_millions")
SUMMARY = (*KEYS, "params_removed", "layers_removed", "ppl", "ppl_stderr", "ppl_ratio", "ppl_ratio_stderr", "acc",
           "acc_stderr", "rp", "rp_stderr", "rp_ppl", "rp_ppl_stderr", "speedup_prefill", "speedup_decode",
           "params_millions", "macs_giga", "blocks", "search_seconds", "fit_seconds", "finetuned",
           "params_zeroed")


# Every measured number ------------------------------------------------------------------------------------------------

def tidy(points: Sequence[Point]) -> pd.DataFrame:
    """A row a measured number: the point's keys, task, metric, value, stderr, unit, items.

    Costs stand under the task `efficiency`, with units ms, mib, macs, params and x (ratios); their items are the
    repeats of the timing. Raises TableError if two points have the same keys.
    """
    _check_unique(points)
    rows = [dict(zip(KEYS, point[:5], strict=True)) | row for point in points for row in _measured(point)]
    return pd.DataFrame(rows, columns=[*KEYS, "task", "metric", "value", "stderr", "unit", "items"]).astype(
        {"value": float, "stderr": float})


def _measured(point: Point) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"task": s.task, "metric": s.metric, "value": s.value, "stderr": s.stderr, "unit": s.unit, "items": s.items}
        for s in point.scores.scores]
    if point.efficiency is None:
        return rows
    cost = point.efficiency
    units = {"params": "params", "macs": "macs", "prefill_ms": "ms", "prefill_dense_ms": "ms", "decode_ms": "ms",
             "decode_dense_ms": "ms", "speedup_prefill": "x", "speedup_decode": "x", "peak_memory_mib": "mib"}
    counted = ("params", "macs")
    return rows + [{"task": "efficiency", "metric": name, "value": getattr(cost, name), "stderr": None, "unit": unit,
                    "items": 1 if name in counted else cost.repeats} for name, unit in units.items()]


def fits(fitted: Sequence[tuple[Mapping[str, Any], KernelMap | Inverse | LinearMap | Composed]]) -> pd.DataFrame:
    """A row a fitted block: the given keys, block, step, and the record's held-out figures, ridge, tokens, seconds.

    Held-out figures are all scalars of `stats` whose names begin with `heldout` or `decode`; a record without them
    gives those of its last epoch. A composed record gives a row for each of its stand-ins and one for `all`.
    """
    return pd.DataFrame([{**keys, **row} for keys, record in fitted
                         for row in (_composed(record) if isinstance(record, Composed) else [_fit(record)])])


def _fit(record: KernelMap | Inverse | LinearMap) -> dict[str, Any]:
    last = record.curve[-1] if getattr(record, "curve", None) else {}
    known = {name: value for name, value in {**last, **record.stats}.items()
             if isinstance(value, int | float) and (name.startswith(("heldout", "decode")) or name in FIT_FIGURES)}
    step = {"KernelMap": "kernel", "Inverse": "inverse", "LinearMap": "linear"}[type(record).__name__]
    return {"block": span(record.block), "step": step, **dict(sorted(known.items()))}


def _composed(record: Composed) -> list[dict[str, Any]]:
    """The stand-ins one by one; then the divergence of joint training's kept epoch and the seconds, of all together."""
    tokens = record.stats["tokens"]
    best = {name: value for name, value in record.stats.items() if name.startswith("heldout")}
    return [*({"block": span(fit["block"]), "step": "compose", "heldout_error": fit["heldout_error"],
               "tokens": tokens} for fit in record.fits),
            {"block": "all", "step": "compose", **best, "tokens": tokens, "seconds": record.stats["seconds"]}]


FIT_FIGURES = ("ridge", "tokens", "seconds")


# One row a model ------------------------------------------------------------------------------------------------------

def summarise(points: Sequence[Point], *, primary: Mapping[str, Sequence[str]] = PRIMARY,
              tasks: Sequence[str] | None = None) -> pd.DataFrame:
    """A row a model, dense ones first within their model, then by ratio, k_max, calib and the methods' given order.

    Models that merely hold more zeros save neither room nor time without sparse kernels: they stand after the others.

    Columns as in SUMMARY, units as in COLUMNS; ratio, params_removed and acc are shares, rp and rp_ppl percentages.
    `tasks` names the tasks that count (all by default); members (`mmlu/law`) of a group with a score count in it alone.
    acc is the plain mean of the tasks' primary metrics, ppl the geometric mean over perplexity tasks of one unit (see
    PRIMARY); their standard errors take the tasks as independent. Those of ppl_ratio, rp and rp_ppl hold the dense
    model fixed, as fits a comparison of methods on one model. A quantity with a missing part is NaN. Raises TableError
    for repeated points, a model without its dense point, or points of one model scored on different tasks.
    """
    _check_unique(points)
    dense = {point.model: point for point in points if point.method == DENSE}
    order = {method: place for place, method in enumerate(dict.fromkeys(point.method for point in points))}
    rows = []
    for point in sorted(points, key=lambda p: (p.model, p.method != DENSE, p.ratio, p.k_max, p.calib,
                                              _sparse(p), order[p.method])):
        if point.model not in dense:
            raise TableError(f"no dense point for model {point.model!r}; evaluate the dense model on the same tasks")
        rows.append(_summary_row(point, dense[point.model], primary, tasks))
    return pd.DataFrame(rows, columns=list(SUMMARY))


def _sparse(point: Point) -> bool:
    return point.facts is not None and point.facts.params_zeroed > 0


def _summary_row(point: Point, dense: Point, primary: Mapping[str, Sequence[str]],
                 tasks: Sequence[str] | None) -> dict[str, Any]:
    facts, cost = point.facts, point.efficiency
    row = dict(zip(KEYS, point[:5], strict=True)) | {
        "params_removed": facts.params_removed if facts else 0.0,
        "layers_removed": facts.layers_removed if facts else 0,
        "blocks": " ".join(span(block) for block in facts.blocks) if facts else "",
        "speedup_prefill": cost.speedup_prefill if cost else math.nan,
        "speedup_decode": cost.speedup_decode if cost else math.nan,
        "params_millions": cost.params / 1e6 if cost else facts.params_after / 1e6 if facts else math.nan,
        "macs_giga": cost.macs / 1e9 if cost else math.nan,
        "search_seconds": math.nan if point.search_seconds is None else point.search_seconds,
        "fit_seconds": math.nan if point.fit_seconds is None else point.fit_seconds, "finetuned": point.finetuned,
        "params_zeroed": facts.params_zeroed / facts.params_before if facts else 0.0}
    for kind in ("acc", "ppl"):
        mine, theirs = (main_scores(p.scores.scores, primary[kind], tasks) for p in (point, dense))
        if set(mine) != set(theirs):
            raise TableError(f"{_name(point)} was scored on {_names(mine)} but the dense {point.model} on "
                             f"{_names(theirs)}; evaluate both on the same tasks")
        row |= _accuracy(mine, theirs) if kind == "acc" else _perplexity(mine, theirs)
    return row


def _accuracy(mine: Mapping[str, Score], theirs: Mapping[str, Score]) -> dict[str, float]:
    values, errors = _values(mine), _errors(mine)
    acc, acc_stderr = _mean(values), _norm(errors)
    dense = _mean(_values(theirs))
    return {"acc": acc, "acc_stderr": acc_stderr, "rp": retained(acc, dense), "rp_stderr": retained(acc_stderr, dense)}


def _perplexity(mine: Mapping[str, Score], theirs: Mapping[str, Score]) -> dict[str, float]:
    per_word = [task for task, score in mine.items() if score.metric == WORD_PPL]
    per_token = [task for task in mine if task not in per_word]
    ppl, dense_ppl, relative = _relative(mine, theirs, per_token or per_word)
    words, dense_words, word_errors = _relative(mine, theirs, per_word or per_token)
    # d (dense / ppl) = dense / ppl * d ppl / ppl
    ratios = [d / p * r for p, d, r in zip(words, dense_words, word_errors, strict=True)]
    mean, dense_mean = _geometric(ppl), _geometric(dense_ppl)
    return {"ppl": mean, "ppl_stderr": mean * _norm(relative), "ppl_ratio": mean / dense_mean,
            "ppl_ratio_stderr": mean / dense_mean * _norm(relative),
            "rp_ppl": retained_ppl(words, dense_words) if words else math.nan, "rp_ppl_stderr": 100 * _norm(ratios)}


def _relative(mine: Mapping[str, Score], theirs: Mapping[str, Score],
              tasks: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
    """Perplexities of some tasks, the dense model's, and relative errors."""
    ppl = _values({task: mine[task] for task in tasks})
    errors = _errors({task: mine[task] for task in tasks})
    # d log ppl = d ppl / ppl
    return (ppl, _values({task: theirs[task] for task in tasks}),
            [error / value for error, value in zip(errors, ppl, strict=True)])


def retained(pruned: float, dense: float) -> float:
    """Retained performance in percent, from mean accuracies (paper, Table 1: SLEB 47.02 / 59.14 = 79.5)."""
    # RP = 100 * mean_t acc_t / mean_t acc_t^dense
    return 100 * pruned / dense if dense else math.nan


def retained_ppl(pruned: Sequence[float], dense: Sequence[float], *,
                 reading: Literal["mean_of_ratios", "ratio_of_sums"] = "mean_of_ratios") -> float:
    """RP(PPL) in percent over texts in the same order.

    The paper has two readings: Table 7 is the mean of dense / pruned (OPT-2.7B: mean(15.1/28.0, 31.3/37.2) = 69.0),
    Table 2 the ratio of the sums (Streamline: 38.8 / 730.6 = 5.3). kdp reports the mean of ratios: in the ratio of
    sums a single collapsed text outweighs all others.
    """
    if reading == "mean_of_ratios":
        return 100 * _mean([d / p for p, d in zip(pruned, dense, strict=True)])
    return 100 * sum(dense) / sum(pruned)


def span(block: Block) -> str:
    """`5-7` for the half-open block (5, 7): layers 5 and 6."""
    return f"{block[0]}-{block[1]}"


def main_scores(scores: Sequence[Score], metrics: Sequence[str], tasks: Sequence[str] | None) -> dict[str, Score]:
    """By task, the score whose metric comes first in `metrics`; tasks in name order, members of a scored group out."""
    best: dict[str, Score] = {}
    for score in scores:
        if score.metric not in metrics or (tasks is not None and score.task not in tasks):
            continue
        held = best.get(score.task)
        if held is None or metrics.index(score.metric) < metrics.index(held.metric):
            best[score.task] = score
    return {task: score for task, score in sorted(best.items()) if not any(task.startswith(f"{g}/") for g in best)}


def _values(scores: Mapping[str, Score]) -> list[float]:
    return [math.nan if score.value is None else score.value for score in scores.values()]


def _errors(scores: Mapping[str, Score]) -> list[float]:
    return [math.nan if score.stderr is None else score.stderr for score in scores.values()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _geometric(values: Sequence[float]) -> float:
    return math.exp(_mean([math.log(value) for value in values])) if values else math.nan


def _norm(errors: Sequence[float]) -> float:
    """Standard error of a mean of independent terms."""
    # se(mean) = sqrt(sum se^2) / n
    return math.sqrt(sum(error ** 2 for error in errors)) / len(errors) if errors else math.nan


def _check_unique(points: Sequence[Point]) -> None:
    seen: set[tuple[Any, ...]] = set()
    for point in points:
        if point[:5] in seen:
            raise TableError(f"{_name(point)} was given twice; each grid point may stand once")
        seen.add(point[:5])


def _name(point: Point) -> str:
    return "/".join(str(part) for part in point[:5])


def _names(scores: Mapping[str, Score]) -> str:
    return ", ".join(f"{score.task}:{score.metric}" for score in scores.values()) or "no such task"


# For print ------------------------------------------------------------------------------------------------------------

def marks(frame: pd.DataFrame, name: str, known: Mapping[str, Column] = COLUMNS,
          comparisons: pd.DataFrame | None = None) -> dict[Any, str]:
    """Which rows of a summary to set off in column `name`: {row label: "best" | "second"}.

    Pruned rows of one model and ratio are compared, those that hold zeros among themselves. A row is "best" only if it
    is told from every other row of its group. "second" are the best of the rows that are left, and all that are not
    told from it; so where none is "best", they are the rows that may be, and where all may, none is marked. Two rows
    are told apart by compare's paired tests, corrected for the rows of the group (Holm, p < SIGNIFICANT), where
    `comparisons` has them; else by more than one combined standard error sqrt(se1^2 + se2^2), where these are known.
    Elsewhere values compare as printed, and equal ones share their mark.
    """
    column, found = known[name], {}
    pruned = frame[(frame["method"] != DENSE) & frame[name].notna()] if column.better else frame.iloc[:0]
    tested = _tested(comparisons, column) if comparisons is not None else {}
    for _, group in pruned.groupby(["model", "ratio", zeros(pruned)], sort=True):
        if len(group) > 1:
            found |= _marks_of_group(group, name, column, tested)
    return found


def zeros(frame: pd.DataFrame) -> pd.Series:
    """Which rows of a summary hold weights set to zero instead of fewer weights."""
    return frame["params_zeroed"].gt(0).rename("zeros")


SIGNIFICANT = 0.05
"""Corrected p below which two rows are told apart."""
Pairs = dict[frozenset[tuple[Any, ...]], float]
"""p of two rows, by their keys."""


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the given order; NaN stays NaN and does not count."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, above = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(order):
        # p_(i)' = max_{j <= i} min(1, (m - j + 1) p_(j))
        above = max(above, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = above
    return corrected


def _tested(comparisons: pd.DataFrame, column: Column) -> Pairs:
    """p of all pairs that were tested by the metric and task of a column."""
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
    shown = [number(column, value) for value in ranked[name]]
    distinct = list(dict.fromkeys(shown))
    words = {distinct[0]: "best"} | ({distinct[1]: "second"} if len(distinct) > 1 and shown.count(distinct[0]) == 1
                                     else {})
    # all equal: nothing stands out
    return {} if len(distinct) == 1 else {label: words[text] for label, text in zip(labels, shown, strict=True)
                                          if text in words}


def _marks_of_ranks(labels: list[Any], told: Callable[[list[Any]], list[bool]]) -> dict[Any, str]:
    """Marks of rows in their order; `told` says of all but the first row whether they are told from the first."""
    apart = told(labels)
    if not any(apart):
        # nothing stands out
        return {}
    made = {labels[0]: "best"} if all(apart) else {}
    left = labels[len(made):]
    return made | {left[0]: "second"} | {label: "second" for label, apart in zip(left[1:], told(left), strict=True)
                                         if not apart}


NOTE = ("Bold: ahead of every other row of the same model and target. Underlined: the best of the others, and all that "
        "cannot be told from it; nothing where these are all rows. Scores are told apart by paired tests on the same "
        f"items, Holm's correction, p < {SIGNIFICANT}, or, where items were not compared, by one combined standard "
        "error; costs as printed. ±: one standard error. †: fine-tuned after pruning. (zeros): weights set to zero, "
        "none taken out.")
"""What the marks of a table mean, for print below it."""


def number(column: Column, value: Any) -> str:
    """A value as printed, without its unit; an en dash where there is none."""
    if isinstance(value, str):
        return value or "–"
    if value is None or math.isnan(value):
        return "–"
    scaled = value * column.scale
    if abs(scaled) < 1e5:
        return f"{scaled:.{column.digits}f}"
    return f"{scaled:.1e}".replace("e+0", "e").replace("e+", "e")


def heading(column: Column) -> str:
    """Header with its unit, such as `Accuracy (%)`."""
    return f"{column.header} ({column.unit})" if column.unit else column.header


def render(frame: pd.DataFrame, format: Literal["csv", "md", "tex"], *, columns: Sequence[str] = MAIN,
           caption: str = "", label: str = "", known: Mapping[str, Column] = COLUMNS,
           comparisons: pd.DataFrame | None = None, note: str = "", wide: bool = False) -> str:
    """A summary as text: CSV (all columns, full precision), a Markdown table, or a LaTeX booktabs table.

    Rows are grouped by model and ratio; calib and k_max stand only where they vary. In a group the best value is bold
    and the second underlined as `marks` tells, with the tests in `comparisons` (compare.compare). `caption` and
    `label` are for LaTeX, where a `wide` table is scaled to the page; `note` stands below; `known` tells how each
    column is printed. Raises TableError for an unknown format or column.
    """
    if format == "csv":
        return frame.to_csv(index=False, lineterminator="\n")
    if format not in ("md", "tex"):
        raise TableError(f"unknown table format {format!r}; choose csv, md or tex")
    unknown = [name for name in columns if name not in known or name not in frame]
    if unknown:
        raise TableError(f"unknown column {unknown[0]!r}; choose among {', '.join(known)}")
    keys = shown_keys(frame)
    head = [escape(text, format)
            for text in [*(KEY_HEADINGS[key] for key in keys), *(heading(known[c]) for c in columns)]]
    body = _body(frame, keys, columns, format, known, comparisons)
    return grid(head, body, format, keys=len(keys), caption=caption, label=label, note=note, wide=wide)


def grid(head: Sequence[str], body: Sequence[tuple[Any, Sequence[str]]], format: Literal["md", "tex"], *, keys: int,
         caption: str = "", label: str = "", note: str = "", wide: bool = False) -> str:
    """Rows (group, cells), escaped for the format, as a Markdown or LaTeX table with `keys` text columns first.

    In LaTeX a line parts groups whose first members differ, and a space those that differ otherwise.
    """
    if format == "tex":
        return _tex(head, body, keys, caption, label, note, wide)
    rule = [":--"] * keys + ["--:"] * (len(head) - keys)
    lines = [f"| {' | '.join(cells)} |\n" for cells in [head, rule, *(cells for _, cells in body)]]
    return "".join(lines) + (f"\n{escape(note, format)}\n" if note else "")


KEY_HEADINGS = {"model": "Model", "ratio": "Target (%)", "method": "Method", "calib": "Calibration", "k_max": "K max"}


def shown_keys(frame: pd.DataFrame) -> list[str]:
    """Keys worth a column: model, ratio and method always, calib and k_max where pruned rows differ in them."""
    pruned = frame[frame["method"] != DENSE]
    return ["model", "ratio", "method", *(key for key in ("calib", "k_max") if pruned[key].nunique() > 1)]


def key_text(key: str, row: Any) -> str:
    """A key of a summary row as printed: the ratio in percent, a dash for what the dense model does not have."""
    if key == "ratio":
        return "–" if row["method"] == DENSE else f"{100 * row['ratio']:g}"
    if row["method"] == DENSE and key in ("calib", "k_max"):
        return "–"
    if key != "method":
        return str(row[key])
    return row[key] + ("†" if row.get("finetuned", False) else "") + (" (zeros)" if row["params_zeroed"] > 0 else "")


def _body(frame: pd.DataFrame, keys: Sequence[str], columns: Sequence[str], format: str,
          known: Mapping[str, Column], comparisons: pd.DataFrame | None) -> list[tuple[tuple[Any, ...], list[str]]]:
    """(group, cells) a row; model and ratio are left out where they repeat the row above."""
    wrap = _wrap_md if format == "md" else _wrap_tex
    found = {name: marks(frame, name, known, comparisons) for name in columns}
    rows, above = [], ("", "", False)
    for label, row in frame.iterrows():
        group = (row["model"], key_text("ratio", row), row["params_zeroed"] > 0)
        cells = [escape(key_text(key, row), format) for key in keys]
        if group[0] == above[0]:
            cells[0] = ""
            cells[1] = "" if group[:2] == above[:2] else cells[1]
        for name in columns:
            column = known[name]
            text = wrap(escape(number(column, row[name]), format), found[name].get(label, ""))
            error = row[column.stderr] if column.stderr and name not in RELATIVE else math.nan
            cells.append(text + ("" if pd.isna(error) else _error(number(column, error), format)))
        rows.append((group, cells))
        above = group
    return rows


def _error(text: str, format: str) -> str:
    return f" ± {text}" if format == "md" else rf" {{\scriptsize$\pm$ {text}}}"


def _wrap_md(text: str, mark: str) -> str:
    return {"best": f"**{text}**", "second": f"<u>{text}</u>"}.get(mark, text)


def _wrap_tex(text: str, mark: str) -> str:
    return {"best": rf"\textbf{{{text}}}", "second": rf"\underline{{{text}}}"}.get(mark, text)


def _tex(head: Sequence[str], body: Sequence[tuple[Any, Sequence[str]]], keys: int, caption: str, label: str,
         note: str, wide: bool) -> str:
    kind, packages = ("table*", "booktabs,graphicx") if wide else ("table", "booktabs")
    lines = [rf"% needs \usepackage{{{packages}}}", rf"\begin{{{kind}}}[t]", r"\centering", r"\small"]
    lines += [rf"\caption{{{escape(caption, 'tex')}}}"] if caption else []
    lines += [rf"\label{{{label}}}"] if label else []
    lines += [r"\resizebox{\textwidth}{!}{%"] if wide else []
    lines += [rf"\begin{{tabular}}{{{'l' * keys}{'r' * (len(head) - keys)}}}", r"\toprule",
              " & ".join(head) + r" \\", r"\midrule"]
    for place, (group, cells) in enumerate(body):
        if place and group != body[place - 1][0]:
            lines.append(r"\midrule" if group[0] != body[place - 1][0][0] else r"\addlinespace")
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}" + "}" * wide]
    lines += [rf"\par\smallskip{{\footnotesize {escape(note, 'tex')}\par}}"] if note else []
    return "\n".join([*lines, rf"\end{{{kind}}}", ""])


def escape(text: str, format: Literal["md", "tex"]) -> str:
    """Plain text as text of the format."""
    if format == "tex":
        return "".join(_TEX.get(character, character) for character in text)
    for character in "\\|*_<`":
        text = text.replace(character, "\\" + character)
    return text


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--",
        "†": r"\textdagger{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
        **{character: "\\" + character for character in "&%$#_{}"}}
