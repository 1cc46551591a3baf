"""The numbers of a run: every measured number (`tidy`), every fit (`fits`), and one row for each model (`summarise`).

The summary follows the KDP paper (Ma et al., ICLR 2026) where the paper is clear. Retained performance (RP, in the
paper's Tables 1 and 6) is the ratio of the mean accuracies. The paper computes RP(PPL) in two ways: Table 2 divides two
sums over models and corpora, and Table 7 averages ratios (see `retained_ppl`). This module only computes means, ratios
and their standard errors.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd

from kdp_core.base.measurements import Score
from kdp_core.base.records import Composed, Inverse, KernelMap, LinearMap
from kdp_core.results.columns import DENSE, KEYS, SUMMARY, Point, TableError, span
from kdp_core.score.metrics import PRIMARY
from kdp_core.score.standard_errors import independent_mean

WORD_PPL = "word_perplexity"
"""The metric of perplexities per word. Perplexities per word and perplexities per token are never averaged together."""
FIT_FIGURES = ("ridge", "tokens", "seconds")
"""Names in a fit's `stats` that the row of the fit also contains. The row of a fit also contains held-out figures,
whose names begin with `heldout` or `decode`."""


# Every measured number ------------------------------------------------------------------------------------------------

def tidy(points: Sequence[Point]) -> pd.DataFrame:
    """One row for each measured number, with the columns: keys of the grid point, task, metric, value, stderr, unit,
    items.

    The costs are rows of the task `efficiency` with the units ms, mib, macs, params and x (ratios). In these rows,
    `items` is the number of repeats of the timing. Raises TableError if two grid points have the same keys.
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
    """One row for each fitted block, with the columns: the given keys, block, step, and the figures of the record.

    These figures are ridge, tokens, seconds, and all numbers in `stats` whose names begin with `heldout` or `decode`.
    If a record has no held-out figures, the figures of its last epoch are used. A `Composed` record has one row for
    each of its stand-ins, and one row `all`.
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
    """One row for each stand-in, and then the row `all` with the seconds of the fit and the figures of the epoch that
    was kept."""
    tokens = record.stats["tokens"]
    best = {name: value for name, value in record.stats.items() if name.startswith("heldout")}
    return [*({"block": span(fit["block"]), "step": "compose", "heldout_error": fit["heldout_error"],
               "tokens": tokens} for fit in record.fits),
            {"block": "all", "step": "compose", **best, "tokens": tokens, "seconds": record.stats["seconds"]}]


# One row for each model -----------------------------------------------------------------------------------------------

def summarise(points: Sequence[Point]) -> pd.DataFrame:
    """One row for each model: first the dense model, then its pruned models, sorted by ratio, k_max, calib and variant.

    Variants have the order in which they are given. Models whose weights are only set to zero come last, because they
    are as large as the dense model and, without sparse kernels, as slow.

    Columns are those of SUMMARY, and units are those of COLUMNS. The columns ratio, params_removed and acc are shares.
    The columns rp and rp_ppl are percentages. Every task counts, except the members (`mmlu/law`) of a group with a
    score of its own. `acc` is the plain mean of the tasks' primary metrics. `ppl` is the geometric mean of the
    perplexities per token; without such perplexities, of the perplexities per word. `rp_ppl` uses the perplexities per
    word if there are any, as the paper does. Standard errors assume that the tasks are independent. The standard errors
    of ppl_ratio, rp and rp_ppl treat the dense model as fixed, which suits a comparison of methods on one model. A
    figure is NaN if a number that it needs is missing. Raises TableError if two points have the same keys, if a model
    has no dense point, or if the points of one model were scored on different tasks.
    """
    _check_unique(points)
    dense = {point.model: point for point in points if point.method == DENSE}
    order = {method: place for place, method in enumerate(dict.fromkeys(point.method for point in points))}
    rows = []
    for point in sorted(points, key=lambda p: (p.model, p.method != DENSE, p.ratio, p.k_max, p.calib,
                                              _sparse(p), order[p.method])):
        if point.model not in dense:
            raise TableError(f"no dense point for model {point.model!r}; evaluate the dense model on the same tasks")
        rows.append(_summary_row(point, dense[point.model]))
    return pd.DataFrame(rows, columns=list(SUMMARY))


def _sparse(point: Point) -> bool:
    return point.facts is not None and point.facts.params_zeroed > 0


def _summary_row(point: Point, dense: Point) -> dict[str, Any]:
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
        mine, theirs = (main_scores(p.scores.scores, PRIMARY[kind]) for p in (point, dense))
        if set(mine) != set(theirs):
            raise TableError(f"{_name(point)} was scored on {_names(mine)} but the dense {point.model} on "
                             f"{_names(theirs)}; evaluate both on the same tasks")
        row |= _accuracy(mine, theirs) if kind == "acc" else _perplexity(mine, theirs)
    return row


def _accuracy(mine: Mapping[str, Score], theirs: Mapping[str, Score]) -> dict[str, float]:
    values, errors = _values(mine), _errors(mine)
    acc, acc_stderr = _mean(values), independent_mean(errors)
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
    return {"ppl": mean, "ppl_stderr": mean * independent_mean(relative), "ppl_ratio": mean / dense_mean,
            "ppl_ratio_stderr": mean / dense_mean * independent_mean(relative),
            "rp_ppl": retained_ppl(words, dense_words) if words else math.nan,
            "rp_ppl_stderr": 100 * independent_mean(ratios)}


def _relative(mine: Mapping[str, Score], theirs: Mapping[str, Score],
              tasks: Sequence[str]) -> tuple[list[float], list[float], list[float]]:
    """Three lists for `tasks`: the model's perplexities, the dense model's perplexities, and the relative errors of the
    model's perplexities."""
    ppl = _values({task: mine[task] for task in tasks})
    errors = _errors({task: mine[task] for task in tasks})
    # d log ppl = d ppl / ppl
    return (ppl, _values({task: theirs[task] for task in tasks}),
            [error / value for error, value in zip(errors, ppl, strict=True)])


def retained(pruned: float, dense: float) -> float:
    """Retained performance in percent: the ratio of two mean accuracies (paper, Table 1: SLEB 47.02 / 59.14 = 79.5)."""
    # RP = 100 * mean_t acc_t / mean_t acc_t^dense
    return 100 * pruned / dense if dense else math.nan


def retained_ppl(pruned: Sequence[float], dense: Sequence[float], *,
                 reading: Literal["mean_of_ratios", "ratio_of_sums"] = "mean_of_ratios") -> float:
    """RP(PPL) in percent. The perplexities in `pruned` and `dense` belong to the same texts in the same order.

    The paper defines RP(PPL) in two ways. Table 7 takes the mean of dense / pruned (OPT-2.7B: mean(15.1/28.0,
    31.3/37.2) = 69.0). Table 2 takes the ratio of the sums (Streamline: 38.8 / 730.6 = 5.3). This library reports the
    mean of ratios, because one collapsed text would outweigh all other texts in the ratio of sums.
    """
    if reading == "mean_of_ratios":
        return 100 * _mean([d / p for p, d in zip(pruned, dense, strict=True)])
    return 100 * sum(dense) / sum(pruned)


def main_scores(scores: Sequence[Score], metrics: Sequence[str]) -> dict[str, Score]:
    """For each task, the score in the first of `metrics` that the task has. The tasks are sorted by name.

    If a group has a score with a metric of `metrics`, the members of the group are left out.
    """
    best: dict[str, Score] = {}
    for score in scores:
        if score.metric not in metrics:
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


def _check_unique(points: Sequence[Point]) -> None:
    seen: set[tuple[Any, ...]] = set()
    for point in points:
        if point[:5] in seen:
            raise TableError(f"{_name(point)} was given twice; give each grid point once")
        seen.add(point[:5])


def _name(point: Point) -> str:
    return "/".join(str(part) for part in point[:5])


def _names(scores: Mapping[str, Score]) -> str:
    return ", ".join(f"{score.task}:{score.metric}" for score in scores.values()) or "no such task"
