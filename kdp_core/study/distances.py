"""Distances between two states, between their logits and between their probabilities, and second-order estimates of
these distances.

Paper: "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026), Theorems 1 to 3.
The three spaces are states h, logits z = W norm(h) and probabilities p = softmax(z / T). Let D = other - dense, and let
D_o be the part of D that is orthogonal to the dense vector. Then:
    1 - cos(h, h + D)  ~ |D_o|^2 / (2 |h|^2), the same for z
    1 - cos(p, p')     ~ Var_r(Dz) / (2 T^2),    r = p^2 / sum p^2
    KL(p || p')        ~ Var_p(Dz) / (2 T^2)
All estimates are of second order, so they become exact if the changes become small. Each estimate is reported beside
the distance that it estimates. KL is always KL(dense || other). In the released code
(CASE-Lab-UMD/Pruning-on-Representations ba1c25b), the direction of KL and the weights of its estimate depend on the
mode of the code.
Axes: N tokens, D hidden width of the dense model, E hidden width of a sliced model, V vocabulary.
"""
import torch
from torch import Tensor, nn

from kdp_core.model.distil import head_of, to_head, variance
from kdp_core.model.families import family_of
from kdp_core.score import standard_errors
from kdp_core.states.bases import mean_free

ERRORS = "_stderr"
TOPS = (5, 10)
"""Numbers k: the variance of Dz is also computed over only the k most likely tokens."""


def angle(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """1 - cos(a, b) of each token, float64."""
    # 1 - cos = |a / |a| - b / |b||^2 / 2, which loses no digits if the cosine is near 1
    unit_a_ND, unit_b_ND = (nn.functional.normalize(x_ND.double(), dim=-1) for x_ND in (a_ND, b_ND))
    return (unit_a_ND - unit_b_ND).square().sum(dim=-1) / 2


def split(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """For each token, the lengths of two parts of b - a: the part along a and the part orthogonal to a. Both lengths
    are divided by the length of a.

    The results are float64.
    """
    a_ND, d_ND = a_ND.double(), (b_ND - a_ND).double()
    square_N = a_ND.square().sum(dim=-1).clamp_min(1e-300)
    along_N = (d_ND * a_ND).sum(dim=-1) / square_N
    rest_ND = d_ND - along_N[:, None] * a_ND
    return along_N.abs(), (rest_ND.square().sum(dim=-1) / square_N).sqrt()


def outputs(z_NV: Tensor, other_NV: Tensor, temperature: float) -> dict[str, Tensor]:
    """Distances between the probabilities of each token, and estimates of these distances from the logits alone;
    float64."""
    z_NV, d_NV = z_NV.double(), (other_NV - z_NV).double()
    logp_NV, logq_NV = (z_NV / temperature).log_softmax(dim=-1), ((z_NV + d_NV) / temperature).log_softmax(dim=-1)
    p_NV, scale = logp_NV.exp(), 2 * temperature ** 2
    r_NV = p_NV.square() / p_NV.square().sum(dim=-1, keepdim=True)
    found = {"angle_p": angle(p_NV, logq_NV.exp()),
             # KL(p || q) = sum_v p_v (log p_v - log q_v)
             "kl": (p_NV * (logp_NV - logq_NV)).sum(dim=-1).clamp_min(0),
             # 1 - cos p ~ Var_r(Dz) / (2 T^2),  KL ~ Var_p(Dz) / (2 T^2)
             "estimate_p": variance(r_NV, d_NV) / scale, "estimate_kl": variance(p_NV, d_NV) / scale,
             "estimate_uniform": d_NV.var(dim=-1, correction=0) / scale,
             "agreement": (logp_NV.argmax(dim=-1) == logq_NV.argmax(dim=-1)).double()}
    for top in TOPS:
        first_NK = logp_NV.topk(min(top, logp_NV.shape[-1]), dim=-1).indices
        found[f"estimate_top{top}"] = d_NV.gather(-1, first_NK).var(dim=-1, correction=0) / scale
    return found


def measures(h_ND: Tensor, other_ND: Tensor, z_NV: Tensor, other_NV: Tensor, temperature: float) -> dict[str, Tensor]:
    """All distances between two states and between their logits, with the estimates of these distances. Each result is
    one float64 number for each token."""
    found = {}
    for space, a, b in (("h", h_ND, other_ND), ("z", z_NV, other_NV)):
        parallel_N, orthogonal_N = split(a, b)
        # 1 - cos ~ |D_o|^2 / (2 |a|^2)
        found |= {f"angle_{space}": angle(a, b), f"parallel_{space}": parallel_N, f"orthogonal_{space}": orthogonal_N,
                  f"estimate_{space}": orthogonal_N.square() / 2}
    return found | outputs(z_NV, other_NV, temperature)


def compared(dense: nn.Module, other: nn.Module, h_ND: Tensor, other_ND: Tensor, temperature: float,
             final_norm: bool = True, basis_DE: Tensor | None = None) -> dict[str, Tensor]:
    """`measures` for states before the final norm. The logits of a state come from the output head of its own model.

    basis_DE: basis of a sliced model's states, or None. Before the comparison, these states are turned back to the
    basis of the dense model.
    """
    # small chunks, because half a dozen float64 matrices of logits are in memory at the same time
    size = max(1, head_of(dense).chunk() // 8)
    chunks = [measures(*turned(dense, h_CD, o_CD, basis_DE),
                       logits(dense, h_CD, final_norm).cpu(), logits(other, o_CD, final_norm).cpu(), temperature)
              for h_CD, o_CD in zip(h_ND.split(size), other_ND.split(size), strict=True)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def turned(dense: nn.Module, h_ND: Tensor, other_NE: Tensor, basis_DE: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states of both models in the basis of the dense model.

    A sliced model's states are turned back to the basis of the dense model. If the model has layer norms, a sliced
    model's states lack their mean. For such a model, the mean is also subtracted from each dense state.
    """
    if basis_DE is None:
        return h_ND, other_NE
    return mean_free(h_ND, family_of(dense)), other_NE @ basis_DE.T


def logits(model: nn.Module, h_ND: Tensor, final_norm: bool = True) -> Tensor:
    """Logits z = W norm(h). Without `final_norm`, z = W h, as the released code computes it for inner states."""
    return head_of(model)(to_head(model, h_ND) if final_norm else h_ND)


def averaged(found: dict[str, Tensor], groups: int) -> dict[str, float | None]:
    """Mean of each measure over its tokens. The standard error is computed over `groups` equal groups of consecutive
    tokens."""
    row: dict[str, float | None] = {}
    for name, values_N in found.items():
        mean_G = values_N.view(groups, -1).mean(dim=1)
        row[name] = mean_G.mean().item()
        row[name + ERRORS] = standard_errors.mean(mean_G)
    return row


def restricted(z_NV: Tensor, other_NV: Tensor, candidates: list[int], temperature: float) -> dict[str, Tensor]:
    """Distances between the probabilities over all tokens, and between the probabilities over the candidates,
    normalised again; one number for each token."""
    full, few = (outputs(z, other, temperature) for z, other in (
        (z_NV, other_NV), (z_NV[:, candidates], other_NV[:, candidates])))
    p_NV, q_NV = ((z / temperature).double().softmax(dim=-1) for z in (z_NV, other_NV))
    best_N = p_NV[:, candidates].max(dim=-1).values
    names = ("angle_p", "kl", "agreement")
    return {**{name: full[name] for name in names}, **{f"{name}_candidates": few[name] for name in names},
            "mass": p_NV[:, candidates].sum(dim=-1), "mass_other": q_NV[:, candidates].sum(dim=-1),
            # one plus the number of tokens that are more likely than the likeliest candidate
            "rank": (p_NV > best_N[:, None]).sum(dim=-1).double() + 1}
