"""Compares the stage that computes CKA of all pairs of layers with a computation from feature-space matrices.

Kornblith et al. (2019) compute linear CKA from the D x D matrices X'Y of all pairs. This module uses the unbiased form
of this computation (Song et al. 2012). If one batch contains all tokens, the minibatch estimate is equal to this
unbiased form:
    HSIC_1 = (tr K~L~ + 1'K~1 1'L~1 / ((n-1)(n-2)) - 2/(n-2) 1'K~L~1) / (n (n-3)),  K~ = K without its diagonal.
The times of both computations are proportional to the number of tokens, so their ratio does not depend on this number.
The times are therefore measured on fewer than 32,000 tokens. The difference between the two estimates becomes smaller
with more tokens, so it is measured on about 32,000 tokens.
"""
import torch
from torch import Tensor

from kdp_core.states import similarity
from kdp_core.states.hidden import HiddenStates
from stage.setup import Setup
from stage.timing import Row, figure, in_turns

BATCH = 256


def measure(setup: Setup) -> list[Row]:
    """Time linear CKA with the states in memory, and the whole stage.

    Also measure the difference between the minibatch estimate and the full-batch value.
    """
    every_LND = chosen(setup.longer, setup.size(32_000, 256))
    x_LND = every_LND[:, :setup.size(4096, 256)]
    batch = min(BATCH, x_LND.shape[1] // 2)
    states = setup.hidden  # extracted at the first use, which is not timed
    times = in_turns({"linear": lambda: minibatches(x_LND, batch), "features": lambda: full_batch(x_LND),
                      "stage": lambda: similarity.similarity(states, tokens=x_LND.shape[1], batch=batch)},
                     max(1, setup.repeats // 2), warm=False)
    n, L, more = x_LND.shape[1], len(x_LND), every_LND.shape[1]
    upper = torch.triu(torch.ones(L, L, dtype=torch.bool), diagonal=1)
    apart = (similarity.cka(minibatches(every_LND, batch)) - similarity.cka(full_batch(every_LND)))[upper].abs()
    return [times.row(f"linear CKA, {L} states, {n} tokens", "linear", "features", target=10,
                      against="feature-space Gram matrices"),
            times.row("the whole stage: cosines, angles, linear and RBF CKA", "stage", "features",
                      against="feature-space Gram matrices, linear CKA alone"),
            figure(f"largest difference from full batch, {more} tokens", apart.max().item(), "", "limit", 0.01,
                   target=1.0, at_most=True),
            figure(f"mean difference from full batch, {more} tokens", apart.mean().item(), "", "limit", 0.01,
                   target=1.0, at_most=True)]


def chosen(hidden: HiddenStates, tokens: int) -> Tensor:
    """The states x_LND of randomly chosen tokens that are not massive."""
    keep_N = (~hidden.massive(hidden.layers).flatten()).nonzero().flatten()
    keep_N = keep_N[torch.randperm(len(keep_N), generator=torch.Generator().manual_seed(0))][:tokens]
    return torch.stack([hidden.state(k).flatten(0, 1)[keep_N] for k in hidden.layers])


def minibatches(x_LND: Tensor, batch: int) -> Tensor:
    """HSIC of all pairs of layers, summed over minibatches, as the stage computes HSIC."""
    hsic_LL = 0.0
    for x_LBD in x_LND.split(batch, dim=1):
        x_LBD = x_LBD.double()
        hsic_LL = hsic_LL + similarity.hsic_pairs(x_LBD @ x_LBD.mT)
    return hsic_LL


def full_batch(x_LND: Tensor) -> Tensor:
    """Unbiased HSIC of all pairs from one batch of all tokens, in the space of features; float64 (L, L)."""
    L, n, _ = x_LND.shape
    # the mean is subtracted first, which changes no HSIC and keeps float32 products exact
    x_LND = x_LND - x_LND.mean(dim=1, keepdim=True)
    own_LN = x_LND.square().sum(-1).double()
    # K~ 1 = X X'1 - diag K
    row_LN = torch.stack([x_ND @ x_ND.sum(0) for x_ND in x_LND]).double() - own_LN
    total_L = row_LN.sum(1)
    traces_LL = torch.zeros(L, L, dtype=torch.float64)
    for i in range(L):
        for j in range(i, L):
            traces_LL[i, j] = traces_LL[j, i] = (x_LND[i].T @ x_LND[j]).square().sum().double()
    traces_LL -= own_LN @ own_LN.T
    return (traces_LL + total_L.outer(total_L) / ((n - 1) * (n - 2)) - 2 / (n - 2) * row_LN @ row_LN.T) / (n * (n - 3))
