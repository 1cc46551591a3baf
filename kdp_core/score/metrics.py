"""Metrics of tasks: which metric counts, and the metrics that lm-eval lacks. This module needs neither lm-eval nor
torch.

    ppl   exp(-sum_i ll_i / sum_i n_i), with the log-likelihood ll_i (nats) and the weight n_i (tokens, words) of item i
    auc   the share of pairs of a good and a bad item that a margin orders rightly (Mann and Whitney 1947)
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

PRIMARY: Mapping[str, Sequence[str]] = {
    "acc": ("acc_norm", "acc", "exact_match", "em"),
    "ppl": ("ppl", "word_perplexity"),
}
"""For each kind of score, the metrics that count, first choice first. A task counts once, with the first that it has.

Accuracy is acc_norm where the task has it (HellaSwag, ARC, PIQA) and acc elsewhere (WinoGrande, BoolQ, MMLU). Papers
mix the two. This choice alone changes a mean by points. Shares of another kind do not count: ROUGE-1 is an overlap,
and pass@1 and areas under the curve have other scales of chance. A metric `perplexity` (of LAMBADA's last words) is
not one of text and does not count either. Perplexities per token and per word are never averaged: the summary's `ppl`
takes those per token where there are any, and `rp_ppl` takes those per word, as the paper does."""
PERPLEXITIES = ("ppl", "perplexity", "word_perplexity", "byte_perplexity")
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "auc", "rouge1", "pass@1")
PPL_CEILING = 1e12
"""This value is recorded, without a standard error, for a perplexity that is larger or not a number. JSON has no
infinity, and a collapsed model should be at the end of a table, not missing from it."""
OVERFLOW = 700.0
"""Nats of a unit of weight above which exp is no float."""


def unit_of(metric: str) -> str:
    """The unit of a metric's values: ppl, bits/byte or share; `score` for a metric that this module does not know."""
    if metric in PERPLEXITIES:
        return "ppl"
    if metric == "bits_per_byte":
        return "bits/byte"
    return "share" if metric in SHARES else "score"


def ppl(items: list[Any]) -> float:
    """Perplexity of items (log-likelihood in nats, weight), or of log-likelihoods of weight 1.

    The result is infinite if it is too large for a float, and NaN if an item is NaN.
    """
    # ppl = exp(-sum_i ll_i / sum_i n_i)
    nats = nats_per_unit(items)
    return math.exp(nats) if not nats > OVERFLOW else math.inf


def nats_per_unit(items: list[Any]) -> float:
    """Mean negative log-likelihood of a unit of weight in nats, the exponent of `ppl`."""
    pairs = as_pairs(items)
    return -sum(ll for ll, _ in pairs) / sum(weight for _, weight in pairs)


def as_pairs(items: list[Any]) -> list[tuple[float, float]]:
    """Items as (log-likelihood, weight); a bare number has weight 1."""
    return [(item[0], item[1]) if isinstance(item, list | tuple) else (float(item), 1.0) for item in items]


def auc(items: Sequence[tuple[float, int]]) -> float:
    """Share of the pairs of one good and one bad item that the margin orders rightly; a tie counts half.

    An item is (margin, label), and label 1 is good. Without such a pair the result is NaN.
    """
    good, _ = placements(items)
    return sum(good) / len(good) if good else math.nan


def placements(items: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """For each good item the share of bad items below it, and for each bad item the share of good items above it.

    Both lists are empty if all items are good or all are bad. DeLong et al. (1988) call them structural components.
    """
    good, bad = ([margin for margin, label in items if bool(label) is kind] for kind in (True, False))
    if not good or not bad:
        return [], []

    def above(high: float, low: float) -> float:
        return 1.0 if high > low else 0.5 if high == low else 0.0

    return ([sum(above(high, low) for low in bad) / len(bad) for high in good],
            [sum(above(high, low) for high in good) / len(good) for low in bad])
