"""Metrics of tasks: the primary metric of each task, and the metrics that lm-eval lacks. This module needs neither
lm-eval nor torch.

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
"""For each kind of score, its primary metrics in the order of preference. Each task contributes one score: that of the
first metric in the list that the task has.

The accuracy of a task is acc_norm if the task has this metric (HellaSwag, ARC, PIQA), and acc otherwise (WinoGrande,
BoolQ, MMLU). Papers mix the two. The choice between acc_norm and acc alone changes a mean by several points. Other
shares are not accuracies: ROUGE-1 is an overlap, and chance gives other values of pass@1 and of areas under the curve.
The metric `perplexity` (of LAMBADA's last words) is not the perplexity of a text, so it is not used either.
Perplexities per token and per word are never averaged together. The summary's `ppl` uses perplexities per token if
there are any, and `rp_ppl` uses perplexities per word, as the paper does."""
PERPLEXITIES = ("ppl", "perplexity", "word_perplexity", "byte_perplexity")
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "auc", "rouge1", "pass@1")
PPL_CEILING = 1e12
"""If a perplexity is larger than this value, or is NaN, this value is recorded without a standard error. JSON has no
infinity. A collapsed model should come last in a table and not be missing."""
OVERFLOW = 700.0
"""Nats per unit of weight; exp of a larger number is too large for a float."""


def unit_of(metric: str) -> str:
    """The unit of a metric's values: ppl, bits/byte or share. A metric that this module does not know has the unit
    `score`."""
    if metric in PERPLEXITIES:
        return "ppl"
    if metric == "bits_per_byte":
        return "bits/byte"
    return "share" if metric in SHARES else "score"


def ppl(items: list[Any]) -> float:
    """Perplexity of items (log-likelihood in nats, weight). An item may also be a log-likelihood alone, with weight 1.

    The result is infinite if it is too large for a float, and NaN if one item is NaN.
    """
    # ppl = exp(-sum_i ll_i / sum_i n_i)
    nats = nats_per_unit(items)
    return math.exp(nats) if not nats > OVERFLOW else math.inf


def nats_per_unit(items: list[Any]) -> float:
    """Mean negative log-likelihood in nats per unit of weight (such as a token). `ppl` is exp of this mean."""
    pairs = as_pairs(items)
    return -sum(ll for ll, _ in pairs) / sum(weight for _, weight in pairs)


def as_pairs(items: list[Any]) -> list[tuple[float, float]]:
    """Items as (log-likelihood, weight). An item that is a single number gets weight 1."""
    return [(item[0], item[1]) if isinstance(item, list | tuple) else (float(item), 1.0) for item in items]


def auc(items: Sequence[tuple[float, int]]) -> float:
    """Share of the pairs (good item, bad item) in which the good item has the larger margin. A tie counts as half a
    pair.

    An item is (margin, label), with label 1 for a good item. If there are no pairs of good and bad items, the result is
    NaN.
    """
    good, _ = placements(items)
    return sum(good) / len(good) if good else math.nan


def placements(items: Sequence[tuple[float, int]]) -> tuple[list[float], list[float]]:
    """For each good item, the share of bad items with a smaller margin; for each bad item, the share of good items with
    a larger margin.

    Both lists are empty if all items are good or all items are bad. DeLong et al. (1988) call these shares structural
    components.
    """
    good, bad = ([margin for margin, label in items if bool(label) is kind] for kind in (True, False))
    if not good or not bad:
        return [], []

    def above(high: float, low: float) -> float:
        return 1.0 if high > low else 0.5 if high == low else 0.0

    return ([sum(above(high, low) for low in bad) / len(bad) for high in good],
            [sum(above(high, low) for high in good) / len(good) for low in bad])
