"""Theorems 1 and 2 of KDP as numbers: the error bound of k linear steps, and the kernel's risk beside a linear map's.

Paper: KDP (ICLR 2026), section 2.3, equations 3 and 4, proofs in appendix D (equations 7 to 37).

Theorem 1, for e_i = phi(h_{i+1}) - A_i phi(h_i) and E_{k,l} = phi(h_{l+k}) - A_{l+k-1} ... A_l phi(h_l):
    |E_{k,l}| <= sqrt(L_ERM + C B_A^2 R_phi^2 sqrt(2m log(2m / delta) / n)) * sum_{j<k} B_A^(k-1-j).
Where statement and proof disagree, or leave open:
- Equation 12 bounds the error of each token by the root of a mean over tokens. That holds for root mean squares, not
  for single tokens: `rms` is what is bounded, `beyond` the share of tokens past the bound.
- L_ERM is one number, the proof needs it for every step: the largest of the steps' means is taken here.
- C is "universal" and not given: reported are the bound with C = 1, the bound without that term (exact on the training
  tokens, by Minkowski's inequality), and equation 9 with its constants: L' = 2 (B_A + 1) R_phi and
  R_n = B_A R_phi sqrt(2m / n). The last is still too kind: phi is learned and its class is not counted, and for vectors
  the contraction lemma (Maurer 2016) gives R_n of order B_A R_phi 2m / sqrt(n).
- delta is for one step; the proof's union bound over k steps would make it delta / k. It counts d for 2m once.
- The n samples are taken as independent; tokens of one sequence are not, so n tokens is the kind reading.
- Equation 2 gives |phi| = 1 for every input, so R_phi = 1, and the constant part of phi counts: any error is below
  (1 + B_A^k) R_phi for any operators (`trivial`), and the training mean of phi(h_{l+k}) as a prediction has the error
  `constant`. A bound above the first says nothing at all, above the second not even that A is better than a constant.

Theorem 2 compares E|phi(h') - A phi(h)|^2 with E|h' - A h|^2: errors in two spaces, of two units. The first is below
R_phi^2 = 1 with A = 0 and goes to 0 with the bandwidth to infinity, whatever is learned. So each class is measured in
its own space, absolutely and relative to the variance there, and, the comparison that means something, by the state:
what one ridge decoder with an intercept makes of the prediction, fitted on training tokens, judged on held-out ones.
Equation 4 asks n to exceed a difference of complexities, where its proof (equation 36) needs n to exceed each: both.
"""
import itertools
import logging
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.records import KernelMap, Theory
from kdp_core.methods.kdp.kernel import Lift, chain, features_of, median_distance
from kdp_core.score import standard_errors
from kdp_core.states.block import BlockStates, gram, lift_input, load, relative_error, ridge_solve
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


class TheoryError(ValueError):
    """A number that the theorems do not allow."""


# Theorem 1 ------------------------------------------------------------------------------------------------------------

def accumulation(b_a: float, k: int) -> float:
    """Factor (b) of equation 3: (B_A^k - 1) / (B_A - 1), and k where B_A is 1."""
    # sum_{j=0}^{k-1} B_A^(k-1-j)
    return math.fsum(b_a ** (k - 1 - j) for j in range(k))


def generalisation(b_a: float, r_phi: float, features: int, n: int, delta: float) -> float:
    """The second term under the root of equation 3, with C = 1: an allowance for the squared error of one step."""
    # B_A^2 R_phi^2 sqrt(2m log(2m / delta) / n)
    return b_a ** 2 * r_phi ** 2 * math.sqrt(features * math.log(features / delta) / n)


def generalisation_equation_9(b_a: float, r_phi: float, features: int, n: int, delta: float) -> float:
    """The same before its constants went into C: 2 L' R_n + range * sqrt(log(1 / delta) / 2n)."""
    lipschitz, rademacher = 2 * (b_a + 1) * r_phi, b_a * r_phi * math.sqrt(features / n)
    # 2 L' R_n(H') + (B_A + 1)^2 R_phi^2 sqrt(log(1 / delta) / 2n)
    return 2 * lipschitz * rademacher + (b_a + 1) ** 2 * r_phi ** 2 * math.sqrt(math.log(1 / delta) / (2 * n))


def bound(l_erm: float, allowance: float, b_a: float, k: int) -> float:
    """Equation 3: the bound on |E_{k,l}|."""
    return math.sqrt(l_erm + allowance) * accumulation(b_a, k)


def samples_needed(error: float, l_erm: float, b_a: float, r_phi: float, features: int, delta: float,
                   k: int) -> float | None:
    """The n from which the bound of equation 3 with C = 1 is below `error`; None where no n brings it there."""
    room = (error / accumulation(b_a, k)) ** 2 - l_erm
    if room <= 0:
        return None
    # B_A^2 R_phi^2 sqrt(2m log(2m / delta) / n) = room, solved for n
    return features * math.log(features / delta) * (b_a ** 2 * r_phi ** 2 / room) ** 2


def sample_condition(b_a: float, r_phi: float, r_h: float, features: int, width: int, delta: float,
                     margin: float) -> tuple[float, float] | None:
    """The n that Theorem 2 asks for at C = c = 1, as printed (equation 4) and as its proof needs it (equation 36).

    `margin` is Delta, by how much the RFF class is better; None where it is not positive and nothing is claimed.
    """
    if margin <= 0:
        return None
    m = features / 2
    # R_phi^2 sqrt(2m log(2cm / delta)) and R_h^2 sqrt(d log(cd / delta))
    kernel = r_phi ** 2 * math.sqrt(features * math.log(2 * m / delta))
    plain = r_h ** 2 * math.sqrt(width * math.log(width / delta))
    printed = 16 * (b_a ** 2 * max(kernel - plain, 0.0)) ** 2 / margin ** 2
    # C B_A^2 R_phi^2 sqrt(2m log(4cm / delta) / n) <= Delta / 4, and the same with R_h, d, log(2cd / delta)
    kernel = r_phi ** 2 * math.sqrt(features * math.log(4 * m / delta))
    plain = r_h ** 2 * math.sqrt(width * math.log(2 * width / delta))
    return printed, 16 * (b_a ** 2 * max(kernel, plain)) ** 2 / margin ** 2


class Part(NamedTuple):
    """Training or held-out tokens of the run."""
    h_KND: Tensor
    """K + 1 states."""
    sequence_N: Tensor
    """The sequence of each token, int64."""


def measure(hidden: HiddenStates, kernel: KernelMap, *, delta: float = 0.05,
            operator_ridges: list[float] | None = None, gaps: list[int] | None = None,
            feature_counts: list[int] | None = None, bandwidth_scales: list[float] | None = None,
            shares: list[float] | None = None, ridge: float = 1e-6, heldout: float = 0.1, seed: int = 0,
            device: str = "cpu") -> Theory:
    """Both theorems on the states of a fitted kernel's run of layers.

    delta: probability with which the bounds may fail, between 0 and 1.
    operator_ridges: ridges with which the operators are solved anew for Theorem 1, to trade L_ERM against B_A; null
        means none.
    gaps: layers from input to target for Theorem 2, from the first state of the run on; null means 1 and the whole run.
    feature_counts: 2m of random features, for Theorem 2; null means the fitted kernel's alone.
    bandwidth_scales: kernel widths of random features, in median distances of two tokens; null means 3.
    shares: shares of the training sequences to fit Theorem 2's classes on; null means all of them alone.
    ridge: of the maps and decoders of Theorem 2, relative to the mean diagonal of the Gram matrix.
    heldout: share of the sequences to judge on, as in step 1.
    seed: of the held-out choice (as in step 1), the random features and the choice of sequences.
    device: where to compute, such as cpu or cuda.
    """
    steps = len(kernel.operators_KFF)
    gaps = sorted({1, steps}) if gaps is None else gaps
    scales, shares, counts = bandwidth_scales or [3.0], shares or [1.0], feature_counts or [len(kernel.b_M) * 2]
    _check(delta, operator_ridges or [], gaps, steps, counts, scales, shares)
    began = time.perf_counter()
    states = load(hidden, kernel.block, massive="raw" if kernel.bypass_above is None else "bypass", heldout=heldout,
                  seed=seed)
    train, judged = (_part(states, which, device) for which in (states.train, states.heldout))
    theorem_1 = _theorem_1(kernel, train, judged, operator_ridges or [], delta)
    designs = _designs(kernel, train, counts, scales, shares, seed)
    risks = [row for gap in gaps for row in _risks(kernel, designs, train, judged, gap, ridge, seed)]
    return Theory(block=kernel.block, features=len(kernel.b_M) * 2, lift_input=kernel.lift_input, delta=delta,
                  tokens=len(train.sequence_N), sequences=len(states.train), heldout_tokens=len(judged.sequence_N),
                  **theorem_1, risks=risks,
                  conditions=_conditions(risks, theorem_1["r_phi"], train, judged, delta),
                  stats={"ridge": ridge, "kernel_epochs": len(kernel.curve), "seconds": time.perf_counter() - began})


def _check(delta: float, ridges: list[float], gaps: list[int], steps: int, counts: list[int], scales: list[float],
           shares: list[float]) -> None:
    if not 0 < delta < 1:
        raise TheoryError(f"theory.delta {delta}: a probability, choose a number between 0 and 1")
    if any(ridge <= 0 for ridge in ridges):
        raise TheoryError(f"theory.operator_ridges {ridges}: ridges are above 0")
    if not gaps or min(gaps) < 1 or max(gaps) > steps:
        raise TheoryError(f"theory.gaps {gaps}: the run has 1 to {steps} layers; lengthen theory.run or change them")
    if any(count < 2 or count % 2 for count in counts):
        raise TheoryError(f"theory.feature_counts {counts}: must be even, half cosines and half sines")
    if min(scales) <= 0:
        raise TheoryError(f"theory.bandwidth_scales {scales}: widths are above 0")
    if min(shares) <= 0 or max(shares) > 1:
        raise TheoryError(f"theory.shares {shares}: shares of the training sequences are above 0 and at most 1")


def _part(states: BlockStates, which: Tensor, device: str) -> Part:
    keep_ST = states.keep_ST[which]
    sequence_ST = torch.arange(len(which))[:, None].expand(keep_ST.shape)
    return Part(states.tokens(which).to(device), sequence_ST[keep_ST].to(device))


def _theorem_1(kernel: KernelMap, train: Part, judged: Part, ridges: list[float], delta: float) -> dict[str, Any]:
    """The fields of Theory that are Theorem 1's."""
    K, F, _ = kernel.operators_KFF.shape
    a_KFF = kernel.operators_KFF.to(train.h_KND.device)
    phi_KNF, judged_KNF = (_features(kernel, part) for part in (train, judged))
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


def _features(kernel: KernelMap, part: Part) -> Tensor:
    omega_DM, b_M = kernel.omega_DM.to(part.h_KND.device), kernel.b_M.to(part.h_KND.device)
    return torch.stack([features_of(lift_input(h_ND, kernel.lift_input), omega_DM, b_M) for h_ND in part.h_KND])


def _largest_norm(phi_KNF: Tensor) -> float:
    return max(phi_NF.norm(dim=-1).max().item() for phi_NF in phi_KNF)


def _product_norms(a_KFF: Tensor) -> dict[tuple[int, int], float]:
    """Operator norm of A_j ... A_i for every i <= j, in float64."""
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
    """Measured errors and bounds of one start and horizon, sharpest bound first."""
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
    """Theorem 1 over the whole run for operators of other ridges: a larger one gives a smaller B_A, a larger L_ERM."""
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
    """Held-out root mean square error of the training mean."""
    return (judged_NF - phi_NF.mean(0)).square().sum(-1).mean().sqrt().item()


# Theorem 2 ------------------------------------------------------------------------------------------------------------

class Design(NamedTuple):
    """One class of maps, fitted on a share of the training sequences."""
    space: str
    """`identity` (linear maps of states), or `rff` with features `random` or `learned`."""
    features: int
    bandwidth_scale: float | None
    """Of random features, in median distances of two tokens."""
    share: float


def _designs(kernel: KernelMap, train: Part, counts: list[int], scales: list[float], shares: list[float],
             seed: int) -> list[tuple[Design, Tensor | None, Tensor | None]]:
    """Each class with its frequencies and phases; one change at a time from the kernel's 2m, the first width, all n."""
    width, base, everything = kernel.omega_DM.shape[0], 2 * len(kernel.b_M), max(shares)
    x_ND = lift_input(train.h_KND[0], kernel.lift_input).cpu()
    unit = median_distance(x_ND, torch.Generator().manual_seed(seed))
    designs = [Design("identity", width, None, share) for share in shares]
    random = [(base, scales[0], share) for share in shares]
    random += [(count, scales[0], everything) for count in counts] + [(base, scale, everything) for scale in scales]
    designs += [Design("random", *change) for change in dict.fromkeys(random)]
    made: list[tuple[Design, Tensor | None, Tensor | None]] = []
    for design in designs:
        if design.space == "identity":
            made.append((design, None, None))
            continue
        # rank 1: the low-rank factor is zero until it is learned
        lift = Lift(width, design.features, 1, design.bandwidth_scale * unit, torch.Generator().manual_seed(seed))
        made.append((design, lift.omega().detach(), lift.b_M))
    # its frequencies have seen all training sequences: no shares
    return [*made, (Design("learned", base, None, everything), kernel.omega_DM, kernel.b_M)]


def _risks(kernel: KernelMap, designs: list[tuple[Design, Tensor | None, Tensor | None]], train: Part, judged: Part,
           gap: int, ridge: float, seed: int) -> list[dict[str, Any]]:
    """Risks of every class from the run's first state to the one `gap` layers on."""
    sequences = int(train.sequence_N.max()) + 1
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed)).to(train.sequence_N.device)
    rows, plain = [], {}
    for design, omega_DM, b_M in designs:
        fitted_N = torch.isin(train.sequence_N, order[:max(1, round(design.share * sequences))])
        h_2ND, judged_2ND = train.h_KND[[0, gap]][:, fitted_N], judged.h_KND[[0, gap]]
        if omega_DM is None:
            z_2NF, judged_2NF = h_2ND, judged_2ND
        else:
            z_2NF, judged_2NF = (features_of(lift_input(h, kernel.lift_input), omega_DM.to(h.device), b_M.to(h.device))
                                 for h in (h_2ND, judged_2ND))
        found, error_N = risk(z_2NF, h_2ND[1], judged_2NF, judged_2ND[1], judged.sequence_N, ridge)
        plain.setdefault(design.share, error_N)  # the identity classes come first
        rows.append({"gap": gap, **design._asdict(), "tokens": h_2ND.shape[1], **found,
                     **_excess(error_N - plain[design.share], judged_2ND[1], judged.sequence_N)})
        logger.info("theorem 2: %d on, %s %d of %d tokens: risk %.4g, state %.4g", gap, design.space, design.features,
                    h_2ND.shape[1], rows[-1]["risk"], rows[-1]["state_error"])
    return rows


def risk(z_2NF: Tensor, h_ND: Tensor, judged_2NF: Tensor, judged_ND: Tensor, sequence_N: Tensor,
         ridge: float) -> tuple[dict[str, float], Tensor]:
    """Risks of the linear map A from z_2NF[0] to z_2NF[1], without intercept as the classes have none.

    z_2NF, judged_2NF: features (or states) before and after, on training and held-out tokens.
    h_ND, judged_ND: states after, which the decoder rebuilds; sequence_N: sequences of the held-out tokens.
    Returns risk and train_risk (mean squared error, units of the space squared), relative_risk (of the variance in that
    space), state_error (relative squared error of the state decoded from A z) with its standard error over sequences,
    direct_error (the same, decoded from z itself), state_median (median over tokens of the squared error over that
    of the mean state) and operator_norm of A; and the squared error of each held-out token's decoded state.
    """
    x_NF, y_NF = z_2NF
    # A = argmin sum |y - A x|^2 + ridge
    a_FF = ridge_solve(gram(x_NF, x_NF), gram(x_NF, y_NF), ridge).T.float()
    predicted_NF, judged_predicted_NF = x_NF @ a_FF.T, judged_2NF[0] @ a_FF.T
    decoded_ND = _decoded(predicted_NF, h_ND, judged_predicted_NF, ridge)
    error_N, spread_N = (d.square().sum(-1) for d in (decoded_ND - judged_ND, judged_ND - judged_ND.mean(0)))
    return {"risk": (judged_2NF[1] - judged_predicted_NF).square().sum(-1).mean().item(),
            "train_risk": (y_NF - predicted_NF).square().sum(-1).mean().item(),
            "relative_risk": relative_error(judged_predicted_NF, judged_2NF[1]),
            "state_error": relative_error(decoded_ND, judged_ND),
            "state_error_stderr": standard_errors.ratio(error_N, spread_N, sequence_N),
            "state_median": (error_N / spread_N).median().item(),
            "direct_error": relative_error(_decoded(x_NF, h_ND, judged_2NF[0], ridge), judged_ND),
            "operator_norm": torch.linalg.matrix_norm(a_FF, ord=2).item()}, error_N


def _excess(above_N: Tensor, judged_ND: Tensor, sequence_N: Tensor) -> dict[str, float | None]:
    """State error beyond the identity class's on as many tokens; its standard error is of the paired differences."""
    spread_N = (judged_ND - judged_ND.mean(0)).square().sum(-1)
    return {"state_excess": (above_N.sum() / spread_N.sum()).item(),
            "state_excess_stderr": standard_errors.ratio(above_N, spread_N, sequence_N)}


def _decoded(z_NF: Tensor, h_ND: Tensor, judged_NF: Tensor, ridge: float) -> Tensor:
    """Held-out states by ridge regression with an intercept, fitted on training tokens."""
    mean_F, mean_D = z_NF.mean(0), h_ND.mean(0)
    centred_NF = z_NF - mean_F
    w_FD = ridge_solve(gram(centred_NF, centred_NF), gram(centred_NF, h_ND - mean_D), ridge).float()
    return (judged_NF - mean_F) @ w_FD + mean_D


def _conditions(risks: list[dict[str, Any]], r_phi: float, train: Part, judged: Part,
                delta: float) -> list[dict[str, Any]]:
    """Theorem 2 itself, a row an RFF class and gap: its inequality, its margin, and the samples that it asks for."""
    # R_h: of the states that the identity class maps from and to
    r_h = max(part.h_KND.norm(dim=-1).max().item() for part in (train, judged))
    plain = {(row["gap"], row["tokens"]): row for row in risks if row["space"] == "identity"}
    rows = []
    for row in risks:
        if row["space"] == "identity":
            continue
        other = plain[row["gap"], row["tokens"]]
        b_a, margin = max(row["operator_norm"], other["operator_norm"]), other["risk"] - row["risk"]
        asked = sample_condition(b_a, r_phi, r_h, row["features"], train.h_KND.shape[-1], delta, margin)
        rows.append({key: row[key] for key in ("gap", "space", "features", "bandwidth_scale", "tokens")} | {
            "risk": row["risk"], "identity_risk": other["risk"], "margin": margin, "b_a": b_a, "r_h": r_h,
            "samples_printed": asked[0] if asked else None, "samples_proof": asked[1] if asked else None,
            # A = 0 has the risk E|phi|^2 <= R_phi^2
            "holds": margin >= 0, "holds_without_fit": r_phi ** 2 <= other["risk"],
            "better_state": row["state_excess"] < 0, "state_excess": row["state_excess"],
            "state_excess_stderr": row["state_excess_stderr"]})
    return rows
