"""How far searches for layers agree: between objectives, between searches, and between draws of calibration text.

"Rethinking Layer Redundancy in Large Language Models" (arXiv 2604.24938) makes three claims. The objective decides
which layers appear redundant. Different searches with the same objective agree. Ranks by perplexity and by accuracy
often differ. Here each claim becomes a number, which is measured once for each draw of calibration text:
    Jaccard(A, B) = |A and B| / |A or B| of two chosen sets,
    Spearman of the rises of the objective at single removals, and of ranks of pruned models.
Intervals are Student's t intervals over the draws. A claim is decided only if its interval does not contain zero. An
interval needs at least two draws. Each row is a mapping with the keys objective, strategy, draw, single (layer -> rise)
and removed. Each row also has the held-out figures of the pruned model: heldout_nats (lower is better) and
heldout_accuracy (higher is better).
"""
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

Row = Mapping[str, Any]
KEYS = ("objective", "strategy", "draw")
CONFIDENCE = 0.95


def jaccard(one: Iterable[int], other: Iterable[int]) -> float:
    """Number of layers that both sets have, divided by the number of layers in their union; 1 for two empty sets."""
    one, other = set(one), set(other)
    return len(one & other) / len(one | other) if one | other else 1.0


def spearman(one: Mapping[Any, float], other: Mapping[Any, float]) -> float | None:
    """Rank correlation over the keys that both mappings have. The result is None if the mappings have fewer than three
    keys in common, or if one mapping is constant over the common keys."""
    common = sorted(set(one) & set(other))
    values = [[which[key] for key in common] for which in (one, other)]
    return rank_correlation(*map(np.array, values)) if len(common) > 2 else None


def rank_correlation(first_N: np.ndarray, second_N: np.ndarray) -> float | None:
    """Spearman's rank correlation. The result is None if one of the arrays is constant, because a constant has no
    order."""
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return None
    return float(np.corrcoef(stats.rankdata(first_N), stats.rankdata(second_N))[0, 1])


def pairs(rows: Sequence[Row]) -> pd.DataFrame:
    """All pairs of rows that differ in exactly one of objective, strategy and draw, with the Jaccard index and
    Spearman's correlation of each pair."""
    found = []
    for one, other in itertools.combinations(rows, 2):
        differs = [key for key in KEYS if one[key] != other[key]]
        if len(differs) == 1:
            same = {key: one[key] for key in KEYS if key != differs[0]}
            found.append({"varies": differs[0], "one": one[differs[0]], "other": other[differs[0]], **same,
                          "jaccard": jaccard(one["removed"], other["removed"]),
                          "spearman": spearman(one["single"], other["single"])})
    return pd.DataFrame(found, columns=["varies", "one", "other", *KEYS, "jaccard", "spearman"])


def interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean and 95 % interval by Student's t, as (mean, low, high); None for fewer than two values."""
    if len(values) < 2:
        return None
    mean, error = float(pd.Series(values).mean()), float(pd.Series(values).sem())
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return mean, mean - half, mean + half


def claims(rows: Sequence[Row]) -> pd.DataFrame:
    """For each claim of the paper: its number in every draw, the mean of these numbers with an interval, and the
    verdict.

    Each number is a difference, and the claim holds if this difference is above zero.
    """
    draws = sorted({row["draw"] for row in rows})
    by_draw = {draw: [row for row in rows if row["draw"] == draw] for draw in draws}
    told = {
        "objectives choose different layers: sets of two draws share more than sets of two objectives":
            [_difference(_mean_jaccard(rows, "draw", draw), _mean_jaccard(by_draw[draw], "objective"))
             for draw in draws],
        "searches agree more than objectives: sets of two searches share more than sets of two objectives":
            [_difference(_mean_jaccard(by_draw[draw], "strategy"), _mean_jaccard(by_draw[draw], "objective"))
             for draw in draws],
        "perplexity and accuracy rank models differently: 0.5 - Spearman of the two":
            [_difference(0.5, _ranks(by_draw[draw])) for draw in draws],
        "a longer search is not worth it: held-out nats of the longer searches above those of one_shot":
            [_longer(by_draw[draw]) for draw in draws],
    }
    return pd.DataFrame([_verdict(claim, [value for value in values if value is not None])
                         for claim, values in told.items()])


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _mean_jaccard(rows: Sequence[Row], varies: str, draw: int | None = None) -> float | None:
    """Mean Jaccard index over the pairs of rows that differ only in `varies`.

    If `draw` is given, only the pairs with this draw are used.
    """
    frame = pairs(rows)
    frame = frame[frame["varies"] == varies]
    if draw is not None:
        frame = frame[(frame["one"] == draw) | (frame["other"] == draw)]
    return float(frame["jaccard"].mean()) if len(frame) else None


def _ranks(rows: Sequence[Row]) -> float | None:
    """Spearman's correlation of two rankings of the pruned models: by perplexity and by accuracy. The correlation is 1
    if both measures order the models alike."""
    nats = {(row["objective"], row["strategy"]): -row["heldout_nats"] for row in rows}
    return spearman(nats, {(row["objective"], row["strategy"]): row["heldout_accuracy"] for row in rows})


def _longer(rows: Sequence[Row]) -> float | None:
    """Mean over objectives of a difference in held-out loss: the other searches minus one_shot. Random search is left
    out."""
    found = []
    for row in rows:
        others = [one["heldout_nats"] for one in rows if one["objective"] == row["objective"]
                  and one["strategy"] not in ("one_shot", "random")]
        if row["strategy"] == "one_shot" and others:
            found.append(sum(others) / len(others) - row["heldout_nats"])
    return sum(found) / len(found) if found else None


def _verdict(claim: str, values: Sequence[float]) -> dict[str, Any]:
    known = interval(values)
    mean, low, high = known or (sum(values) / len(values) if values else math.nan, math.nan, math.nan)
    told = "holds" if low > 0 else "does not hold" if high < 0 else "cannot be told here"
    return {"claim": claim, "draws": len(values), "mean": mean, "low": low, "high": high, "told": told}
