"""Similarity of all pairs of states: cosine, angular distance, and CKA with a linear and an RBF kernel.

CKA (Kornblith et al. 2019) is estimated from minibatches by the unbiased HSIC (Song et al. 2012; Nguyen et al. 2021):
    HSIC_1(K, L) = <K~, L~>_F / (n (n - 3)),  K~ the U-centred Gram matrix of n tokens, zero on the diagonal,
    CKA = sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) * sum_b HSIC_1(L_b, L_b)).
The RBF bandwidth of a layer is the median distance between the tokens of the first minibatch. All minibatches use this
bandwidth.
Let each row of F be a flattened U-centred Gram matrix. The product F F' then gives the HSIC of all pairs of layers.
Minibatches are drawn from the tokens of all sequences. Consecutive tokens of one sequence would bias CKA (by 0.12 on
SmolLM2).

Massive tokens are only 1.6 % of SmolLM2's tokens, but they dominate the linear CKA of raw states: with them, this CKA
is 0.999 for every pair of deep layers. The option `treatment` decides about massive tokens. `mask` leaves out the
tokens that are massive in any stored state. `normalise` scales every state to unit norm. `raw` changes nothing, as in
the KDP paper, which does not mention massive tokens. The papers of some methods average the cosine over all tokens. For
these methods, a mean cosine over all tokens is computed in addition, whatever `treatment` is. In this mean, a massive
token is drawn with the same probability as any other token.
Axes: L layers, N tokens, B tokens of a minibatch, S sequences, D width.
"""
import logging
import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.options import Count
from kdp_core.base.records import Similarity
from kdp_core.states.hidden import HiddenStates
from kdp_core.states.pairwise import median_distance, squared_distances

logger = logging.getLogger(__name__)


class SimilarityError(ValueError):
    """These states do not allow a similarity to be computed."""


def similarity(hidden: HiddenStates, *, treatment: Literal["mask", "normalise", "raw"] = "mask", tokens: Count = 8192,
               batch: Annotated[int, Ge(4)] = 256, seed: int = 0, device: str = "cpu") -> Similarity:
    """Compare all pairs of stored states. The results are matrices (L, L), float64.

    treatment: treatment of massive tokens: mask, normalise or raw.
    tokens: largest number of tokens on which the states are compared.
    batch: number of tokens in a minibatch of CKA.
    seed: seed for the choice and the order of the tokens.
    device: where to compute, such as cpu or cuda. One minibatch at a time is on the device.
    Cosines and CKA are at most 1. Angular distances are in units of pi, from 0 to 1. Raises OptionError for a value
    that is not allowed, and SimilarityError if there are too few tokens for one minibatch.
    """
    options.check(similarity, locals())
    massive_N = hidden.massive(hidden.layers).flatten()
    keep_N = ~massive_N if treatment == "mask" else torch.ones_like(massive_N)
    generator = torch.Generator().manual_seed(seed)
    chosen_N = keep_N.nonzero().flatten()
    chosen_N = chosen_N[torch.randperm(len(chosen_N), generator=generator)][:tokens]
    batches = len(chosen_N) // batch
    if batches < 1:
        raise SimilarityError(f"similarity: {len(chosen_N)} tokens do not fill one minibatch of {batch}; "
                              "lower similarity.batch or add calibration sequences")
    chosen_N = chosen_N[:batches * batch]
    left_out_N = (~keep_N).nonzero().flatten()
    share = len(chosen_N) / int(keep_N.sum())
    left_out_N = left_out_N[torch.randperm(len(left_out_N), generator=generator)][:round(share * len(left_out_N))]
    x_LND, last_LSD = _gathered(hidden, torch.cat([chosen_N, left_out_N]))
    x_LND, left_out_LND = x_LND[:, :len(chosen_N)], x_LND[:, len(chosen_N):]
    if treatment == "normalise":
        x_LND = torch.nn.functional.normalize(x_LND, dim=-1)
    cosine_LL, angular_LL, linear_LL, rbf_LL = _accumulate(x_LND, batch, device)
    # D(l, k) = mean over sequences of arccos(cos(x_l, x_k)) / pi, at the last token
    angular_last_LL = _summed(last_LSD, batch, device, Tensor.arccos) / hidden.sequences / torch.pi
    counts = len(chosen_N), len(left_out_N)
    cosine_all_LL = (counts[0] * cosine_LL + _summed(left_out_LND, batch, device)) / sum(counts)
    return Similarity(hidden.layers, cosine_LL, angular_LL, angular_last_LL, cka(linear_LL), cka(rbf_LL), cosine_all_LL,
                      treatment, len(chosen_N), int((~keep_N).sum()))


def _gathered(hidden: HiddenStates, chosen_N: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors with every stored state: x_LND of the chosen tokens, and last_LSD of the last token of each
    sequence. One chunk of a state is read at a time, because a whole state of a long calibration takes gigabytes."""
    L, D, T = len(hidden.layers), hidden.width, hidden.tokens
    x_LND, last_LSD = torch.empty(L, len(chosen_N), D), torch.empty(L, hidden.sequences, D)
    sequence_N = chosen_N // T
    for x_ND, last_SD, k in zip(x_LND, last_LSD, hidden.layers, strict=True):
        for which, h_BTD in hidden.batches(k):
            here = ((sequence_N >= which[0]) & (sequence_N <= which[-1])).nonzero().flatten()
            x_ND[here] = h_BTD.flatten(0, 1)[chosen_N[here] - which[0] * T]
            last_SD[which] = h_BTD[:, -1]
    return x_LND, last_LSD


def _cosines(x_LND: Tensor) -> Tensor:
    """Cosine of every pair of layers for each token, cos_NLL, float64."""
    unit_NLD = torch.nn.functional.normalize(x_LND.double(), dim=-1).transpose(0, 1)
    # rounding can give values outside the interval on which arccos is defined
    return (unit_NLD @ unit_NLD.mT).clamp(-1, 1)


def _summed(x_LND: Tensor, batch: int, device: str, of: Callable[[Tensor], Tensor] = lambda cos: cos) -> Tensor:
    """A function `of` the cosine of every pair of layers, summed over tokens, (L, L) float64; zeros if there are no
    tokens."""
    return torch.stack([of(_cosines(x_LBD.to(device))).sum(0) for x_LBD in x_LND.split(batch, dim=1)]).sum(0).cpu()


def _accumulate(x_LND: Tensor, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean cosine, mean angular distance, and the HSIC of each of the two kernels, as four (L, L) float64 matrices. The
    HSIC is summed over minibatches."""
    L, N, _ = x_LND.shape
    summed = torch.zeros(4, L, L, dtype=torch.float64, device=device)
    cosine_LL, angular_LL, linear_LL, rbf_LL = summed
    sigma_L = torch.tensor([median_distance(x_BD) for x_BD in x_LND[:, :batch]], dtype=torch.float64).to(device)
    # if all states of a layer are equal, its Gram matrix is rounding noise, which correlates with itself
    flat_L = (x_LND == x_LND[:, :1]).all(-1).all(-1)
    for start in range(0, N, batch):
        x_LBD = x_LND[:, start:start + batch].to(device).double()
        cos_BLL = _cosines(x_LBD)
        cosine_LL += cos_BLL.sum(0) / N
        angular_LL += cos_BLL.arccos().sum(0) / (torch.pi * N)
        gram_LBB = x_LBD @ x_LBD.mT
        linear_LL += hsic_pairs(gram_LBB)
        # k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma the layer's median distance
        rbf_LL += hsic_pairs(squared_distances(x_LBD, gram_LBB).div_(-2 * sigma_L[:, None, None] ** 2).exp_())
        logger.info("similarity: %d of %d tokens", start + batch, N)
    cosine_LL, angular_LL, linear_LL, rbf_LL = summed.cpu()
    for hsic_LL in (linear_LL, rbf_LL):
        hsic_LL[flat_L] = hsic_LL[:, flat_L] = 0.0
    return cosine_LL, angular_LL, linear_LL, rbf_LL


def u_centre(gram_LBB: Tensor) -> Tensor:
    """U-centred Gram matrices (Szekely and Rizzo 2014), (L, B, B): the diagonal is zero, and every row sums to zero."""
    n = gram_LBB.shape[-1]
    k_LBB = gram_LBB.clone()
    k_LBB.diagonal(dim1=-2, dim2=-1).zero_()
    # K~_ij = K_ij - sum_j K / (n - 2) - sum_i K / (n - 2) + sum K / ((n - 1)(n - 2)),  K~_ii = 0
    row_LB = k_LBB.sum(-1) / (n - 2)
    total_L = k_LBB.sum((-2, -1)) / ((n - 1) * (n - 2))
    # in place: new matrices of this size cost more time than the arithmetic
    k_LBB.sub_(row_LB[:, :, None]).sub_(row_LB[:, None, :]).add_(total_L[:, None, None])
    k_LBB.diagonal(dim1=-2, dim2=-1).zero_()
    return k_LBB


def hsic_pairs(gram_LBB: Tensor) -> Tensor:
    """Unbiased HSIC of every pair of layers (L, L) from their Gram matrices over the same tokens (Song et al. 2012)."""
    n = gram_LBB.shape[-1]
    # HSIC_1(K, L) = <K~, L~> / (n (n - 3))
    flat_LP = u_centre(gram_LBB).flatten(1)
    return flat_LP @ flat_LP.mT / (n * (n - 3))


def cka(hsic_LL: Tensor) -> Tensor:
    """CKA (L, L) from the summed HSIC of all pairs. CKA is NaN for a layer whose states are all equal."""
    own_L = hsic_LL.diagonal().clamp_min(0).sqrt()
    return hsic_LL / (own_L[:, None] * own_L[None, :])


def locality(s_LL: Tensor) -> float | None:
    """LoRP's score RLS, computed from the cosines of all pairs of layers. RLS measures how local the redundancy is. The
    score is None if the mean cosine is not positive."""
    upper = torch.triu(torch.ones_like(s_LL, dtype=torch.bool), diagonal=1)
    mean = s_LL[upper].mean().item()
    # RLS = -log2(mean_{i<j} S_ij)
    return -math.log2(mean) if mean > 0 else None
