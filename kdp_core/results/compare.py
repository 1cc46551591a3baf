"""What can be told apart: models compared on the same items, and one row over several calibration seeds.

All models answer the same items, so errors of a difference are those of the items' differences, not of two unrelated
means: easy and hard items hit both models alike and drop out.
    one accuracy task     McNemar's exact test with the mid p-value (Fagerland et al. 2013)
    several, `all`        the plain mean over tasks; p by a paired bootstrap, items drawn anew within each task
    perplexity            difference of nats per token over windows or documents, standard error by the delta method,
                          Student's t; `all` is the mean over texts, as the geometric mean of perplexities
A task whose items are no zeros and ones is bootstrapped too. Items count as independent; neighbouring windows of one
text are not quite, so perplexities are told apart a little too readily. p-values are corrected by Holm's method within
one question of one group (who differs from the best? from the baseline? from the dense model?); those of all other
pairs stand uncorrected, for tables that ask their own.
"""
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from kdp_core.base.records import Score, Scores
from kdp_core.results import tables
from kdp_core.results.tables import DENSE, KEYS, PRIMARY, Column, holm, main_scores

logger = logging.getLogger(__name__)

ALL = "all"
"""The task name of the mean over tasks."""
DRAWS = 10_000
CELLS = 4_000_000
"""Random counts in memory at once."""
COLUMNS = (*KEYS, "other", "other_calib", "other_k_max", "against", "metric", "task", "difference", "stderr", "p",
           "p_holm", "unit", "test", "items")


class CompareError(ValueError):
    """Models cannot be compared item by item."""


class Outcomes(NamedTuple):
    """One model's outcome on each item of one task."""
    task: str
    metric: str
    kind: str
    """`acc` or `ppl`, as in tables.PRIMARY."""
    ids: list[str]
    """One an item: file, number and hash of the item; the same for models that answered the same items."""
    values_I: np.ndarray
    """Accuracy, or log-likelihood in nats; NaN where the model gave no number."""
    weights_I: np.ndarray
    """Tokens (or words) of each item for perplexities, else ones."""


class Entry(NamedTuple):
    """One model of a comparison."""
    key: tuple[str, str, str, float, int]
    """Model, calib, method, ratio, k_max, as in tables.KEYS."""
    zeros: bool
    """Whether it holds zeros instead of fewer weights: such models are compared among themselves."""
    outcomes: list[Outcomes]


# From disk ------------------------------------------------------------------------------------------------------------

def read_outcomes(folder: str | Path, scores: Scores, *, primary: Mapping[str, Sequence[str]] = PRIMARY,
                  tasks: Sequence[str] | None = None) -> list[Outcomes]:
    """Outcomes on all tasks that count in a summary, by name, from the samples that an evaluation writes.

    The items of a group's tasks stand together under the group's name where the group has the score that counts.
    Raises CompareError where items are missing or are more or fewer than the score's.
    """
    found = []
    for kind, metrics in primary.items():
        for task, score in main_scores(scores.scores, metrics, tasks).items():
            parts = [_read_part(Path(folder) / f"{name}.jsonl", score.metric)
                     for name in _members(task, scores.scores)]
            rows = list(itertools.chain.from_iterable(parts))
            if len(rows) != score.items:
                raise CompareError(f"{folder} holds {len(rows)} items of {task}, its score is of {score.items}; "
                                   "evaluate this model again")
            pairs = np.array([pair for _, pair in rows], dtype=float)
            found.append(Outcomes(task, score.metric, kind, [name for name, _ in rows], pairs[:, 0], pairs[:, 1]))
    return found


def _members(task: str, scores: Sequence[Score]) -> list[str]:
    """The names of the sample files of a task, or of those below a group: `law` for mmlu/law."""
    known = sorted({score.task for score in scores})
    below = [name for name in known if name.startswith(f"{task}/")]
    # a group within a group has a score and no items
    leaves = [name for name in below if not any(other.startswith(f"{name}/") for other in below)]
    return [name.rsplit("/", 1)[-1] for name in leaves or [task]]


def _read_part(path: Path, metric: str) -> Iterator[tuple[str, tuple[float, float]]]:
    """(id, (value, weight)) an item, of the first of lm-eval's filters that has the metric."""
    if not path.is_file():
        raise CompareError(f"{path} does not exist; evaluate this model again, with its samples kept")
    chosen = None
    with path.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if metric in row and chosen in (None, row["filter"]):
                chosen = row["filter"]
                value, weight = row[metric] if isinstance(row[metric], list) else (row[metric], 1)
                yield f"{path.stem}:{row['doc_id']}:{row['doc_hash']}", (math.nan if value is None else value, weight)


# Comparisons ----------------------------------------------------------------------------------------------------------

def compare(entries: Sequence[Entry], *, baseline: str = "remove", draws: int = DRAWS, seed: int = 0) -> pd.DataFrame:
    """A row a pair of models of one model, ratio and kind of pruning, metric and task; columns as in COLUMNS.

    difference  the row's model less the other: share of items, or nats per token (below 0 is better)
    against     `best` by this metric and task, `baseline` (the same calib and k_max), `dense`, or nothing: any other
                pair, without p_holm
    Raises CompareError where two models of one model did not answer the same items.
    """
    rows: list[dict[str, Any]] = []
    for model in dict.fromkeys(entry.key[0] for entry in entries):
        own = [entry for entry in entries if entry.key[0] == model]
        _check_items(own)
        for kind in PRIMARY:
            tested = _test(own, kind, _pairs(own), draws, seed)
            for task, table in tested.items():
                rows += _rows(own, kind if task == ALL else table.metric, task, table, baseline)
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _pairs(entries: Sequence[Entry]) -> list[tuple[int, int]]:
    """The places (j, k), j < k, of all that is compared: models of one group, and each with the dense model."""
    groups = [(entry.key[3], entry.zeros) for entry in entries]
    dense = [entry.key[2] == DENSE for entry in entries]
    return [(j, k) for j, k in itertools.combinations(range(len(entries)), 2)
            if dense[j] or dense[k] or groups[j] == groups[k]]


class Table(NamedTuple):
    """All pairs of J models on one task: entry (j, k) is j less k."""
    metric: str
    means_J: np.ndarray
    """Accuracy or nats per token."""
    difference_JJ: np.ndarray
    stderr_JJ: np.ndarray
    p_JJ: np.ndarray
    """NaN where a bootstrap was not asked for."""
    unit: str
    test: str
    items: int


def _test(entries: Sequence[Entry], kind: str, pairs: Sequence[tuple[int, int]], draws: int,
          seed: int) -> dict[str, Table]:
    """Tables by task, `all` last, of the tasks of one kind."""
    by_task = {first.task: [next(o for o in entry.outcomes if o.kind == kind and o.task == first.task)
                            for entry in entries] for first in entries[0].outcomes if first.kind == kind}
    if not by_task:
        return {}
    values = {task: np.stack([o.values_I for o in outcomes], axis=1) for task, outcomes in by_task.items()}
    metrics = {task: outcomes[0].metric for task, outcomes in by_task.items()}
    if kind == "ppl":
        weights = {task: outcomes[0].weights_I for task, outcomes in by_task.items()}
        return perplexities(values, weights, metrics)
    return accuracies(values, metrics, pairs, draws=draws, seed=seed)


def accuracies(values: Mapping[str, np.ndarray], metrics: Mapping[str, str], pairs: Sequence[tuple[int, int]], *,
               draws: int = DRAWS, seed: int = 0) -> dict[str, Table]:
    """Tables of accuracy tasks, values_IJ of items and models by task, and of the plain mean over tasks.

    A pair's bootstrap depends on the outcomes of its two models and the seed, not on which others there are.
    """
    made, squares = {}, 0.0
    for task, values_IJ in values.items():
        items, _ = values_IJ.shape
        means_J = values_IJ.mean(axis=0)
        # var(d) = var(x) + var(y) - 2 cov(x, y), of d = x - y item by item
        cov_JJ = np.atleast_2d(np.cov(values_IJ, rowvar=False)) if items > 1 else np.full((len(means_J),) * 2, np.nan)
        var_JJ = np.diag(cov_JJ)[:, None] + np.diag(cov_JJ) - 2 * cov_JJ
        # a constant difference leaves a rounding error below 0
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
    """p_JJ of the mean over tasks, values_IJ by task, for these pairs."""
    models = next(iter(values.values())).shape[1]
    p_JJ = np.full((models, models), np.nan)
    np.fill_diagonal(p_JJ, 1.0)
    for j, k in pairs:
        p_JJ[j, k] = p_JJ[k, j] = bootstrap_p([values_IJ[:, j] - values_IJ[:, k] for values_IJ in values.values()],
                                              draws=draws, seed=seed)
    return p_JJ


def bootstrap_p(differences: Sequence[np.ndarray], *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p of a mean over tasks of mean differences, items resampled within each task."""
    observed = sum(d_I.mean() for d_I in differences) / len(differences)
    drawn_B = sum(resampled_means(d_I, draws, np.random.default_rng([seed, place]))
                  for place, d_I in enumerate(differences)) / len(differences)
    # p = (1 + #{|d* - d| >= |d|}) / (B + 1); equal sums may differ by rounding
    return float((1 + np.count_nonzero(np.abs(drawn_B - observed) >= abs(observed) - 1e-12)) / (draws + 1))


def resampled_means(values_I: np.ndarray, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Means of I items drawn with replacement, `draws` times.

    Equal values are one kind: how often each kind is drawn is multinomial, which for accuracies has three kinds.
    """
    kinds_U, counts_U = np.unique(values_I, return_counts=True)
    step = max(1, CELLS // len(kinds_U))
    parts = [rng.multinomial(len(values_I), counts_U / len(values_I), size=min(step, draws - start)) @ kinds_U
             for start in range(0, draws, step)]
    return np.concatenate(parts) / len(values_I)


def mcnemar(values_IJ: np.ndarray) -> np.ndarray:
    """Mid p-values of all pairs of models right (1) or wrong (0) on the same items."""
    # b_jk items that j has right and k wrong; X ~ Binomial(b_jk + b_kj, 1/2), x = min(b_jk, b_kj)
    b_JJ = values_IJ.T @ (1 - values_IJ)
    n_JJ, x_JJ = b_JJ + b_JJ.T, np.minimum(b_JJ, b_JJ.T)
    # p = 2 P(X < x) + P(X = x)
    return np.minimum(2 * stats.binom.cdf(x_JJ - 1, n_JJ, 0.5) + stats.binom.pmf(x_JJ, n_JJ, 0.5), 1.0)


def perplexities(values: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray],
                 metrics: Mapping[str, str]) -> dict[str, Table]:
    """Tables of perplexity tasks, log-likelihoods_IJ by task and the items' tokens_I; then of the mean over texts."""
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
    difference_JJ = _differences(nats_J)
    with np.errstate(invalid="ignore", divide="ignore"):
        p_JJ = 2 * stats.t.sf(np.abs(difference_JJ) / stderr_JJ, df_JJ)
    p_JJ = np.where(difference_JJ == 0, 1.0, np.where(stderr_JJ == 0, 0.0, p_JJ))
    # a model without a number on some item has collapsed: it is behind every one that has not
    lost_J = np.isnan(nats_J)
    behind_JJ = lost_J[:, None].astype(int) - lost_J
    difference_JJ = np.where(behind_JJ != 0, np.copysign(np.inf, behind_JJ), difference_JJ)
    return Table(metric, np.where(lost_J, np.inf, nats_J), difference_JJ, stderr_JJ,
                 np.where(behind_JJ != 0, 0.0, p_JJ), "nats/token", "t", items)


def _differences(values_J: np.ndarray) -> np.ndarray:
    return values_J[:, None] - values_J


def _check_items(entries: Sequence[Entry]) -> None:
    """The models of one model must have answered the same items of the same tasks, of the same lengths."""
    first = entries[0]
    known = {(o.kind, o.task): o for o in first.outcomes}
    for entry in entries[1:]:
        theirs = {(o.kind, o.task): o for o in entry.outcomes}
        both = f"{_name(first)} and {_name(entry)}"
        if set(theirs) != set(known):
            odd = sorted(set(theirs) ^ set(known))[0]
            raise CompareError(f"of {both} one alone was scored on {odd[1]}; evaluate both on the same tasks")
        for place, outcomes in theirs.items():
            other = known[place]
            if outcomes.ids != other.ids or not np.array_equal(outcomes.weights_I, other.weights_I):
                odd = next((f"item {mine.split(':')[1]}" for mine, their in zip(other.ids, outcomes.ids, strict=False)
                            if mine != their), f"{len(other.ids)} and {len(outcomes.ids)} items, or their lengths")
                raise CompareError(f"{both} did not answer the same items of {outcomes.task} ({odd} differ); evaluate "
                                   "both on the same data with the same limit")


def _name(entry: Entry) -> str:
    return "/".join(str(part) for part in entry.key)


# As rows --------------------------------------------------------------------------------------------------------------

def _rows(entries: Sequence[Entry], metric: str, task: str, table: Table, baseline: str) -> list[dict[str, Any]]:
    """The pairs of every group of one model, on one task."""
    places = {entry.key: place for place, entry in enumerate(entries)}
    dense = next((place for place, entry in enumerate(entries) if entry.key[2] == DENSE), None)
    rows = []
    groups = dict.fromkeys((entry.key[3], entry.zeros) for entry in entries if entry.key[2] != DENSE)
    for ratio, zeros in groups:
        group = [place for place, entry in enumerate(entries)
                 if (entry.key[3], entry.zeros) == (ratio, zeros) and entry.key[2] != DENSE]
        better = -1 if table.unit == "share" else 1
        # the first of equal ones
        best = min(group, key=lambda place: better * table.means_J[place])
        families = {"best": [(place, best) for place in group if place != best],
                    "baseline": [(place, other) for place in group
                                 if entries[place].key[2] != baseline and
                                 (other := places.get(_with_method(entries[place].key, baseline))) in group],
                    "dense": [(place, dense) for place in group if dense is not None]}
        taken = {frozenset(pair) for pairs in families.values() for pair in pairs}
        families[""] = [pair for pair in itertools.combinations(group, 2) if frozenset(pair) not in taken]
        for against, pairs in families.items():
            raw = [float(table.p_JJ[pair]) for pair in pairs]
            corrected = holm(raw) if against else [math.nan] * len(raw)
            rows += [_row(entries, metric, task, table, pair, against, p, p_holm)
                     for pair, p, p_holm in zip(pairs, raw, corrected, strict=True)]
    return rows


def _with_method(key: tuple[str, str, str, float, int], method: str) -> tuple[str, str, str, float, int]:
    return (key[0], key[1], method, key[3], key[4])


def _row(entries: Sequence[Entry], metric: str, task: str, table: Table, pair: tuple[int, int], against: str,
         p: float, p_holm: float) -> dict[str, Any]:
    mine, other = (entries[place].key for place in pair)
    return dict(zip(KEYS, mine, strict=True)) | {
        "other": other[2], "other_calib": other[1], "other_k_max": other[4], "against": against, "metric": metric,
        "task": task, "difference": float(table.difference_JJ[pair]), "stderr": float(table.stderr_JJ[pair]), "p": p,
        "p_holm": p_holm, "unit": table.unit, "test": table.test, "items": table.items}


# Over calibration seeds -----------------------------------------------------------------------------------------------

SPREAD = ("params_removed", "acc", "rp", "ppl", "ppl_ratio")
SEED_COLUMNS: dict[str, Column] = {
    "seeds": Column("Seeds", "", "Calibration seeds that were run.", 0),
    "params_removed": tables.COLUMNS["params_removed"]._replace(stderr="params_removed_spread"),
    **{name: tables.COLUMNS[name]._replace(stderr=f"{name}_spread", better=0) for name in ("acc", "rp", "ppl")},
    "acc_stderr": Column("Item error", "%", "Standard error of one seed's accuracy, over items.", 1, 100),
    "ppl_stderr": Column("Item error (ppl)", "", "Standard error of one seed's perplexity, over items.", 2),
}
SEED_NOTE = ("Mean over calibration seeds ± standard deviation between them. The item errors are those of one seed, "
             "over the items of the tasks, which are the same for all seeds. Nothing is marked: a few seeds do not "
             "tell methods apart. †: fine-tuned after pruning.")


def over_seeds(summary: pd.DataFrame, families: Mapping[str, str]) -> pd.DataFrame:
    """A row a method, ratio and k_max of calibration sets that differ in their seed alone, dense rows as they are.

    `families` names the set that each of them is a seed of. Mean and `<name>_spread`, the standard deviation between
    seeds (S - 1 in the denominator), of the columns in SPREAD; acc_stderr and ppl_stderr are root mean squares of
    those of the seeds. Points of one seed alone are left out.
    """
    pruned = summary[summary["calib"].isin(list(families)) & (summary["method"] != DENSE)]
    pruned = pruned.assign(calib=pruned["calib"].map(families))
    rows = [row | {"seeds": 1} for row in summary[summary["method"] == DENSE].to_dict("records")]
    for _, group in pruned.groupby([*KEYS], sort=False):
        if len(group) > 1:
            first = group.iloc[0]
            rows.append({key: first[key] for key in KEYS} | {"seeds": len(group), "finetuned": first["finetuned"],
                                                             "params_zeroed": group["params_zeroed"].mean()} |
                        {name: group[name].mean() for name in SPREAD} |
                        {f"{name}_spread": group[name].std(ddof=1) for name in SPREAD} |
                        {name: math.sqrt((group[name] ** 2).mean()) for name in ("acc_stderr", "ppl_stderr")})
    names = [*KEYS, "seeds", *(column for name in SPREAD for column in (name, f"{name}_spread")), "acc_stderr",
             "ppl_stderr", "finetuned", "params_zeroed"]
    return pd.DataFrame(rows, columns=names).sort_values("model", kind="stable", ignore_index=True)


def render_seeds(frame: pd.DataFrame, format: Literal["csv", "md", "tex"]) -> str:
    """The frame of `over_seeds` as text, by tables.render."""
    return tables.render(frame, format, columns=list(SEED_COLUMNS), known=SEED_COLUMNS, note=SEED_NOTE, wide=True,
                         caption="Mean over calibration seeds and spread between them.", label="tab:seeds")
