"""Which inputs of a linear map are kept, and which matrix fits the kept inputs: least squares and the optimal brain
surgeon.

The inputs f of a writer come from the channels of an MLP or from the heads of an attention. The part adds the outputs
of its writer to the state. The new matrix of the writer solves a weighted ridge regression towards the old matrix,
    W = argmin sum_n w_n |u_n - W f_n|^2 + lambda |W - W_0|^2,    lambda = ridge * mean diag(sum_n w_n f_n f_n').
The ridge keeps the weights unchanged in directions that do not occur in the calibration text. Of RIDGES, the ridge with
the lowest error on held-out sequences is used. Units are removed by the rule of the optimal brain surgeon (Hassibi and
Stork 1993). The form for units of several inputs is that of ZipLM (Kurtic et al. 2023) and SlimGPT (Ling et al. 2024):
without the inputs j of a unit the loss rises by
    tr(W_j' ([H^-1]_jj)^-1 W_j),    H = sum_n w_n f_n f_n' + lambda I,    W solved on the inputs that are left.
Channels are removed in rounds: a round removes half of the surplus, or the whole surplus if it is at most ROUND. Heads
are removed one at a time.
Axes: F inputs, D outputs, U units.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.methods.heads_channels.obs import losses, remove
from kdp_core.methods.heads_channels.units import columns_of
from kdp_core.states.block import FitError

ROUND = 64
"""Largest surplus of channels that one round removes completely."""
RIDGES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
"""The ridges that are compared on held-out sequences. Units are chosen with the first ridge."""


class Regression(NamedTuple):
    """The normal equations of one writer, float64: H = F'F + lambda I, and F'U + lambda W_0."""
    gram_FF: Tensor
    cross_FD: Tensor

    def of(self, inputs: Tensor) -> "Regression":
        """The same equations, restricted to the inputs `inputs`."""
        return Regression(self.gram_FF[inputs][:, inputs], self.cross_FD[inputs])


class Products(NamedTuple):
    """Weighted products over tokens, sum w f f' and sum w f u', and the old matrix, all float64."""
    gram_FF: Tensor
    cross_FD: Tensor
    old_FD: Tensor

    def equations(self, ridge: float) -> Regression:
        """The normal equations with this ridge."""
        return regression(*self, ridge)


def regression(gram_FF: Tensor, cross_FD: Tensor, old_FD: Tensor, ridge: float) -> Regression:
    """The normal equations from sum w f f', sum w f u' and the old matrix, all float64."""
    level = ridge * gram_FF.diagonal().mean()
    eye_FF = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    return Regression(gram_FF + level * eye_FF, cross_FD + level * old_FD)


def solved(equations: Regression) -> Tensor:
    """w_FD: the matrix that solves the equations. Raises FitError if the matrix of the equations is singular."""
    return torch.cholesky_solve(equations.cross_FD, _factor(equations.gram_FF))


def solved_by(held: Products, products: Products, inputs: Tensor) -> tuple[Tensor, float]:
    """The matrix w_FD of these inputs, and its ridge: of RIDGES, the ridge with the lowest loss on the held-out
    tokens."""
    gram_FF, cross_FD = held.gram_FF[inputs][:, inputs], held.cross_FD[inputs]
    found = []
    for ridge in RIDGES:
        w_FD = solved(products.equations(ridge).of(inputs))
        # sum w |u - W f|^2 = tr(W' G W) - 2 tr(W' C) + sum w |u|^2
        loss = (w_FD * (gram_FF @ w_FD - 2 * cross_FD)).sum().item()
        found.append((loss, ridge, w_FD))
    _, ridge, w_FD = min(found, key=lambda one: one[:2])
    return w_FD, ridge


def kept_units(equations: Regression, units: int, counts: list[int],
               scale_D: Tensor | None = None) -> dict[int, Tensor]:
    """For each number in `counts`: which units are kept, as ascending indices.

    units: number of units. All units have the same number of inputs, and the inputs of a unit are consecutive.
    scale_D: gain of each output in the norm after the writer; None if no norm follows the writer.
    """
    length, gone, found = len(equations.gram_FF) // units, torch.zeros(units, dtype=torch.bool), {}
    if min(counts) < units:
        inverse_FF = torch.cholesky_inverse(_factor(equations.gram_FF))
        w_DF = (inverse_FF @ equations.cross_FD).T.contiguous()
        if scale_D is not None:
            w_DF *= scale_D[:, None]
    for count in sorted(counts, reverse=True):
        while (surplus := units - int(gone.sum()) - count) > 0:
            removed = 1 if length > 1 else surplus if surplus <= ROUND else surplus // 2
            rise_U = losses(w_DF, inverse_FF, units).cpu()
            rise_U[gone] = torch.inf
            chosen = rise_U.argsort(stable=True)[:removed]
            # W and H^-1 of the remaining inputs are computed from the previous W and H^-1
            remove(w_DF, inverse_FF, columns_of(chosen, length).to(w_DF.device))
            gone[chosen] = True
        found[count] = (~gone).nonzero()[:, 0]
    return found


def _factor(gram_FF: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(gram_FF)
    if failed.item():
        raise FitError("least squares: the Gram matrix of a writer's inputs is singular; raise compose.ridge or add "
                       "calibration tokens")
    return factor
