"""Theorem 1 of KDP in numbers: the error of a chain of k operators in the kernel space, and bounds on this error.

Paper: KDP (ICLR 2026), section 2.3, equation 3, proof in appendix D (equations 7 to 21).

For e_i = phi(h_{i+1}) - A_i phi(h_i) and E_{k,l} = phi(h_{l+k}) - A_{l+k-1} ... A_l phi(h_l):
    |E_{k,l}| <= sqrt(L_ERM + C B_A^2 R_phi^2 sqrt(2m log(2m / delta) / n)) * sum_{j<k} B_A^(k-1-j).
The statement of the theorem and its proof disagree on the following points, or leave them open:
- Equation 12 bounds the error of each single token by the square root of a mean over tokens. But this square root
  bounds only the root mean square over tokens, and not the error of a single token. Here the bound is applied to the
  root mean square `rms`, and `beyond` is the share of tokens whose error exceeds the bound.
- L_ERM is one number in the theorem, but the proof needs one number for each operator. Here L_ERM is the largest mean
  squared error of an operator.
- The theorem calls C "universal" and does not give its value. The record has three bounds. The first bound has C = 1.
  The second bound has no term with C, and is exact on the training tokens by Minkowski's inequality. The third bound is
  equation 9 with its constants L' = 2 (B_A + 1) R_phi and R_n = B_A R_phi sqrt(2m / n). Even the bound with the
  constants of equation 9 is too small, because phi is learned and the proof does not count the class of phi. For
  vectors the contraction lemma (Maurer 2016) gives R_n of order B_A R_phi 2m / sqrt(n).
- delta is the probability that the bound fails for one operator. The proof uses a union bound over k operators, for
  which delta / k would be needed. In one place the proof of the theorem writes d where it means 2m.
- The theorem assumes n independent samples. Tokens of one sequence depend on each other, so the number of tokens is
  larger than the number of independent samples. Therefore the computed bound is lower than it should be.
- Equation 2 gives |phi| = 1 for every input, so R_phi = 1. Then the error of any k operators is below (1 + B_A^k)
  R_phi. This bound for any k operators is called `trivial`. Because phi has a constant part, the training mean of
  phi(h_{l+k}) can be used as a prediction. The error of this prediction is called `constant`. A bound above the bound
  `trivial` gives no information. A bound above `constant` does not show that A predicts better than the training mean.
Axes: K operators or states of the run, N tokens, F = 2m features.
"""
import itertools
import logging
import math
from typing import Any

import torch
from torch import Tensor

from kdp_core.base.records import KernelMap
from kdp_core.methods.kdp.features import chain, features_of
from kdp_core.states.block import gram, lift_input, ridge_solve

logger = logging.getLogger(__name__)


# Formulas -------------------------------------------------------------------------------------------------------------

def accumulation(b_a: float, k: int) -> float:
    """Factor (b) of equation 3: (B_A^k - 1) / (B_A - 1), and k if B_A is 1."""
    # sum_{j=0}^{k-1} B_A^(k-1-j)
    return math.fsum(b_a ** (k - 1 - j) for j in range(k))


def generalisation(b_a: float, r_phi: float, features: int, n: int, delta: float) -> float:
    """The term that equation 3 adds to L_ERM under the root, with C = 1."""
    # B_A^2 R_phi^2 sqrt(2m log(2m / delta) / n)
    return b_a ** 2 * r_phi ** 2 * math.sqrt(features * math.log(features / delta) / n)


def generalisation_equation_9(b_a: float, r_phi: float, features: int, n: int, delta: float) -> float:
    """The term of `generalisation` with the constants of equation 9: 2 L' R_n + range * sqrt(log(1 / delta) / 2n)."""
    lipschitz, rademacher = 2 * (b_a + 1) * r_phi, b_a * r_phi * math.sqrt(features / n)
    # 2 L' R_n(H') + (B_A + 1)^2 R_phi^2 sqrt(log(1 / delta) / 2n)
    return 2 * lipschitz * rademacher + (b_a + 1) ** 2 * r_phi ** 2 * math.sqrt(math.log(1 / delta) / (2 * n))


def bound(l_erm: float, allowance: float, b_a: float, k: int) -> float:
    """Equation 3: the bound on |E_{k,l}|."""
    return math.sqrt(l_erm + allowance) * accumulation(b_a, k)


def samples_needed(error: float, l_erm: float, b_a: float, r_phi: float, features: int, delta: float,
                   k: int) -> float | None:
    """The smallest n for which the bound of equation 3 with C = 1 is at most `error`; None if no n is large enough."""
    room = (error / accumulation(b_a, k)) ** 2 - l_erm
    if room <= 0:
        return None
    # B_A^2 R_phi^2 sqrt(2m log(2m / delta) / n) = room, solved for n
    return features * math.log(features / delta) * (b_a ** 2 * r_phi ** 2 / room) ** 2


# Measurements ---------------------------------------------------------------------------------------------------------

def measure(kernel: KernelMap, h_KND: Tensor, judged_KND: Tensor, ridges: list[float], delta: float) -> dict[str, Any]:
    """The fields of Theory that belong to Theorem 1, measured on the states of training and held-out tokens."""
    K, F, _ = kernel.operators_KFF.shape
    a_KFF = kernel.operators_KFF.to(h_KND.device)
    phi_KNF, judged_KNF = (_features(kernel, states_KND) for states_KND in (h_KND, judged_KND))
    r_phi = max(_largest_norm(phi_KNF), _largest_norm(judged_KNF))
    norms = _product_norms(a_KFF)
    b_a = max(norms[i, i] for i in range(K))
    errors = _errors(a_KFF, phi_KNF)
    step_mse = [errors[i, 1].square().mean().item() for i in range(K)]
    terms = {"erm": 0.0, "constant_1": generalisation(b_a, r_phi, F, phi_KNF.shape[1], delta),
             "equation_9": generalisation_equation_9(b_a, r_phi, F, phi_KNF.shape[1], delta)}
    judged_errors = _errors(a_KFF, judged_KNF)
    rows = [_horizon(start, k, errors[start, k], judged_errors[start, k], step_mse, norms, b_a, r_phi, terms)
            | {"constant": _constant_error(phi_KNF[start + k], judged_KNF[start + k]),
               "samples_needed": samples_needed(b_a ** k * r_phi + r_phi, max(step_mse), b_a, r_phi, F, delta, k)}
            for start in range(K) for k in range(1, K - start + 1)]
    for row in rows:
        row["start"] += kernel.block[0]
        row["uninformative"] = row["bound"] >= row["constant"]
    logger.info("theorem 1: L_ERM %.4g, B_A %.4g, R_phi %.4g; allowance for n with C = 1 %.4g", max(step_mse), b_a,
                r_phi, terms["constant_1"])
    return {"l_erm": max(step_mse), "step_mse": step_mse, "b_a": b_a, "operator_norms": [norms[i, i] for i in range(K)],
            "r_phi": r_phi, "generalisation": terms["constant_1"], "generalisation_equation_9": terms["equation_9"],
            "horizons": rows, "ridges": _ridge_rows(ridges, phi_KNF, judged_KNF, r_phi, delta)}


def _features(kernel: KernelMap, h_KND: Tensor) -> Tensor:
    omega_DM, b_M = kernel.omega_DM.to(h_KND.device), kernel.b_M.to(h_KND.device)
    return torch.stack([features_of(lift_input(h_ND, kernel.lift_input), omega_DM, b_M) for h_ND in h_KND])


def _largest_norm(phi_KNF: Tensor) -> float:
    return max(phi_NF.norm(dim=-1).max().item() for phi_NF in phi_KNF)


def _product_norms(a_KFF: Tensor) -> dict[tuple[int, int], float]:
    """Norm of the operator product A_j ... A_i for every i <= j, in float64."""
    K = len(a_KFF)
    return {(i, j): torch.linalg.matrix_norm(chain(a_KFF[i:j + 1]), ord=2).item() for i in range(K)
            for j in range(i, K)}


def _errors(a_KFF: Tensor, phi_KNF: Tensor) -> dict[tuple[int, int], Tensor]:
    """|E_{k,l}| of every token, for every start l (counted from the run's first state) and horizon k."""
    found = {}
    for start in range(len(a_KFF)):
        predicted_NF = phi_KNF[start]
        for k, a_FF in enumerate(a_KFF[start:], 1):
            predicted_NF = predicted_NF @ a_FF.T
            # E_{k,l} = phi(h_{l+k}) - A_{l+k-1} ... A_l phi(h_l)
            found[start, k] = (phi_KNF[start + k] - predicted_NF).norm(dim=-1)
    return found


def _horizon(start: int, k: int, error_N: Tensor, judged_N: Tensor, step_mse: list[float],
             norms: dict[tuple[int, int], float], b_a: float, r_phi: float, terms: dict[str, float]) -> dict[str, Any]:
    """The measured errors of one start and horizon, and the bounds on them, from the sharpest bound to the weakest."""
    rms = [math.sqrt(mse) for mse in step_mse[start:start + k]]
    last = start + k - 1
    erm, constant_1, equation_9 = (bound(max(step_mse), terms[name], b_a, k) for name in terms)
    trivial = (1 + b_a ** k) * r_phi
    return {"start": start, "horizon": k, "accumulation": accumulation(b_a, k),
            "train_rms": error_N.square().mean().sqrt().item(), "rms": judged_N.square().mean().sqrt().item(),
            "p99": judged_N.quantile(0.99).item(), "largest": judged_N.max().item(),
            # equation 13: sum_t |A_{l+k-1} ... A_{t+1}| |e_t|
            "bound_products": math.fsum((norms[start + j + 1, last] if j < k - 1 else 1.0) * rms[j] for j in range(k)),
            # equation 14: sum_j B_A^(k-1-j) |e_{l+j}|
            "bound_steps": math.fsum(b_a ** (k - 1 - j) * rms[j] for j in range(k)),
            "bound_erm": erm, "bound": constant_1, "bound_equation_9": equation_9, "trivial": trivial,
            "beyond": (judged_N > erm).double().mean().item(), "vacuous": constant_1 >= trivial,
            "vacuous_erm": erm >= trivial}


def _ridge_rows(ridges: list[float], phi_KNF: Tensor, judged_KNF: Tensor, r_phi: float,
                delta: float) -> list[dict[str, Any]]:
    """Theorem 1 over the whole run, for operators that are solved again with each of the given ridges.

    A larger ridge gives a smaller B_A and a larger L_ERM.
    """
    steps = len(phi_KNF) - 1
    grams = [(gram(x_NF, x_NF), gram(x_NF, y_NF)) for x_NF, y_NF in itertools.pairwise(phi_KNF)] if ridges else []
    rows = []
    for ridge in ridges:
        a_KFF = torch.stack([ridge_solve(g_FF, c_FF, ridge).T.float() for g_FF, c_FF in grams])
        b_a = torch.linalg.matrix_norm(a_KFF.double(), ord=2).max().item()
        l_erm = max(_errors(a_KFF[i:i + 1], phi_KNF[i:i + 2])[0, 1].square().mean().item() for i in range(steps))
        product_FF = chain(a_KFF).float()
        rms, judged_rms = ((part[-1] - part[0] @ product_FF.T).square().sum(-1).mean().sqrt().item()
                           for part in (phi_KNF, judged_KNF))
        allowance = generalisation(b_a, r_phi, phi_KNF.shape[-1], phi_KNF.shape[1], delta)
        erm, full = (bound(l_erm, more, b_a, steps) for more in (0.0, allowance))
        trivial = (1 + b_a ** steps) * r_phi
        rows.append({"ridge": ridge, "l_erm": l_erm, "b_a": b_a, "accumulation": accumulation(b_a, steps),
                     "train_rms": rms, "rms": judged_rms, "constant": _constant_error(phi_KNF[-1], judged_KNF[-1]),
                     "bound_erm": erm, "bound": full, "trivial": trivial, "vacuous": full >= trivial,
                     "vacuous_erm": erm >= trivial})
        logger.info("theorem 1: ridge %g: L_ERM %.4g, B_A %.4g, error %.4g, bound %.4g", ridge, l_erm, b_a, judged_rms,
                    erm)
    return rows


def _constant_error(phi_NF: Tensor, judged_NF: Tensor) -> float:
    """Root mean square error on held-out tokens if the training mean is the prediction."""
    return (judged_NF - phi_NF.mean(0)).square().sum(-1).mean().sqrt().item()
