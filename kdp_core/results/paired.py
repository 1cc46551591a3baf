"""Paired tests of models that answered the same items: for each task, and for the mean over tasks.

Axes: I items, J models, U distinct values, B draws of the bootstrap.
"""
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

ALL = "all"
"""The name that stands for the mean over tasks in the column of tasks."""
DRAWS = 10_000
CELLS = 4_000_000
"""Largest number of random counts in memory at the same time."""
SIGNIFICANT = 0.05
"""Two models differ significantly if their corrected p is below this limit."""


class Table(NamedTuple):
    """The comparison of all pairs of J models on one task. Entry (j, k) of a matrix is the value of model j minus the
    value of model k."""
    metric: str
    means_J: np.ndarray
    """Mean of each model: accuracy, or nats per token."""
    difference_JJ: np.ndarray
    stderr_JJ: np.ndarray
    p_JJ: np.ndarray
    """p of each pair. An entry is NaN if no bootstrap was requested for the pair."""
    unit: str
    test: str
    items: int


# Accuracies -----------------------------------------------------------------------------------------------------------

def accuracies(values: Mapping[str, np.ndarray], metrics: Mapping[str, str], pairs: Sequence[tuple[int, int]], *,
               draws: int = DRAWS, seed: int = 0) -> dict[str, Table]:
    """Tables of the accuracy tasks and of the plain mean over tasks. For each task, `values` has the values of all
    items and models, values_IJ.

    The bootstrap of a pair depends only on the outcomes of its two models and on the seed.
    """
    made, squares = {}, 0.0
    for task, values_IJ in values.items():
        items, _ = values_IJ.shape
        means_J = values_IJ.mean(axis=0)
        # var(d) = var(x) + var(y) - 2 cov(x, y), of d = x - y item by item
        cov_JJ = np.atleast_2d(np.cov(values_IJ, rowvar=False)) if items > 1 else np.full((len(means_J),) * 2, np.nan)
        var_JJ = np.diag(cov_JJ)[:, None] + np.diag(cov_JJ) - 2 * cov_JJ
        # for a constant difference, rounding can give a value below 0
        stderr_JJ = np.sqrt(np.clip(var_JJ, 0, None) / items)
        squares = squares + stderr_JJ ** 2
        exact = bool(np.isin(values_IJ, (0, 1)).all())
        p_JJ = mcnemar(values_IJ) if exact else _bootstrap({task: values_IJ}, pairs, draws, seed)
        made[task] = Table(metrics[task], means_J, _differences(means_J), stderr_JJ, p_JJ, "share",
                           "mcnemar" if exact else "bootstrap", items)
    means_J = np.mean([table.means_J for table in made.values()], axis=0)
    # se(mean) = sqrt(sum se^2) / n
    return made | {ALL: Table("acc", means_J, _differences(means_J), np.sqrt(squares) / len(made),
                              _bootstrap(values, pairs, draws, seed), "share", "bootstrap",
                              sum(table.items for table in made.values()))}


def _bootstrap(values: Mapping[str, np.ndarray], pairs: Sequence[tuple[int, int]], draws: int, seed: int) -> np.ndarray:
    """p of each pair of `pairs` for the mean over tasks, as a matrix p_JJ. `values` has one array values_IJ for each
    task."""
    models = next(iter(values.values())).shape[1]
    p_JJ = np.full((models, models), np.nan)
    np.fill_diagonal(p_JJ, 1.0)
    for j, k in pairs:
        p_JJ[j, k] = p_JJ[k, j] = bootstrap_p([values_IJ[:, j] - values_IJ[:, k] for values_IJ in values.values()],
                                              draws=draws, seed=seed)
    return p_JJ


def bootstrap_p(differences: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p of the mean of the tasks' differences. Items are resampled within each task."""
    observed = sum(d_I.mean() for d_I in differences) / len(differences)
    drawn_B = sum(resampled_means(d_I, draws, np.random.default_rng([seed, place]))
                  for place, d_I in enumerate(differences)) / len(differences)
    # p = (1 + #{|d* - d| >= |d|}) / (B + 1); equal sums may differ by rounding
    return float((1 + np.count_nonzero(np.abs(drawn_B - observed) >= abs(observed) - 1e-12)) / (draws + 1))


def resampled_means(values_I: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of `draws` bootstrap samples (B). Each sample draws I items with replacement.

    Only the counts of the distinct values are drawn, from a multinomial distribution. The difference of two models'
    accuracies on one item is -1, 0 or 1, so there are only three distinct values.
    """
    kinds_U, counts_U = np.unique(values_I, return_counts=True)
    step = max(1, CELLS // len(kinds_U))
    parts = [rng.multinomial(len(values_I), counts_U / len(values_I), size=min(step, draws - start)) @ kinds_U
             for start in range(0, draws, step)]
    return np.concatenate(parts) / len(values_I)


def mcnemar(values_IJ: np.ndarray) -> np.ndarray:
    """Mid p-values of all pairs of models. A value is 1 if a model answers an item correctly, and 0 if not."""
    from scipy import stats  # the import takes half a second, and pages that only print tables do not need it

    # b_jk items that j has right and k wrong; X ~ Binomial(b_jk + b_kj, 1/2), x = min(b_jk, b_kj)
    b_JJ = values_IJ.T @ (1 - values_IJ)
    n_JJ, x_JJ = b_JJ + b_JJ.T, np.minimum(b_JJ, b_JJ.T)
    # p = 2 P(X < x) + P(X = x)
    return np.minimum(2 * stats.binom.cdf(x_JJ - 1, n_JJ, 0.5) + stats.binom.pmf(x_JJ, n_JJ, 0.5), 1.0)


# Perplexities ---------------------------------------------------------------------------------------------------------

def perplexities(values: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray],
                 metrics: Mapping[str, str]) -> dict[str, Table]:
    """Tables of the perplexity tasks and of the mean over texts.

    `values` has log-likelihoods_IJ for each task, and `weights` has the number of tokens of each item.
    """
    made, squares, fourths, total = {}, 0.0, 0.0, 0.0
    for task, ll_IJ in values.items():
        tokens_I = weights[task]
        items = len(tokens_I)
        # L_j = -sum_i ll_ij / sum_i n_i; an item's part of L_j - L_k: e_i = -(ll_ij - ll_ik) - (L_j - L_k) n_i
        nats_J = -ll_IJ.sum(axis=0) / tokens_I.sum()
        residual_IJ = -ll_IJ - nats_J * tokens_I[:, None]
        # se(L_j - L_k) = sqrt(I / (I - 1) sum_i e_i^2) / sum_i n_i
        gram_JJ = residual_IJ.T @ residual_IJ
        square_JJ = np.clip(np.diag(gram_JJ)[:, None] + np.diag(gram_JJ) - 2 * gram_JJ, 0, None)
        var_JJ = square_JJ * items / (items - 1) / tokens_I.sum() ** 2 if items > 1 else np.full_like(gram_JJ, np.nan)
        squares, fourths, total = squares + var_JJ, fourths + var_JJ ** 2 / max(items - 1, 1), total + nats_J
        made[task] = _t_table(metrics[task], nats_J, np.sqrt(var_JJ), np.full_like(var_JJ, items - 1), items)
    tasks = len(made)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Welch and Satterthwaite: df = (sum s_t^2)^2 / sum(s_t^4 / df_t)
        df_JJ = squares ** 2 / fourths
    return made | {ALL: _t_table("ppl", total / tasks, np.sqrt(squares) / tasks, df_JJ,
                                 sum(table.items for table in made.values()))}


def _t_table(metric: str, nats_J: np.ndarray, stderr_JJ: np.ndarray, df_JJ: np.ndarray, items: int) -> Table:
    from scipy import stats

    difference_JJ = _differences(nats_J)
    with np.errstate(invalid="ignore", divide="ignore"):
        p_JJ = 2 * stats.t.sf(np.abs(difference_JJ) / stderr_JJ, df_JJ)
    p_JJ = np.where(difference_JJ == 0, 1.0, np.where(stderr_JJ == 0, 0.0, p_JJ))
    # a model without a number on some item has collapsed: it ranks behind every model that has a number on all items
    lost_J = np.isnan(nats_J)
    behind_JJ = lost_J[:, None].astype(int) - lost_J
    difference_JJ = np.where(behind_JJ != 0, np.copysign(np.inf, behind_JJ), difference_JJ)
    return Table(metric, np.where(lost_J, np.inf, nats_J), difference_JJ, stderr_JJ,
                 np.where(behind_JJ != 0, 0.0, p_JJ), "nats/token", "t", items)


def _differences(values_J: np.ndarray) -> np.ndarray:
    return values_J[:, None] - values_J


# Many tests -----------------------------------------------------------------------------------------------------------

def holm(p_values: Sequence[float]) -> list[float]:
    """p-values in the given order, corrected for the number of tests (Holm 1979). NaN stays NaN and is not counted as a
    test."""
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    corrected, above = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(order):
        # p_(i)' = max_{j <= i} min(1, (m - j + 1) p_(j))
        above = max(above, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = above
    return corrected
