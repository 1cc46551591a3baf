"""Learns frequencies of random Fourier features that reduce the prediction error on held-out tokens, by variable
projection.

    E(theta) = sum_B w_n |g_n - W x_n - O cos(V x_n + c) - b|^2 / sum_B w_n |g_n|^2,    theta = (V, c),
    (W, O, b) = argmin sum_A w_n |g_n - W x_n - O cos(V x_n + c) - b|^2 + ridge

Variable projection (Golub and Pereyra 1973) computes the linear parameters in closed form for each value of the
nonlinear parameters theta, with A = B. KDP (ICLR 2026, equation 5) learns the kernel in whose feature space the map of
a layer is most linear. But KDP's criterion has its best value for features that are equal for all tokens. This module
computes the linear parameters on tokens A, and the error on tokens B from other sequences. A frequency is therefore
good only if it reduces the error on text that was not used to compute the linear parameters. Collapsed features and
overfitted features do not reduce this error. The gradient is computed through the Cholesky solve, in float64.

For each update of Adam, the training sequences are split at random into two sets: A, on which the linear parameters are
solved, and B, on which the error is computed. A third set of sequences is used only to compare updates. The result is
the update with the lowest error on the third set, or the random start if its error is the lowest.
"""
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.options import Natural, NotNegative, Positive, check

logger = logging.getLogger(__name__)
MOST_SOLVED, MOST_JUDGED = 6144, 2048
"""Largest numbers of tokens in one update: for solving the linear parameters, and for computing the error. Updates with
these numbers of tokens take about a second, and their gradients are precise enough."""
JUDGED_SHARE = 0.25
"""Share of the sequences on which the error is computed, in every split."""
JUDGE_EVERY = 5
"""Number of updates between two evaluations on the third set."""
LEAST = 3
"""Smallest number of sequences that can be split into the three sets."""


class ProjectionError(ValueError):
    """The frequencies of a stand-in cannot be learned from the given tokens with the given options."""


class Sample(NamedTuple):
    """Input tokens, and the targets that are predicted for these tokens."""
    x_ND: Tensor
    """Normalised states: the inputs of the linear part and of the features."""
    goal_ND: Tensor
    weight_N: Tensor
    """Weights of the squared errors. Only the ratios between these weights change the result."""
    sequence_N: Tensor
    """int64: the number of the sequence from which a token comes."""

    def only(self, tokens: Tensor) -> "Sample":
        """A sample that contains only the tokens with these numbers."""
        return Sample(*(tensor[tokens] for tensor in self))


class Learned(NamedTuple):
    """Learned frequencies and phases, and the errors during the training."""
    v_MD: Tensor
    c_M: Tensor
    curve: list[dict[str, Any]]
    """One entry for each update; entry 0 is the start. `step` is the number of the update. `error` is the error on the
    tokens B of the update, and None at the start. `judged_error` is the error on the third set, which is not computed
    for every update."""
    step: int
    """The update whose theta was kept; 0 is the start."""


def features(x_ND: Tensor, v_MD: Tensor, c_M: Tensor) -> Tensor:
    """The regressors f_NF: the input x and the features cos(V x + c)."""
    return torch.cat((x_ND, (x_ND @ v_MD.T + c_M).cos()), dim=1)


def projected_error(v_MD: Tensor, c_M: Tensor, solved: Sample, judged: Sample, ridge: float) -> Tensor:
    """E(theta), a scalar with gradients. The value is 0 for a perfect prediction, and 1 if the prediction is that the
    state does not change.

    ridge: ridge of the linear parameters, for features that are scaled to unit variance.
    Raises ProjectionError if the Gram matrix is not definite.
    """
    w_FD, mean_F, mean_goal_D = _solution(features(solved.x_ND, v_MD, c_M), solved, ridge)
    predicted_ND = mean_goal_D + (features(judged.x_ND, v_MD, c_M) - mean_F) @ w_FD
    # sum_B w_n |g_n - W x_n - O f_n - b|^2 / sum_B w_n |g_n|^2
    missed, whole = ((judged.weight_N * of_ND.square().sum(dim=1)).sum()
                     for of_ND in (judged.goal_ND - predicted_ND, judged.goal_ND))
    return missed / whole


def _solution(f_NF: Tensor, sample: Sample, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression in float64: the weights w_FD of the unscaled features, the means of the features, and the mean
    of the goal."""
    share_N1 = (sample.weight_N / sample.weight_N.sum())[:, None]
    mean_F, mean_goal_D = (share_N1 * f_NF).sum(dim=0), (share_N1 * sample.goal_ND).sum(dim=0)
    root_NF = (f_NF - mean_F) * share_N1.sqrt()
    covariance_FF = (root_NF.T @ root_NF).double()
    cross_FD = (root_NF.T @ ((sample.goal_ND - mean_goal_D) * share_N1.sqrt())).double()
    scale_F = covariance_FF.diagonal().clamp_min(1e-12).sqrt()
    standard_FF = covariance_FF / scale_F.outer(scale_F)
    factor_FF, failed = torch.linalg.cholesky_ex(standard_FF + ridge * torch.eye(len(scale_F), dtype=torch.float64))
    if failed.item():
        raise ProjectionError(f"learned features: the Gram matrix of {len(f_NF)} tokens is singular with ridge "
                              f"{ridge:g}; raise the ridge or lower the number of entries")
    w_FD = torch.cholesky_solve(cross_FD / scale_F[:, None], factor_FF) / scale_F[:, None]
    return w_FD.to(f_NF.dtype), mean_F, mean_goal_D


def learn(sample: Sample, v_MD: Tensor, c_M: Tensor, *, ridge: NotNegative, steps: Natural, lr: Positive,
          seed: int) -> Learned:
    """Train random frequencies and phases by Adam on E(theta). Returns the compared update with the lowest error, or
    the start if its error is lower.

    ridge: ridge of the linear parameters, for features that are scaled to unit variance.
    steps: updates of Adam; 0 returns the start.
    lr: learning rate of Adam at the start, in units of the standard deviation of the frequencies, and in radians for
        phases. The rate falls linearly to zero.
    seed: seed of the random splits of the sequences.
    Raises ProjectionError for fewer than three sequences, and OptionError for options out of range.
    """
    sequences = sample.sequence_N.unique()
    check(learn, locals())
    if len(sequences) < LEAST:
        raise ProjectionError(f"learned features: {len(sequences)} sequences cannot be split into three sets, for "
                              f"solving, for judging and for comparing updates; give at least {LEAST} sequences")
    generator = torch.Generator().manual_seed(seed)
    kept, apart = _halves(sequences, generator)
    compared = _deal(sample, kept, apart, generator)
    # Adam changes every number by about lr; phases are of order 1, so frequencies are scaled to standard deviation 1
    scale = v_MD.std()
    u_MD, p_M = ((v_MD / scale).clone().requires_grad_(), c_M.clone().requires_grad_())
    adam = torch.optim.Adam([u_MD, p_M], lr=lr)
    fall = torch.optim.lr_scheduler.LambdaLR(adam, lambda update: 1 - update / max(1, steps))
    best = (_compare(v_MD, c_M, compared, ridge), 0, v_MD, c_M)
    curve: list[dict[str, Any]] = [{"step": 0, "error": None, "judged_error": best[0]}]
    for update in range(1, steps + 1):
        error = projected_error(u_MD * scale, p_M, *_deal(sample, *_halves(kept, generator), generator), ridge)
        adam.zero_grad()
        error.backward()
        adam.step()
        fall.step()
        curve.append({"step": update, "error": error.item()})
        if update % JUDGE_EVERY == 0 or update == steps:
            now = (u_MD.detach() * scale, p_M.detach().clone())
            curve[-1]["judged_error"] = found = _compare(*now, compared, ridge)
            best = min(best, (found, update, *now), key=lambda one: one[0])
    logger.info("learned features: update %d of %d kept, error %.4f against %.4f at the start", best[1], steps, best[0],
                curve[0]["judged_error"])
    return Learned(best[2], best[3], curve, best[1])


@torch.no_grad()
def _compare(v_MD: Tensor, c_M: Tensor, dealt: tuple[Sample, Sample], ridge: float) -> float:
    return projected_error(v_MD, c_M, *dealt, ridge).item()


def _halves(sequences: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Split sequences at random: the sequences A on which parameters are solved, and the sequences B that give the
    error."""
    order = sequences[torch.randperm(len(sequences), generator=generator)]
    judged = max(1, round(JUDGED_SHARE * len(order)))
    return order[judged:], order[:judged]


def _deal(sample: Sample, solving: Tensor, judging: Tensor, generator: torch.Generator) -> tuple[Sample, Sample]:
    """Tokens of these sequences. If the sequences have more tokens than an update may use, a random subset of the
    tokens is selected."""
    dealt = []
    for sequences, most in ((solving, MOST_SOLVED), (judging, MOST_JUDGED)):
        tokens = torch.isin(sample.sequence_N, sequences).nonzero().flatten()
        dealt.append(sample.only(tokens[torch.randperm(len(tokens), generator=generator)[:most].sort().values]))
    return dealt[0], dealt[1]
