"""The states of one block in the form that fits read: which tokens are fitted, and which sequences are held out to
measure the fit.

Step 1, step 2 and the linear maps share this module. So stand-ins and maps are fitted and measured on the same tokens.
"""
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.options import check
from kdp_core.base.records import Block
from kdp_core.model.stand_ins import rms_scale
from kdp_core.states.hidden import HiddenStates

Massive = Literal["bypass", "raw"]
"""Treatment of massive tokens. `bypass`: massive tokens bypass the stand-in. `raw`: massive tokens are fitted like all
other tokens."""
Counted = Literal["raw", "mask"]
"""Treatment of massive tokens if there is no stand-in. `raw`: massive tokens are used like all other tokens. `mask`:
massive tokens are left out."""
TokenWeight = Literal["inverse_norm", "none"]
"""Weight of a token in a least-squares fit. `inverse_norm`: 1 / |target state of the token|^2, so that all errors are
relative. `none`: 1."""
LiftInput = Literal["raw", "rms"]
"""Input of KDP's lift: the states as they are, or the states scaled to unit root mean square."""


class FitError(ValueError):
    """These states or options do not allow a fit."""


class BlockStates(NamedTuple):
    """States at the boundaries of a block's layers. The sequences are split into training and held-out sequences."""
    h_KSTD: Tensor
    """The K + 1 states of a block of K layers for all sequences, float32."""
    keep_ST: Tensor
    """bool: tokens that are fitted and measured."""
    train: Tensor
    """Numbers of the training sequences, int64."""
    heldout: Tensor
    """Numbers of the held-out sequences, int64."""
    bypass_above: float | None
    """A token bypasses the folded block if the norm of its first state exceeds this number. None means that no token
    bypasses the block."""

    def tokens(self, which: Tensor) -> Tensor:
        """The states of the kept tokens (`keep_ST`) of these sequences, flattened to one list, h_KND."""
        return self.h_KSTD[:, which][:, self.keep_ST[which]]

    def positions(self, which: Tensor) -> Tensor:
        """Positions of the same tokens in their sequences, int64 (N,)."""
        T = self.keep_ST.shape[1]
        return torch.arange(T).expand(len(which), T)[self.keep_ST[which].cpu()]

    def on(self, device: str) -> "BlockStates":
        """The same record with its states on a GPU. Nothing changes on a CPU, or if the free GPU memory is less than
        twice the size of the states.

        On the GPU, a training reads its minibatches from GPU memory. The GPU processes a minibatch faster than the
        minibatch could be copied from main memory.
        """
        if torch.device(device).type != "cuda":
            return self
        free, _ = torch.cuda.mem_get_info(device)
        if 2 * self.h_KSTD.numel() * self.h_KSTD.element_size() > free:
            return self
        return self._replace(h_KSTD=self.h_KSTD.to(device), keep_ST=self.keep_ST.to(device))


def check_all_states(hidden: HiddenStates) -> None:
    """Raise FitError if one of the model's states is not stored."""
    if hidden.layers != list(range(len(hidden.layers))):
        raise FitError(f"{hidden.path} lacks states (stored: {hidden.layers}); set hidden.layers to all")


def split(sequences: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """(numbers of the held-out sequences, numbers of the other sequences). Both lists are ascending. `seed` decides
    which sequences are held out. If there are at least two sequences, neither list is empty."""
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    held = min(max(1, round(share * sequences)), sequences - 1)
    return order[:held].sort().values, order[held:].sort().values


def check_heldout(hidden: HiddenStates, heldout: float) -> None:
    """Raise FitError if the share `heldout` leaves no sequence to fit on, or none to judge on."""
    if not 0 < round(heldout * hidden.sequences) < hidden.sequences:
        raise FitError(f"heldout {heldout} of {hidden.sequences} sequences "
                       "leaves none to fit on or none to judge on; add calibration sequences or change it")


def load(hidden: HiddenStates, block: Block, *, massive: Massive, heldout: float, seed: int,
         between: bool = True) -> BlockStates:
    """States start to stop of a block. If `between` is false, only the first and the last of these states are read.

    massive: `raw` fits all tokens in the same way, as in the paper, which does not mention massive tokens. `bypass`
        leaves out of the fit the tokens that are massive in any state of the block. In the folded model, a token whose
        first state has a large norm bypasses the block. The block hardly changes the state of such a token, and a fit
        on the other tokens cannot predict this state.
    heldout: share of the sequences that are held out to measure the fit; `seed` decides which ones.
    """
    check(load, locals())
    start, stop = block
    layers = list(range(start, stop + 1)) if between else [start, stop]
    check_heldout(hidden, heldout)
    keep_ST = torch.ones(hidden.sequences, hidden.tokens, dtype=torch.bool)
    h_KSTD, bypass_above = torch.stack([hidden.state(k) for k in layers]), None
    for k, h_STD in zip(layers, h_KSTD, strict=True):
        if not torch.isfinite(h_STD).all():
            raise FitError(f"{hidden.path}: state {k} is not finite; extract the hidden states again")
    if massive == "bypass":
        # all states of the block count even if only its ends are read, so that every fit judges on the same tokens
        keep_ST &= ~hidden.massive([k for k in range(start, stop + 1) if k in hidden.layers])
        bypass_above = hidden.massive_factor * h_KSTD[0].norm(dim=-1).median().item()
    held, kept = split(hidden.sequences, heldout, seed)
    return BlockStates(h_KSTD, keep_ST, kept, held, bypass_above)


def lift_input(h: Tensor, kind: LiftInput) -> Tensor:
    """The input of the lift for states (..., D): the states themselves (`raw`), or the states scaled to unit root mean
    square (`rms`)."""
    return h if kind == "raw" else rms_scale(h)


def relative_error(predicted_ND: Tensor, h_ND: Tensor) -> float:
    """Sum of squared errors, divided by the sum of squared errors of the mean state. 0 means no error, and 1 means an
    error as large as that of the mean state."""
    # sum |h^ - h|^2 / sum |h - mean h|^2
    return ((predicted_ND - h_ND).square().sum() / (h_ND - h_ND.mean(0)).square().sum()).item()


def gram(x_NF: Tensor, y_NG: Tensor) -> Tensor:
    """X'Y as a float64 matrix g_FG. The product is computed in float32 from factors whose means are subtracted, and the
    terms with the means are then added in float64.

    Smooth features differ only a little from their mean. In a float32 product without centring, rounding errors would
    be larger than the differences from the mean. Such errors would make eigenvalues of the matrix negative, and a small
    ridge would not make these eigenvalues positive. A float64 product would need twice the time.
    """
    a_F, sum_x_F = x_NF.mean(0), x_NF.sum(0, dtype=torch.float64)
    centred_NF = x_NF - a_F
    if y_NG is x_NF:
        b_G, sum_y_G, centred_NG = a_F, sum_x_F, centred_NF
    else:
        b_G, sum_y_G = y_NG.mean(0), y_NG.sum(0, dtype=torch.float64)
        centred_NG = y_NG - b_G
    centred_FG = (centred_NF.T @ centred_NG).double()
    a_F, b_G = a_F.double(), b_G.double()
    # X'Y = (X - 1a')'(Y - 1b') + a (1'Y) + (X'1) b' - N a b', for any a and b
    return centred_FG + a_F.outer(sum_y_G) + sum_x_F.outer(b_G) - len(x_NF) * a_F.outer(b_G)


def ridge_solve(gram_FF: Tensor, cross_FD: Tensor, ridge: float) -> Tensor:
    """(G + ridge * mean diag(G) * I)^-1 C in float64 by Cholesky, w_FD. Raises FitError if G is not positive
    definite."""
    gram_FF = gram_FF.double()
    level = ridge * gram_FF.diagonal().mean()
    eye_FF = torch.eye(len(gram_FF), dtype=torch.float64, device=gram_FF.device)
    factor, failed = torch.linalg.cholesky_ex(gram_FF + level * eye_FF)
    if failed.item():
        raise FitError(f"least squares: the Gram matrix is singular with ridge {ridge:g}; "
                       "raise the ridge or add calibration tokens")
    return torch.cholesky_solve(cross_FD.double(), factor)
