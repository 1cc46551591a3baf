"""Predicts from single-step statistics, without generating text, whether a pruned model still generates.

The predicted losses are those of kdp_core.score.generation; the statistics are those of kdp_core.study.single_step:
    loss = 1 - exp(-sum_f w_f phi_f / s_f),    w_f >= 0
Here phi_f is statistic f as a length, and s_f is the scale of phi_f. KL and 1 - cosine are squares of small changes, so
their roots are used as lengths. If a pruned model equals the dense model, all its statistics are 0, and so is the
predicted loss. No weight is negative, so the predicted loss never falls when a statistic grows. The weights come from a
ridge regression of -log(1 - loss), solved exactly as non-negative least squares (SciPy). The penalty of the regression
is chosen by cross-validation, and each fold leaves out one group of methods. Validation leaves out one method with all
its ratios, fits on the other methods, and predicts the losses of the method that was left out. Two methods that made
the same model at some ratio, by removing the same layers, are left out together.
The function `chain` predicts the agreement without a fit, as a reference. The reference assumes that each token agrees
with probability a, and that the texts never agree again after the first difference. With a as the probability of
agreement, the expected share of equal tokens in G steps is sum_g a^g / G.
Axes: R rows, F features, M groups of methods.
"""
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdp_core.base import store
from kdp_core.base.measurements import Expectation, Predictor, SingleStep
from kdp_core.study.objectives import rank_correlation

logger = logging.getLogger(__name__)
FEATURES = {"kl": 0.5, "estimate_kl": 0.5, "disagreement": 1.0, "entropy_change": 1.0, "margin_lost": 1.0,
            "angle_h": 0.5, "angle_p": 0.5}
"""For each statistic, the power that turns it into a length."""
LOSSES = ("quality", "agreement", "lambada", "rouge1", "repetition")
"""The losses, in the order in which reports print them. `quality` is the mean of the other losses."""
PREFIX = "loss_"
"""The prefix in the names of the columns that contain losses."""
LENGTH = 40
"""Number of tokens of a window in the data of the library's predictor. With another number of tokens the predictions
may change."""
MOST = 0.95
"""The fit replaces larger losses by this value, because -log(1 - loss) has no upper limit."""
ALPHAS = (0.01, 0.1, 1.0, 10.0)
"""Penalties that are tried."""
DRAWS = 1000
"""Number of bootstrap samples. Each sample draws groups of methods."""
KEPT = 0.9
"""Share of the predictions for left-out methods that differ from the measured loss by at most the half-width of the
range."""
RECORD = Path(__file__).with_name("expect.json")
"""The predictor that comes with the library."""


class ExpectError(ValueError):
    """There are too few rows to fit a predictor, or the statistics do not match the predictor."""


# What is expected of a model ------------------------------------------------------------------------------------------

def expectation(measured: SingleStep, predictor: Predictor | None = None) -> Expectation:
    """The losses expected of a model with these statistics. Without `predictor`, the predictor that comes with the
    library is used."""
    predictor = predictor or own_predictor()
    phi_F = lengths(pd.DataFrame([measured.values]))[0]
    losses = {name: _loss(phi_F, predictor, name) for name in LOSSES if name in predictor.coefficients}
    seen_RF = lengths(pd.DataFrame(predictor.rows))
    low, high = ({name: float(np.clip(loss + sign * predictor.spread[name], 0, 1)) for name, loss in losses.items()}
                 for sign in (-1, 1))
    near, found = nearest(phi_F, predictor), Expectation(
        losses, low, high, {}, bool((phi_F > seen_RF.max(axis=0) * (1 + 1e-9)).any()), dict(measured.values), "")
    found = found._replace(nearest=near)
    return found._replace(sentence=sentence(found, measured))


def own_predictor() -> Predictor:
    """The predictor that comes with the library."""
    return store.read(RECORD)


def lengths(frame: pd.DataFrame) -> np.ndarray:
    """The statistics of each row of a data frame, transformed to lengths phi_RF. Raises ExpectError if a statistic is
    missing or not finite."""
    if missing := [name for name in FEATURES if name not in frame]:
        raise ExpectError(f"the statistic {missing[0]} is missing; measure with kdp_core.study.single_step")
    phi_RF = np.stack([frame[name].to_numpy(float).clip(min=0) ** power for name, power in FEATURES.items()], axis=1)
    if not np.isfinite(phi_RF).all():
        raise ExpectError("a single-step statistic is no number; the pruned model's outputs are not finite")
    return phi_RF


def nearest(phi_F: np.ndarray, predictor: Predictor) -> dict[str, Any]:
    """The row of the predictor's data whose statistics are nearest to phi_F, and its distance in scaled lengths (phi_f
    / s_f)."""
    scale_F = np.array(predictor.scale)
    distance_R = np.linalg.norm((lengths(pd.DataFrame(predictor.rows)) - phi_F) / scale_F, axis=1)
    place = int(distance_R.argmin())
    row = predictor.rows[place]
    return {**{name: row[name] for name in ("model", "method", "ratio", f"{PREFIX}quality")},
            "distance": float(distance_R[place])}


def sentence(found: Expectation, measured: SingleStep) -> str:
    """Two sentences: the expected losses, and the evidence for them."""
    def kept(name: str) -> str:
        return f"{100 * (1 - found.losses[name]):.0f} %"

    parts = {"agreement": "the same next tokens as the dense model in {} of greedy text",
             "lambada": "{} of its correct last words of passages (LAMBADA)",
             "rouge1": "{} of its overlap with human summaries (XSum)"}
    told = ", ".join(words.format(kept(name)) for name, words in parts.items() if name in found.losses)
    values, near = measured.values, found.nearest
    beyond = " Some statistics exceed all that were measured, so the range may not hold." if found.beyond else ""
    return (f"Expect this model to keep {kept('quality')} of the dense model's generation quality "
            f"({100 * (1 - found.high['quality']):.0f} to {100 * (1 - found.low['quality']):.0f} %): {told}. "
            f"The evidence: KL {values['kl']:.2g} nats, another most likely token at "
            f"{100 * values['disagreement']:.0f} % of positions; the nearest measured model ({near['method']} on "
            f"{near['model']}, ratio {near['ratio']:g}) kept {100 * (1 - near[PREFIX + 'quality']):.0f} %.{beyond}")


def _loss(phi_F: np.ndarray, predictor: Predictor, name: str) -> float:
    # loss = 1 - exp(-sum_f w_f phi_f / s_f)
    return float(1 - np.exp(-np.array(predictor.coefficients[name]) @ (phi_F / np.array(predictor.scale))))


# The fit --------------------------------------------------------------------------------------------------------------

def fit(frame: pd.DataFrame, provenance: Mapping[str, Any]) -> Predictor:
    """The predictor that is fitted on measured rows, with its validation.

    frame: one row for each pruned model. Its columns are model, method, ratio, the statistics, and the losses with the
        prefix `loss_`.
    Raises ExpectError if there are fewer than three groups of methods.
    """
    groups_R, names = groups(frame), [name for name in LOSSES if PREFIX + name in frame]
    if len(set(groups_R)) < 3:
        raise ExpectError(f"the rows are of {len(set(groups_R))} groups of methods; measure at least three")
    phi_RF = lengths(frame)
    scale_F = np.sqrt((phi_RF ** 2).mean(axis=0)).clip(min=1e-12)
    made = {name: weights(phi_RF / scale_F, frame[PREFIX + name].to_numpy(float), groups_R) for name in names}
    left = {name: left_out(frame, name) for name in names}
    kept = ["model", "method", "ratio", *FEATURES, *(PREFIX + name for name in names)]
    return Predictor(list(FEATURES), scale_F.tolist(), {name: one[0].tolist() for name, one in made.items()},
                     {name: one[1] for name, one in made.items()},
                     {name: float(np.quantile(np.abs(left[name] - frame[PREFIX + name]), KEPT)) for name in names},
                     {name: validated(frame, name, left[name]) for name in names},
                     frame[kept].to_dict("records"), dict(provenance))


def left_out(frame: pd.DataFrame, name: str) -> np.ndarray:
    """The loss `name` of each row, as predicted by a fit on the rows of all other groups of methods."""
    groups_R, phi_RF, loss_R = groups(frame), lengths(frame), frame[PREFIX + name].to_numpy(float)
    found_R = np.empty(len(frame))
    for group in sorted(set(groups_R)):
        own_R = groups_R == group
        scale_F = np.sqrt((phi_RF[~own_R] ** 2).mean(axis=0)).clip(min=1e-12)
        weights_F, _ = weights(phi_RF[~own_R] / scale_F, loss_R[~own_R], groups_R[~own_R])
        found_R[own_R] = 1 - np.exp(-(phi_RF[own_R] / scale_F) @ weights_F)
    return found_R


def groups(frame: pd.DataFrame) -> np.ndarray:
    """The name of each row's group of methods. Methods that made an equal model are in one group, which has the name of
    one of them."""
    head = {method: method for method in frame["method"]}

    def root(method: str) -> str:
        return method if head[method] == method else root(head[method])

    same = frame.assign(key=frame["kl"].map("{:.9e}".format)).groupby(["model", "key"])["method"]
    for methods in same.unique():
        for other in methods[1:]:
            first, second = sorted((root(methods[0]), root(other)))
            head[second] = first
    return np.array([root(method) for method in frame["method"]])


def validated(frame: pd.DataFrame, name: str, predicted_R: np.ndarray) -> dict[str, float]:
    """Rank correlation of the predictions for left-out methods, with its 95 % interval over groups, and mean absolute
    error."""
    loss_R, groups_R = frame[PREFIX + name].to_numpy(float), groups(frame)
    low, high = interval(predicted_R, loss_R, groups_R)
    return {"spearman": _ordered(predicted_R, loss_R), "low": low, "high": high,
            "error": float(np.abs(predicted_R - loss_R).mean()), "rows": len(frame), "groups": len(set(groups_R))}


def _ordered(first_R: np.ndarray, second_R: np.ndarray) -> float:
    """The rank correlation. If the correlation is not defined, the result is 0, because a constant predicts no
    order."""
    return rank_correlation(first_R, second_R) or 0.0


def interval(first_R: np.ndarray, second_R: np.ndarray, groups_R: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the rank correlation, by a bootstrap that draws groups of methods."""
    draw, known = np.random.default_rng(seed), sorted(set(groups_R))
    places = {group: np.flatnonzero(groups_R == group) for group in known}
    found = []
    for _ in range(DRAWS):
        rows = np.concatenate([places[known[k]] for k in draw.integers(len(known), size=len(known))])
        found.append(_ordered(first_R[rows], second_R[rows]))
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def single_statistics(frame: pd.DataFrame, name: str, statistics: Sequence[str]) -> dict[str, float]:
    """For each statistic, its rank correlation with the loss `name`. Nothing is fitted."""
    loss_R = frame[PREFIX + name].to_numpy(float)
    return {one: _ordered(frame[one].to_numpy(float), loss_R) for one in statistics}


def chain(disagreement_R: np.ndarray, steps: int) -> np.ndarray:
    """The loss of agreement over `steps` tokens if all tokens agree independently, and texts never agree again after a
    difference."""
    # 1 - sum_{g=1..G} a^g / G
    return 1 - ((1 - disagreement_R)[:, None] ** np.arange(1, steps + 1)).mean(axis=1)


def weights(x_RF: np.ndarray, loss_R: np.ndarray, groups_R: np.ndarray) -> tuple[np.ndarray, float]:
    """The weights of the scaled lengths, which are not negative, and the penalty. The penalty has the smallest error on
    groups of methods that the fit left out."""
    y_R = -np.log1p(-np.minimum(loss_R, MOST))

    def error(penalty: float) -> float:
        """Mean over groups of the absolute error on the group that was left out."""
        kept = [groups_R != group for group in sorted(set(groups_R))]
        return float(np.mean([np.abs(x_RF[~own_R] @ _ridge(x_RF[own_R], y_R[own_R], penalty) - y_R[~own_R]).mean()
                              for own_R in kept]))

    best = min(ALPHAS, key=error)
    return _ridge(x_RF, y_R, best), float(best)


def _ridge(x_RF: np.ndarray, y_R: np.ndarray, penalty: float) -> np.ndarray:
    """argmin |x w - y|^2 + penalty |w|^2 over weights w that are not negative."""
    # imported here, because the import takes time and most callers only predict
    from scipy.optimize import nnls

    F = x_RF.shape[1]
    # the penalty is F more rows of the least-squares problem
    return nnls(np.vstack([x_RF, penalty ** 0.5 * np.eye(F)]), np.concatenate([y_R, np.zeros(F)]), maxiter=100 * F)[0]
