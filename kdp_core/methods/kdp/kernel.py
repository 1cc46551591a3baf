"""Step 1 of KDP: a learnable random-Fourier-feature kernel in which going one layer on is nearly linear.

Paper: KDP (ICLR 2026), equations 2 and 5, Algorithm 1 lines 3-10, appendix B.
    phi(h) = (cos(Omega' x + b), sin(Omega' x + b)) / sqrt(m),   Omega = D^1/2 Z + L V,   D = diag(exp(lambda)),
    Z ~ N(0, 1) of d x m and V ~ N(0, 1) of r x m drawn once; lambda and L are learned;
    phi(h_{l+i}) ~ A_i phi(h_{l+i-1}).
Equation 2 names the kernel exp(-(x - y)' Sigma^-1 (x - y) / 2); frequencies of covariance Sigma give Sigma, not its
inverse.

Where the paper is silent or ambiguous (each an argument of `fit`):
- Scale: with lambda = 0 on raw states the kernel is far too narrow to see two tokens as alike. x is therefore counted
  in units of `bandwidth_scale` times the median distance of two tokens (`bandwidth: median`); `unit` is lambda = 0.
- Lift input: `raw` states, or states at unit root mean square (`rms`), as the layers themselves see them.
- A_i = I + gamma_i B_i "initialised at the start of each iteration with its OLS estimate": with `ols: iteration` A_i is
  the least-squares solution for the minibatch at hand, at every minibatch. An Adam step on gamma_i and B_i would be
  overwritten by the next start, so Adam moves lambda and L only. `epoch` and `start` solve less often, and Adam then
  moves gamma_i and B_i between the starts. After training, A_i is solved once more on all training tokens
  (`final_ols`).
- Equation 5 counts each step by itself; Algorithm 1 line 7 chains all A_i and has a prediction of the last state only:
  `loss` is `steps` or `chain`.
- The weight W of the cosine term: "greater importance to tokens towards the end" and "a geometric sequence with base 2
  and exponents from 0 to num_layers - 1"; see `cosine_weights`.
- Batch size 100: sequences here.
- Sums over tokens and features are means over tokens here; Adam does not see the difference.
"""
import functools
import itertools
import logging
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdp_core.base.records import Block, KernelMap
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.states.block import BlockStates, FitError, gram, lift_input, load, relative_error, ridge_solve
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
BANDWIDTHS = ("median", "unit")
LOSSES = ("steps", "chain")
WEIGHTS = ("none", "position", "position_depth", "step")
OLS_EVERY = ("iteration", "epoch", "start")


class TrainingDiverged(RuntimeError):
    """A loss that is not a number."""


class KernelCollapsed(RuntimeError):
    """Features that hardly differ between tokens: trivially linear, and useless."""


class Lift(nn.Module):
    """phi with learnable lambda and L; Z, V and b fixed by the generator. Input in units of `scale`."""

    def __init__(self, width: int, features: int, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        m = features // 2
        self.scale = scale
        self.register_buffer("z_DM", torch.randn(width, m, generator=generator))
        self.register_buffer("v_RM", torch.randn(rank, m, generator=generator))
        self.register_buffer("b_M", 2 * math.pi * torch.rand(m, generator=generator))
        self.lambda_D = nn.Parameter(torch.zeros(width))
        self.l_DR = nn.Parameter(torch.zeros(width, rank))

    def omega(self) -> Tensor:
        """Frequencies omega_DM, per unit of the lift's input."""
        # Omega = D^1/2 Z + L V,  D = diag(exp(lambda))
        return ((0.5 * self.lambda_D).exp()[:, None] * self.z_DM + self.l_DR @ self.v_RM) / self.scale

    def forward(self, x_ND: Tensor) -> Tensor:
        return features_of(x_ND, self.omega(), self.b_M)


def features_of(x_ND: Tensor, omega_DM: Tensor, b_M: Tensor) -> Tensor:
    """phi(x), phi_NF with F = 2 M; every row has norm 1."""
    # phi(x) = (cos(Omega' x + b), sin(Omega' x + b)) / sqrt(m)
    angle_NM = x_ND @ omega_DM + b_M
    return torch.cat((angle_NM.cos(), angle_NM.sin()), dim=-1) / math.sqrt(len(b_M))


class Operators(nn.Module):
    """A_i = I + gamma_i B_i for the k steps of a block."""

    def __init__(self, steps: int, features: int) -> None:
        super().__init__()
        self.gamma_K = nn.Parameter(torch.ones(steps))
        self.b_KFF = nn.Parameter(torch.zeros(steps, features, features))

    def forward(self) -> Tensor:
        # A_i = I + gamma_i B_i
        return torch.eye(self.b_KFF.shape[-1], device=self.b_KFF.device) + self.gamma_K[:, None, None] * self.b_KFF

    @torch.no_grad()
    def start(self, a_KFF: Tensor) -> None:
        """Set B_i so that A_i is `a_KFF`, gamma_i as it stands."""
        gamma_K = torch.where(self.gamma_K.abs() < 1e-3, torch.full_like(self.gamma_K, 1e-3), self.gamma_K)
        self.gamma_K.copy_(gamma_K)
        self.b_KFF.copy_((a_KFF - torch.eye(a_KFF.shape[-1], device=a_KFF.device)) / gamma_K[:, None, None])


class Loss(NamedTuple):
    """Equation 5, means over tokens, sums over steps."""
    total: Tensor
    mse: Tensor
    """Sum over steps of the mean of |A_i phi - phi|^2."""
    cos: Tensor
    """Unweighted mean cosine over tokens and steps."""


def equation_5(a_KFF: Tensor, phi_KNF: Tensor, weight_KN: Tensor, *, chained: bool = False) -> Loss:
    """Loss of step 1 for K operators and the features of K + 1 states; `chained`: of the last state from the first."""
    if chained:
        # phi^(h_{l+k}) = A_k ... A_1 phi(h_l)
        predicted_KNF = functools.reduce(lambda phi_NF, a_FF: phi_NF @ a_FF.T, a_KFF, phi_KNF[0])[None]
        target_KNF, weight_KN = phi_KNF[-1:], weight_KN[-1:]
    else:
        predicted_KNF, target_KNF = phi_KNF[:-1] @ a_KFF.mT, phi_KNF[1:]
    # |A_i phi(h_{l+i-1}) - phi(h_{l+i})|^2 + (1 - W * cos(A_i phi(h_{l+i-1}), phi(h_{l+i})))
    mse = (predicted_KNF - target_KNF).square().sum(-1).mean(-1).sum()
    cos_KN = functional.cosine_similarity(predicted_KNF, target_KNF, dim=-1)
    return Loss(mse + (1 - weight_KN * cos_KN).mean(-1).sum(), mse, cos_KN.mean())


def cosine_weights(kind: str, positions_N: Tensor, length: int, steps: int, model_layers: int) -> Tensor:
    """W of equation 5 for each step and token, weight_KN, of mean 1 over a full sequence (`step`: over the steps).

    Base 2, exponents from 0 to n - 1: `position` spreads them over the positions of a sequence with n the block's
    layers, `position_depth` with n the model's layers (of 128 tokens and 32 layers, the last four then carry half),
    `step` gives step i the exponent i - 1; `none` is W = 1.
    """
    if kind not in WEIGHTS:
        raise FitError(f"kernel.weight {kind!r}: choose one of {', '.join(WEIGHTS)}")
    if kind == "none":
        return torch.ones(steps, len(positions_N))
    if kind == "step":
        weight_K = 2.0 ** torch.arange(steps)
        return (weight_K / weight_K.mean())[:, None].expand(steps, len(positions_N))
    top = (steps if kind == "position" else model_layers) - 1
    weight_T = 2.0 ** (top * torch.linspace(0, 1, length, dtype=torch.float64))
    return (weight_T / weight_T.mean()).float()[positions_N].expand(steps, -1)


def ols(phi_KNF: Tensor, ridge: float) -> Tensor:
    """Least-squares operators a_KFF: A_i = argmin |phi_{i-1} A_i' - phi_i|^2 + ridge, solved in float64."""
    return torch.stack([ridge_solve(gram(before_NF, before_NF), gram(before_NF, after_NF), ridge).T.float()
                        for before_NF, after_NF in itertools.pairwise(phi_KNF)])


def median_distance(x_ND: Tensor, generator: torch.Generator, sample: int = 1024) -> float:
    """Median distance of two distinct tokens, on a sample."""
    x_BD = x_ND[torch.randperm(len(x_ND), generator=generator)[:sample]].double()
    return torch.pdist(x_BD).median().item()


def fit(hidden: HiddenStates, block: Block, *, features: int = 1024, rank: int = 16, lift: str = "raw",
        bandwidth: str = "median", bandwidth_scale: float = 3.0, loss: str = "steps", weight: str = "position",
        massive: str = "bypass", epochs: int = 100, batch_sequences: int = 100, lr: float = 0.01, patience: int = 3,
        factor: float = 0.5, ols_every: str = "iteration", final_ols: bool = True, ridge: float = 1e-6,
        heldout: float = 0.1, collapse_variance: float = 1e-4, decode_every: int = 0, model_layers: int = 0,
        seed: int = 0, device: str = "cpu", resume: Resume = OFF) -> KernelMap:
    """Learn the lift and the operators of one block.

    features: dimension of the kernel space, the paper's 2m.
    rank: of the low-rank factor L.
    lift: what the lift sees, `raw` states or `rms` (states at unit root mean square).
    bandwidth: `median` (input in units of the median distance) or `unit` (lambda = 0 to the letter).
    bandwidth_scale: kernel width at the start in those units.
    loss: `steps` (equation 5, each operator by itself) or `chain` (Algorithm 1, the last state from the first).
    weight: W of the cosine term: none, position, position_depth or step.
    massive: `bypass` leaves massive-activation tokens out and lets them pass the folded block, `raw` treats all alike.
    epochs: passes over the training sequences; the paper trains until convergence, about 100.
    batch_sequences: sequences of a minibatch.
    lr: Adam's learning rate at the start.
    patience: epochs without a lower loss before the learning rate falls.
    factor: by which it then falls.
    ols_every: when A_i starts from least squares: iteration, epoch or start.
    final_ols: solve A_i once more on all training tokens at the end.
    ridge: of the least squares, relative to the mean diagonal of the Gram matrix.
    heldout: share of the sequences that are judged on, never fitted.
    collapse_variance: stop when the held-out variance of phi, summed over features, falls below this.
    decode_every: epochs between judgements of the state decoded by ridge, in the curve; 0 judges it at the end only.
    model_layers: layers of the model, for weight position_depth (0: the last state stored).
    seed: of Z, V, b, the held-out choice and the order of minibatches.
    device: where to train, such as cpu or cuda.
    resume: where the state of the training is kept.
    """
    _check_options(features, bandwidth, loss, weight, ols_every)
    began = time.perf_counter()
    states = load(hidden, block, massive=massive, heldout=heldout, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x_ND = lift_input(states.tokens(states.train)[0], lift)
    unit = median_distance(x_ND, generator) if bandwidth == "median" else 1.0
    phi = Lift(hidden.width, features, rank, bandwidth_scale * unit, generator).to(device)
    operators = Operators(block[1] - block[0], features).to(device)
    run = _Run(states, phi, operators, lift, loss == "chain", weight, model_layers or hidden.layers[-1], ridge,
               ols_every, device)
    curve = _train(run, epochs, batch_sequences, lr, patience, factor, collapse_variance, decode_every, generator,
                   resume)
    phi_KNF = run.features(states.train)
    if final_ols:
        operators.start(ols(phi_KNF, ridge))
    judged = run.judge()
    _check({"epoch": epochs, **judged}, collapse_variance)
    stats = judged | _decode_errors(run, operators().detach(), phi_KNF, ridge)
    tensors = [tensor.detach().cpu() for tensor in (phi.omega(), phi.b_M, operators(), operators.gamma_K)]
    return KernelMap(block, *tensors, lift, states.bypass_above, curve, {
        **stats, "median_distance": unit, "ridge": ridge, "tokens": phi_KNF.shape[1],
        "seconds": time.perf_counter() - began + resume.earlier_s})


def _check_options(features: int, bandwidth: str, loss: str, weight: str, ols_every: str) -> None:
    """FitError for what no fit can work with, before any state is read."""
    if features < 2 or features % 2:
        raise FitError(f"kernel.features {features}: must be even, half cosines and half sines")
    for name, value, known in (("bandwidth", bandwidth, BANDWIDTHS), ("loss", loss, LOSSES),
                               ("weight", weight, WEIGHTS), ("ols_every", ols_every, OLS_EVERY)):
        if value not in known:
            raise FitError(f"kernel.{name} {value!r}: choose one of {', '.join(known)}")


class _Run(NamedTuple):
    """What every part of the training needs."""
    states: BlockStates
    phi: Lift
    operators: Operators
    lift: str
    chained: bool
    weight: str
    model_layers: int
    ridge: float
    ols_every: str
    device: str

    def features(self, which: Tensor) -> Tensor:
        """phi_KNF of the counted tokens of some sequences, without gradient."""
        with torch.no_grad():
            return self.phi(lift_input(self.states.tokens(which), self.lift).to(self.device))

    def weights(self, which: Tensor) -> Tensor:
        """W for the same tokens."""
        K, _, T, _ = self.states.h_KSTD.shape
        return cosine_weights(self.weight, self.states.positions(which), T, K - 1, self.model_layers).to(self.device)

    def judge(self) -> dict[str, float]:
        """Held-out loss, cosine, variance and norm of the mean-free features."""
        phi_KNF = self.features(self.states.heldout)
        with torch.no_grad():
            loss = equation_5(self.operators(), phi_KNF, self.weights(self.states.heldout), chained=self.chained)
        centred_NF = phi_KNF[0] - phi_KNF[0].mean(0)
        return {"heldout_loss": loss.total.item(), "heldout_mse": loss.mse.item(), "heldout_cos": loss.cos.item(),
                "phi_variance": centred_NF.square().sum(-1).mean().item(),
                "phi_norm": centred_NF.norm(dim=-1).max().item()}


def _train(run: _Run, epochs: int, batch: int, lr: float, patience: int, factor: float, collapse_variance: float,
           decode_every: int, generator: torch.Generator, resume: Resume) -> list[dict[str, Any]]:
    """Adam on lambda and L (and on gamma_i, B_i where least squares does not set them); a row an epoch."""
    learned = [*run.phi.parameters(), *(run.operators.parameters() if run.ols_every != "iteration" else ())]
    adam = torch.optim.Adam(learned, lr=lr)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=factor, patience=patience)
    progress = Progress(resume, [*run.phi.parameters(), *run.operators.parameters()],
                        {"adam": adam, "plateau": plateau, "order": generator}, curve=[], losses=[])
    for epoch in progress.epochs(epochs):
        if progress.step == 0 and (run.ols_every == "epoch" or (run.ols_every == "start" and epoch == 1)):
            run.operators.start(ols(run.features(run.states.train), run.ridge))
        order = progress.order(
            lambda: run.states.train[torch.randperm(len(run.states.train), generator=generator)])
        # of nearly equal size: least squares on a remainder of few tokens would fit them exactly
        for part in progress.steps(order.tensor_split(math.ceil(len(order) / batch))):
            progress.values["losses"].append(_iteration(run, adam, part))
        losses, progress.values["losses"] = progress.values["losses"], []
        row = {"epoch": epoch, "seconds": progress.seconds(), "lr": adam.param_groups[0]["lr"]}
        row |= {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        plateau.step(row["loss"])
        with progress.judging():
            row |= run.judge() | {"operator_norm": torch.linalg.matrix_norm(run.operators().detach(), ord=2).tolist()}
            progress.values["curve"].append(row)
            _check(row, collapse_variance)
            if decode_every and epoch % decode_every == 0:
                row |= _decode_errors(run, run.operators().detach(), run.features(run.states.train), run.ridge)
        logger.info("step 1: epoch %d of %d, loss %.4g, held out %.4g", epoch, epochs, row["loss"],
                    row["heldout_loss"])
    return progress.values["curve"]


def _iteration(run: _Run, adam: torch.optim.Optimizer, which: Tensor) -> dict[str, float]:
    """One minibatch: least-squares start, equation 5, one Adam step."""
    phi_KNF = run.phi(lift_input(run.states.tokens(which), run.lift).to(run.device))
    if not math.isfinite(phi_KNF.sum().item()):
        raise TrainingDiverged("step 1: the features are not numbers; lower kernel.lr")
    if run.ols_every == "iteration":
        run.operators.start(ols(phi_KNF.detach(), run.ridge))
    a_KFF = run.operators()
    a_KFF = a_KFF.detach() if run.ols_every == "iteration" else a_KFF
    loss = equation_5(a_KFF, phi_KNF, run.weights(which), chained=run.chained)
    if not math.isfinite(loss.total.item()):
        raise TrainingDiverged("step 1: the loss is not a number; lower kernel.lr, or look for broken hidden states")
    adam.zero_grad()
    loss.total.backward()
    adam.step()
    return {"loss": loss.total.item(), "mse": loss.mse.item(), "cos": loss.cos.item()}


def _check(row: dict[str, Any], collapse_variance: float) -> None:
    if not math.isfinite(row["heldout_loss"]):
        raise TrainingDiverged(f"step 1, epoch {row['epoch']}: the held-out loss is not a number; lower kernel.lr")
    if row["phi_variance"] < collapse_variance:
        raise KernelCollapsed(f"step 1, epoch {row['epoch']}: the features are nearly constant (variance "
                              f"{row['phi_variance']:.2g} of 1, limit {collapse_variance:g}), which makes any map "
                              "linear and loses the state; lower kernel.bandwidth_scale, kernel.lr or kernel.epochs")


def chain(a_KFF: Tensor) -> Tensor:
    """A_k ... A_1 as one matrix, in float64."""
    product_FF = torch.eye(a_KFF.shape[-1], dtype=torch.float64, device=a_KFF.device)
    for a_FF in a_KFF.double():
        product_FF = a_FF @ product_FF
    return product_FF


def _decode_errors(run: _Run, a_KFF: Tensor, phi_KNF: Tensor, ridge: float) -> dict[str, float]:
    """Held-out relative error of the state decoded by ridge from the chain's prediction, and from the true features.

    The judge of a lift: equation 5 rewards collapse, this does not.
    """
    train, heldout, product_FF = run.states.train, run.states.heldout, chain(a_KFF).float()
    judged_KNF = run.features(heldout)
    h_ND, judged_ND = (run.states.tokens(which)[-1].to(run.device) for which in (train, heldout))
    inputs = {"decode_error": (phi_KNF[0] @ product_FF.T, judged_KNF[0] @ product_FF.T),
              "decode_error_true_features": (phi_KNF[-1], judged_KNF[-1])}
    errors = {}
    for name, (z_NF, judged_NF) in inputs.items():
        mean_F, mean_D = z_NF.mean(0), h_ND.mean(0)
        centred_NF = z_NF - mean_F
        w_FD = ridge_solve(gram(centred_NF, centred_NF), gram(centred_NF, h_ND - mean_D), ridge).float()
        errors[name] = relative_error((judged_NF - mean_F) @ w_FD + mean_D, judged_ND)
    return errors
