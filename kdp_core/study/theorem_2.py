"""Theorem 2 of KDP in numbers: the risk of a linear map between features, against the risk of a linear map between
states.

Paper: KDP (ICLR 2026), section 2.3, equation 4, proof in appendix D (equations 22 to 37).

Theorem 2 compares E|phi(h') - A phi(h)|^2 with E|h' - A h|^2. These two errors are measured in different spaces and
have different units. The error of the features is at most R_phi^2 = 1, even for A = 0. If the bandwidth goes to
infinity, the error of the features goes to 0 for every learned A. Therefore each class of maps is measured in its own
space, both absolutely and relative to the variance in this space. To compare the classes, a ridge decoder with an
intercept is fitted for each class on training tokens. The decoder of a class computes the held-out states from the
predictions of this class. Equation 4 requires that n exceeds the difference of two complexities. The proof of equation
4 (equation 36) requires that n exceeds each of the two complexities. Both numbers are reported.
Axes: N tokens, D hidden width, F features (or D for states), S sequences. An axis of length 2 has the states before and
after a run of layers.
"""
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.records import KernelMap
from kdp_core.methods.kdp.features import Lift, features_of
from kdp_core.score import standard_errors
from kdp_core.states.block import gram, lift_input, relative_error, ridge_solve
from kdp_core.states.pairwise import sampled_median_distance

logger = logging.getLogger(__name__)


class Part(NamedTuple):
    """The training tokens or the held-out tokens of a run of layers."""
    h_KND: Tensor
    """K + 1 states."""
    sequence_N: Tensor
    """For each token, the number of its sequence, int64."""


class Design(NamedTuple):
    """One class of maps, fitted on a share of the training sequences."""
    space: str
    """`identity` (linear maps of states), or `random` or `learned` (linear maps of random or learned features)."""
    features: int
    bandwidth_scale: float | None
    """Width of the kernel of random features, as a multiple of the median distance between two tokens."""
    share: float


def sample_condition(b_a: float, r_phi: float, r_h: float, features: int, width: int, delta: float,
                     margin: float) -> tuple[float, float] | None:
    """The numbers of samples n that Theorem 2 requires with C = c = 1: first n by equation 4 as printed, then n by
    equation 36, as the proof needs it.

    `margin` is Delta: the risk of the identity class minus the risk of the RFF class. If Delta is not positive, the
    theorem claims nothing and the result is None.
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


def designs(kernel: KernelMap, train: Part, counts: list[int], scales: list[float], shares: list[float],
            seed: int) -> list[tuple[Design, Tensor | None, Tensor | None]]:
    """Each class of maps with its frequencies omega_DM and its phases b_M. Both are None for the identity class.

    The base class of random features has the 2m features of `kernel`, the first of `scales` and the largest of
    `shares`. Every other class of random features differs from the base class in one setting.
    """
    width, base, everything = kernel.omega_DM.shape[0], 2 * len(kernel.b_M), max(shares)
    x_ND = lift_input(train.h_KND[0], kernel.lift_input).cpu()
    unit = sampled_median_distance(x_ND, torch.Generator().manual_seed(seed))
    chosen = [Design("identity", width, None, share) for share in shares]
    random = [(base, scales[0], share) for share in shares]
    random += [(count, scales[0], everything) for count in counts] + [(base, scale, everything) for scale in scales]
    chosen += [Design("random", *change) for change in dict.fromkeys(random)]
    made: list[tuple[Design, Tensor | None, Tensor | None]] = []
    for design in chosen:
        if design.space == "identity":
            made.append((design, None, None))
            continue
        # the rank does not matter: the low-rank factor is zero until it is learned
        lift = Lift(width, design.features, 1, design.bandwidth_scale * unit, torch.Generator().manual_seed(seed))
        made.append((design, lift.omega().detach(), lift.b_M))
    # the learned frequencies were fitted on all training sequences, so smaller shares would have no meaning
    return [*made, (Design("learned", base, None, everything), kernel.omega_DM, kernel.b_M)]


def risks(kernel: KernelMap, chosen: list[tuple[Design, Tensor | None, Tensor | None]], train: Part, judged: Part,
          gap: int, ridge: float, seed: int) -> list[dict[str, Any]]:
    """The risks of all classes, one row for each class. Each map leads from the first state of the run to the state
    `gap` layers later."""
    sequences = int(train.sequence_N.max()) + 1
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed)).to(train.sequence_N.device)
    rows, plain = [], {}
    for design, omega_DM, b_M in chosen:
        fitted_N = torch.isin(train.sequence_N, order[:max(1, round(design.share * sequences))])
        h_2ND, judged_2ND = train.h_KND[[0, gap]][:, fitted_N], judged.h_KND[[0, gap]]
        if omega_DM is None:
            z_2NF, judged_2NF = h_2ND, judged_2ND
        else:
            z_2NF, judged_2NF = (features_of(lift_input(h, kernel.lift_input), omega_DM.to(h.device), b_M.to(h.device))
                                 for h in (h_2ND, judged_2ND))
        found, error_N = risk(z_2NF, h_2ND[1], judged_2NF, judged_2ND[1], judged.sequence_N, ridge)
        # the identity classes come first, so the identity class of the same share is always known
        plain.setdefault(design.share, error_N)
        rows.append({"gap": gap, **design._asdict(), "tokens": h_2ND.shape[1], **found,
                     **_excess(error_N - plain[design.share], judged_2ND[1], judged.sequence_N)})
        logger.info("theorem 2: gap %d, %s %d of %d tokens: risk %.4g, state %.4g", gap, design.space, design.features,
                    h_2ND.shape[1], rows[-1]["risk"], rows[-1]["state_error"])
    return rows


def risk(z_2NF: Tensor, h_ND: Tensor, judged_2NF: Tensor, judged_ND: Tensor, sequence_N: Tensor,
         ridge: float) -> tuple[dict[str, float], Tensor]:
    """Risks of the linear map A from z_2NF[0] to z_2NF[1]. Like the maps of Theorem 2, A has no intercept.

    z_2NF, judged_2NF: features (or states) before and after the layers, of training and of held-out tokens.
    h_ND, judged_ND: states after the layers, which the decoder computes.
    sequence_N: for each held-out token, the number of its sequence.
    Returns a mapping, and the squared error of each held-out token's decoded state. The fields `risk` and `train_risk`
    are mean squared errors in squared units of the space. `relative_risk` is the risk divided by the variance in the
    space. `state_error` is the relative squared error of the state decoded from A z, with its standard error over
    sequences. `direct_error` is the same error, but of a state that is decoded from z and not from A z. For each token,
    the squared error is divided by the squared error of the mean state, and `state_median` is the median of these
    ratios. `operator_norm` is the norm of A.
    """
    x_NF, y_NF = z_2NF
    # A = argmin sum |y - A x|^2 + ridge
    a_FF = _regression(x_NF, y_NF, ridge).T.float()
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
    """The state error minus the state error of the identity class on the same tokens, with the standard error of this
    difference."""
    spread_N = (judged_ND - judged_ND.mean(0)).square().sum(-1)
    return {"state_excess": (above_N.sum() / spread_N.sum()).item(),
            "state_excess_stderr": standard_errors.ratio(above_N, spread_N, sequence_N)}


def _decoded(z_NF: Tensor, h_ND: Tensor, judged_NF: Tensor, ridge: float) -> Tensor:
    """Held-out states, computed by a ridge regression with an intercept (the decoder) that is fitted on training
    tokens."""
    mean_F, mean_D = z_NF.mean(0), h_ND.mean(0)
    centred_NF = z_NF - mean_F
    w_FD = _regression(centred_NF, h_ND - mean_D, ridge).float()
    return (judged_NF - mean_F) @ w_FD + mean_D


def _regression(x_NF: Tensor, y_NG: Tensor, ridge: float) -> Tensor:
    """argmin sum |y - W'x|^2 + ridge, w_FG. The features of a wide kernel nearly depend on each other linearly. The
    rounding of float32 products can then be larger than the ridge, so the products are computed in float64."""
    x_NF = x_NF.double()
    return ridge_solve(gram(x_NF, x_NF), gram(x_NF, y_NG.double()), ridge)


def conditions(found: list[dict[str, Any]], r_phi: float, train: Part, judged: Part,
               delta: float) -> list[dict[str, Any]]:
    """Theorem 2 itself, as one row for each RFF class and gap: its inequality, its margin, and the number of samples
    that it requires.

    found: the rows that `risks` returns.
    """
    # R_h = max |h| over the states that the identity class maps from and to
    r_h = max(part.h_KND.norm(dim=-1).max().item() for part in (train, judged))
    plain = {(row["gap"], row["tokens"]): row for row in found if row["space"] == "identity"}
    rows = []
    for row in found:
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
