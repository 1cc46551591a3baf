"""Which inputs of a linear map are kept, and which matrix fits them: least squares and the optimal brain surgeon.

A writer maps the inputs f of a part (channels of an MLP, heads of an attention) to what the part adds to the state. Its
new matrix solves a weighted ridge regression towards the old one,
    W = argmin sum_n w_n |u_n - W f_n|^2 + lambda |W - W_0|^2,    lambda = ridge * mean diag(sum_n w_n f_n f_n'),
so that the weights stay as they are in directions that the calibration text does not show. Units are removed by the
rule of the optimal brain surgeon (Hassibi and Stork 1993), for a unit of several inputs as in ZipLM (Kurtic et al.
2023) and SlimGPT (Ling et al. 2024): without the inputs j of a unit the loss rises by
    tr(W_j' ([H^-1]_jj)^-1 W_j),    H = sum_n w_n f_n f_n' + lambda I,    W solved on the inputs that are left.
Single channels are removed in rounds, each of at most half of the surplus; heads are removed one at a time.
Axes: F inputs, D outputs, U units.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.methods.heads_channels.obs import losses
from kdp_core.methods.heads_channels.units import columns_of
from kdp_core.states.block import FitError

ROUND = 64
"""Channels that one round may always remove."""


class Regression(NamedTuple):
    """The normal equations of one writer, float64: H = F'F + lambda I, and F'U + lambda W_0."""
    gram_FF: Tensor
    cross_FD: Tensor

    def of(self, inputs: Tensor) -> "Regression":
        """The equations of these inputs alone."""
        return Regression(self.gram_FF[inputs][:, inputs], self.cross_FD[inputs])


def regression(gram_FF: Tensor, cross_FD: Tensor, old_FD: Tensor, ridge: float) -> Regression:
    """The normal equations from sum w f f', sum w f u' and the old matrix, all float64."""
    level = ridge * gram_FF.diagonal().mean()
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    return Regression(gram_FF + level * eye_FF, cross_FD + level * old_FD)


def solved(equations: Regression) -> Tensor:
    """w_FD: the matrix that solves the equations; FitError if they are singular."""
    return torch.cholesky_solve(equations.cross_FD, _factor(equations.gram_FF))


def kept_units(equations: Regression, units: int, counts: list[int],
               scale_D: Tensor | None = None) -> dict[int, Tensor]:
    """For each count of units to keep: the numbers of these units, ascending.

    units: number of units; all have the same number of inputs, one after the other.
    scale_D: factor of each output in the state, where a norm with a gain follows the writer.
    """
    length, kept, found = len(equations.gram_FF) // units, torch.arange(units), {}
    for count in sorted(counts, reverse=True):
        while len(kept) > count:
            surplus = len(kept) - count
            removed = 1 if length > 1 else surplus if surplus <= ROUND else surplus // 2
            rise_U = _rise(equations.of(columns_of(kept, length)), len(kept), scale_D)
            kept = kept[rise_U.argsort(stable=True)[removed:].sort().values.cpu()]
        found[count] = kept
    return found


def _rise(equations: Regression, units: int, scale_D: Tensor | None) -> Tensor:
    """The increase of the loss without each unit, rise_U."""
    inverse_FF = torch.cholesky_inverse(_factor(equations.gram_FF))
    w_FD = inverse_FF @ equations.cross_FD
    return losses((w_FD if scale_D is None else w_FD * scale_D).T, inverse_FF, units)


def _factor(gram_FF: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram_FF)
    if failed.item():
        raise FitError("least squares: the Gram matrix of a writer's inputs is singular; raise compose.ridge or add "
                       "calibration tokens")
    return factor
