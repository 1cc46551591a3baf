"""The closed-form fit of one stand-in of kdp_residual, from Gram matrices that are summed batch by batch.

    h_{l+k} ~ h_l + W x + b + O f(V x + c),    x = h_l / rms(h_l)

Everything except the dictionary f comes from one ridge regression:
    (W, O, b) = argmin sum_n w_n |y_n - h_n - W x_n - O f_n - b|^2 + ridge,    w_n = 1 / |y_n|^2,
where features are centred and have unit variance. The rule of the optimal brain surgeon (Hassibi and Stork 1993)
chooses the neurons to remove: without entry j the loss rises by |w_j|^2 / [G^-1]_jj. The surplus is the number of
neurons that are still to be removed. Each round removes half of the surplus, or the whole surplus if it is at most 64.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Block, Module
from kdp_core.methods.kdp_residual.dictionaries import Dictionary, Fit, candidates, counted
from kdp_core.model.passes import built
from kdp_core.model.stand_ins import normalised
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

PRODUCT_TOKENS = 4096
"""Number of tokens whose features are in memory at the same time."""


class Statistics(NamedTuple):
    """Weighted sums over tokens. The features of a token are x, the dictionary entries f and the constant 1."""
    gram_FF: Tensor
    cross_FD: Tensor


def fit_stand_in(block: Block, dictionary: Dictionary | None, h_STD: Tensor, y_STD: Tensor, fit: Fit) -> Module:
    """Fit in closed form the stand-in that maps states h to states y. `h_STD` and `y_STD` are the float32 states of the
    sequences on which the stand-in is fitted."""
    keep_ST, above = counted(h_STD, y_STD, fit.massive_factor)
    if not keep_ST.any():
        raise FitError(f"block {block}: every token is massive; raise hidden.massive_factor")
    statistics = _statistics(dictionary, h_STD, y_STD, keep_ST, fit)
    D = h_STD.shape[-1]
    kept = _surgeon(statistics, D, fit) if dictionary and dictionary.entries > fit.entries else None
    if dictionary and kept is not None:
        dictionary = dictionary.only(kept)
        rows = torch.cat((torch.arange(D), D + kept, torch.tensor([len(statistics.gram_FF) - 1]))).to(fit.device)
        statistics = Statistics(statistics.gram_FF[rows][:, rows], statistics.cross_FD[rows])
    w_FD, bias_D = solve(statistics, fit.ridge)
    return _module(block, dictionary, w_FD.float().cpu(), bias_D.float().cpu(), above, fit.norm)


def fit_alone(model: nn.Module, hidden: HiddenStates, block: Block, sequences: Tensor, fit: Fit) -> Module:
    """The stand-in of one block, fitted on the states of the dense model."""
    h_STD, y_STD = hidden.state(block[0], sequences), hidden.state(block[1], sequences)
    return fit_stand_in(block, candidates(model, block, h_STD, y_STD, fit), h_STD, y_STD, fit)


def _module(block: Block, dictionary: Dictionary | None, w_FD: Tensor, bias_D: Tensor, above: float,
            norm: str) -> Module:
    D = w_FD.shape[1]
    tensors = {"linear.weight": w_FD[:D].T.contiguous(), "linear.bias": bias_D}
    if dictionary:
        tensors |= {"inner.weight": dictionary.v_RD.contiguous(), "inner.bias": dictionary.c_R.contiguous(),
                    "outer.weight": w_FD[D:].T.contiguous()}
    kind, activation = (dictionary.kind, dictionary.activation) if dictionary else ("mlp", "relu")
    options = {"width": D, "entries": dictionary.entries if dictionary else 0, "dictionary": kind,
               "activation": activation, "norm": norm, "bypass_above": above}
    return Module(block, "residual", options, tensors)


@torch.no_grad()
def _statistics(dictionary: Dictionary | None, h_STD: Tensor, y_STD: Tensor, keep_ST: Tensor, fit: Fit) -> Statistics:
    """Gram and cross matrices, summed batch by batch, so that only the features of a few sequences are in memory at a
    time."""
    D = h_STD.shape[-1]
    features = built(_module((0, 1), dictionary, torch.zeros(D + dictionary.entries, D), torch.zeros(D), 0.0, fit.norm)
                     ).to(fit.device) if dictionary else None

    def entries(h_ND: Tensor) -> Tensor:
        x_ND = normalised(h_ND, fit.norm)
        return torch.cat((x_ND, features.features(x_ND)), dim=1) if features else x_ND

    # a constant is subtracted from each feature, because a float32 product would lose small deviations from a mean
    shift_F = entries(h_STD[keep_ST.nonzero()[:64].unbind(dim=1)].to(fit.device)).mean(dim=0)
    gram, cross = 0.0, 0.0
    for h_BTD, y_BTD, keep_BT in _batches(h_STD, y_STD, keep_ST, max(1, PRODUCT_TOKENS // h_STD.shape[1])):
        h_ND, y_ND = h_BTD[keep_BT].to(fit.device), y_BTD[keep_BT].to(fit.device)
        parts_NF = torch.cat((entries(h_ND) - shift_F, h_ND.new_ones(len(h_ND), 1)), dim=1)
        # w_n = 1 / |y_n|^2: the fit minimises relative errors
        weight_N1 = 1 / y_ND.norm(dim=1, keepdim=True) if fit.token_weight == "inverse_norm" else 1.0
        f_NF, goal_ND = parts_NF * weight_N1, (y_ND - h_ND) * weight_N1
        gram, cross = gram + (f_NF.T @ f_NF).double(), cross + (f_NF.T @ goal_ND).double()
    return _moved(Statistics(gram, cross), torch.cat((shift_F, shift_F.new_zeros(1))).double())


def _moved(statistics: Statistics, by_F: Tensor) -> Statistics:
    """The statistics after a constant is added to each feature. Nothing is added to the last feature, which is the
    constant 1."""
    gram_FF, cross_FD = statistics
    # sum (f + s)(f + s)' = (I + s e') sum f f' (I + e s'), e the unit vector of the constant 1
    gram_FF = gram_FF + by_F.outer(gram_FF[-1])
    return Statistics(gram_FF + gram_FF[:, -1].outer(by_F), cross_FD + by_F.outer(cross_FD[-1]))


def _batches(h_STD: Tensor, y_STD: Tensor, keep_ST: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(h_STD.split(size), y_STD.split(size), keep_ST.split(size), strict=True)


def _standard(statistics: Statistics) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four results: the covariances of the features, their covariances with the goal, the scale of the features, and
    the mean of the features. All features are scaled to unit variance. The constant feature 1 is omitted."""
    gram_FF, cross_FD = statistics
    total = gram_FF[-1, -1]
    mean_F, mean_goal_D = gram_FF[-1, :-1] / total, cross_FD[-1] / total
    covariance_FF = gram_FF[:-1, :-1] / total - mean_F.outer(mean_F)
    scale_F = covariance_FF.diagonal().clamp_min(1e-12).sqrt()
    cross_FD = (cross_FD[:-1] / total - mean_F.outer(mean_goal_D)) / scale_F[:, None]
    return covariance_FF / scale_F.outer(scale_F), cross_FD, scale_F, mean_F


def _regularised(covariance_FF: Tensor, ridge: float) -> Tensor:
    return covariance_FF + ridge * torch.eye(len(covariance_FF), dtype=torch.float64, device=covariance_FF.device)


def solve(statistics: Statistics, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression with an unpenalised intercept: weights w_FD of the raw features, and bias_D; float64."""
    covariance_FF, cross_FD, scale_F, mean_F = _standard(statistics)
    factor, failed = torch.linalg.cholesky_ex(_regularised(covariance_FF, ridge))
    if failed.item():
        raise FitError(f"least squares: the Gram matrix is singular with ridge {ridge:g}; raise the ridge or add "
                       "calibration tokens")
    w_FD = torch.cholesky_solve(cross_FD, factor) / scale_F[:, None]
    mean_goal_D = statistics.cross_FD[-1] / statistics.gram_FF[-1, -1]
    return w_FD, mean_goal_D - mean_F @ w_FD


def _surgeon(statistics: Statistics, D: int, fit: Fit) -> Tensor:
    """The entries to keep, ascending: those whose removal would raise the loss most. Each round removes half of the
    surplus entries, or all surplus entries if there are at most 64."""
    covariance_FF, cross_FD, _, _ = _standard(statistics)
    kept = torch.arange(len(covariance_FF) - D)
    while len(kept) > fit.entries:
        rows = torch.cat((torch.arange(D), D + kept)).to(covariance_FF.device)
        inverse_FF = torch.cholesky_inverse(torch.linalg.cholesky(_regularised(covariance_FF[rows][:, rows],
                                                                               fit.ridge)))
        w_FD = inverse_FF @ cross_FD[rows]
        # increase of the loss without entry j: |w_j|^2 / [G^-1]_jj
        rise_F = (w_FD.square().sum(dim=1) / inverse_FF.diagonal())[D:]
        surplus = len(kept) - fit.entries
        removed = surplus if surplus <= 64 else surplus // 2
        kept = kept[rise_F.argsort(stable=True)[removed:].sort().values.cpu()]
    return kept
