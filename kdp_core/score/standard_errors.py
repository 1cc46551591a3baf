"""Standard errors: one function for each kind of figure. Scores, studies and tables use the same functions.

    mean              s / sqrt(n), with the sample standard deviation s
    independent_mean  a mean of figures whose errors are known and independent: sqrt(sum se^2) / n
    ratio             a ratio of two sums over sequences, to first order (linearised; Cochran 1977, section 2.11)
    nats, perplexity  a mean negative log-likelihood, as `ratio`; and its exponential, by the delta method
    auc               DeLong et al. (1988)
A function returns None if there are too few items for a standard error. The errors of plain means are computed by
lm-eval itself, in closed form. For metrics without a function in this module, lm-eval uses a bootstrap.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kdp_core.score.metrics import PPL_CEILING, as_pairs, nats_per_unit, placements

if TYPE_CHECKING:
    from torch import Tensor


def mean(values_N: Tensor) -> float | None:
    """Standard error of the mean of independent values, in the unit of the values; None for fewer than two values."""
    # se = s / sqrt(N)
    return values_N.std().item() / math.sqrt(len(values_N)) if len(values_N) > 1 else None


def independent_mean(errors: Sequence[float]) -> float:
    """Standard error of a mean of independent figures, computed from the figures' standard errors; NaN if there are no
    figures."""
    # se(mean) = sqrt(sum se^2) / n
    return math.sqrt(sum(error ** 2 for error in errors)) / len(errors) if errors else math.nan


def ratio(above_N: Tensor, below_N: Tensor, sequence_N: Tensor) -> float | None:
    """Standard error of a ratio of two sums over sequences (linearised); None with one sequence.

    above_N, below_N: each token's part of the numerator and of the denominator. sequence_N: the number of each token's
    sequence.
    Tokens of one sequence depend on each other, so the sequences are the independent items.
    """
    import torch  # imported here, because tables use only the other functions

    names, place_N = sequence_N.unique(return_inverse=True)
    if len(names) < 2:
        return None
    above_S, below_S = (torch.zeros(len(names), dtype=torch.float64, device=place_N.device).index_add_(
        0, place_N, value_N.double()) for value_N in (above_N, below_N))
    # sqrt(S / (S - 1) * sum (a - r b)^2) / sum b,  r = sum a / sum b
    rest_S = above_S - above_S.sum() / below_S.sum() * below_S
    return (rest_S.square().sum() * len(names) / (len(names) - 1)).sqrt().item() / below_S.sum().item()


def nats(items: list[Any]) -> float | None:
    """Standard error of `nats_per_unit` over W items (log-likelihood in nats, weight); None for a single item."""
    pairs = as_pairs(items)
    if len(pairs) < 2:
        return None
    level = nats_per_unit(items)
    # L = -sum_i ll_i / sum_i n_i,  se(L) = sqrt(W / (W - 1) * sum_i (-ll_i - L n_i)^2) / sum_i n_i
    squares = sum((-ll - level * weight) ** 2 for ll, weight in pairs)
    return math.sqrt(len(pairs) / (len(pairs) - 1) * squares) / sum(weight for _, weight in pairs)


def perplexity(items: list[Any]) -> float | None:
    """Standard error of `metrics.ppl` by the delta method; None for a single item, or if the perplexity is too
    large."""
    error = nats(items)
    if error is None:
        return None
    # d exp(L) = exp(L) dL
    level = nats_per_unit(items)
    return math.exp(level) * error if level < math.log(PPL_CEILING) else None


def auc(items: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of `metrics.auc` (DeLong et al. 1988). The error is None for fewer than two good or two bad items.

    An item is (margin, label), and label 1 is good.
    """
    kinds = placements(items)
    if min(map(len, kinds)) < 2:
        return None
    # se^2 = var(V_good) / n_good + var(V_bad) / n_bad, V the share of the other kind that an item is ordered against
    centres = [sum(kind) / len(kind) for kind in kinds]
    return math.sqrt(sum(sum((v - centre) ** 2 for v in kind) / (len(kind) - 1) / len(kind)
                         for kind, centre in zip(kinds, centres, strict=True)))
