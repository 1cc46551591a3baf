"""Structured optimal brain surgeon: units of inputs are removed from a linear map, and the other columns of the map are
changed to compensate.

W (D, C) maps inputs x to W x, and H is X'X over the calibration tokens, with damping. The columns J of a unit are
removed, and the other columns change so that |W X' - W_new X'|^2 grows least:
    loss_J = tr(W_J ([H^-1]_JJ)^-1 W_J'),
    W <- W - W_J ([H^-1]_JJ)^-1 [H^-1]_J:,    H^-1 <- H^-1 - [H^-1]_:J ([H^-1]_JJ)^-1 [H^-1]_J:
The rule is that of Hassibi and Stork 1993, in the form of Kurtic et al. 2022. Units are removed in batches; after each
batch, the losses of the remaining units are computed again. If several units are removed at once, the change of the
other columns is exact for all removed columns together.

All computations are in float64. Axes: D outputs, C inputs, U units, J columns of a unit or of a batch of units.
"""
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.methods.heads_channels.units import columns_of
from kdp_core.states.block import FitError

DAMP_LARGEST = 0.1
"""Largest damp that is tried, relative to the mean diagonal of H."""


class Pruned(NamedTuple):
    """A linear map from which units are removed."""
    w_DC: Tensor
    """All columns of the map; the columns of removed units are zero."""
    removed: list[int]
    """The removed units, in the order of their removal."""
    loss: float
    """Growth of |W X' - W_new X'|^2 so far, a sum over tokens, with the contribution of the damping."""

    def kept(self, units: int) -> Tensor:
        """Numbers of the kept units, ascending."""
        return torch.tensor(sorted(set(range(units)) - set(self.removed)))


def inverse(gram_CC: Tensor, damp: float) -> tuple[Tensor, float]:
    """Two results: (H + damp mean diag(H) I)^-1, and the damp that was used. The damp is raised tenfold, up to 0.1, if
    H is singular."""
    gram_CC, mean = gram_CC.double(), gram_CC.double().diagonal().mean()
    if mean == 0:
        raise FitError("all inputs of a map are zero, so no unit of it can be chosen; read other calibration text")
    eye_CC = torch.eye(len(gram_CC), dtype=torch.float64, device=gram_CC.device)
    while True:
        factor_CC, failed = torch.linalg.cholesky_ex(gram_CC + damp * mean * eye_CC)
        if not failed.item():
            return torch.cholesky_inverse(factor_CC), damp
        if damp * 10 > DAMP_LARGEST:
            raise FitError(f"the Gram matrix of a map's inputs is singular with damp {damp:g}; raise compose.damp or "
                           "add calibration sequences")
        damp = max(damp * 10, 1e-4)


def losses(w_DC: Tensor, inverse_CC: Tensor, units: int) -> Tensor:
    """loss_U: for each unit, the loss if only this unit is removed. The values of removed units have no meaning."""
    length = w_DC.shape[1] // units
    blocks_UJJ = torch.stack([inverse_CC[at:at + length, at:at + length] for at in range(0, w_DC.shape[1], length)]) \
        if length > 1 else inverse_CC.diagonal()[:, None, None]
    w_UJD = w_DC.T.unflatten(0, (units, length))
    if length == 1:
        # |W_j|^2 / [H^-1]_jj
        return w_UJD.square().sum((1, 2)) / blocks_UJJ[:, 0, 0]
    # [H^-1]_JJ = L L':  tr(W_J ([H^-1]_JJ)^-1 W_J') = |L^-1 W_J'|^2
    factor_UJJ, failed_U = torch.linalg.cholesky_ex(blocks_UJJ)
    # the block of a removed unit is zero
    factor_UJJ[failed_U != 0] = torch.eye(length, dtype=torch.float64, device=w_DC.device)
    return torch.linalg.solve_triangular(factor_UJJ, w_UJD, upper=False).square().sum((1, 2))


def remove(w_DC: Tensor, inverse_CC: Tensor, columns_J: Tensor) -> float:
    """Remove these columns from W and H^-1, both in place, and change the other columns. Returns the loss."""
    factor_JJ = torch.linalg.cholesky(inverse_CC[columns_J][:, columns_J])
    # ([H^-1]_JJ)^-1 [H^-1]_J:
    solved_JC = torch.cholesky_solve(inverse_CC[columns_J], factor_JJ)
    w_DJ = w_DC[:, columns_J]
    loss = torch.linalg.solve_triangular(factor_JJ, w_DJ.T, upper=False).square().sum().item()
    # addmm_ needs no second matrix of this size, and no conversion between row and column order
    w_DC.addmm_(w_DJ, solved_JC, alpha=-1)
    inverse_CC.addmm_(inverse_CC[:, columns_J], solved_JC, alpha=-1)
    w_DC[:, columns_J] = 0
    inverse_CC[columns_J], inverse_CC[:, columns_J] = 0, 0
    return loss


def squared(w_DC: Tensor, gram_CC: Tensor) -> float:
    """|W X'|^2 over the tokens of X'X."""
    return ((w_DC @ gram_CC) * w_DC).sum().item()


def prune(w_DC: Tensor, gram_CC: Tensor, units: int, batches: list[int], damp: float) -> Iterator[Pruned]:
    """Yields the map after each batch of removals. `batches` contains the number of units in each batch. If units have
    equal losses, the unit with the lowest number is removed first.

    The map is changed in place from one batch to the next. A caller that keeps the map must copy it.
    """
    w_DC, (inverse_CC, _) = w_DC.double().clone(), inverse(gram_CC, damp)
    removed: list[int] = []
    loss, length = 0.0, w_DC.shape[1] // units
    for count in batches:
        losses_U = losses(w_DC, inverse_CC, units)
        losses_U[removed] = float("inf")
        taken_U = losses_U.argsort(stable=True)[:count].sort().values.cpu()
        loss += remove(w_DC, inverse_CC, columns_of(taken_U, length).to(w_DC.device))
        removed = [*removed, *taken_U.tolist()]
        yield Pruned(w_DC, removed, loss)
