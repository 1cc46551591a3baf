"""Step 2 of KDP: a small network from the kernel space back to hidden states, and the folded block of both steps.

Paper: KDP (ICLR 2026), equation 6, Algorithm 1 lines 11-21, appendix B. The network I(z) = alpha * MLP(z) has two
layers. It is trained for 100 epochs of Adam with the fixed learning rate 1e-3 and batches of 128. The input is z = A_k
... A_1 phi(h_l), and the target is h_{l+k}.

Where the paper is silent or ambiguous (each an argument of `fit`):
- The hidden width and the activation of the MLP are not given. The parameters in Table 12 agree with a width near 1590
  for LLaMA-2-7B.
- Algorithm 1 adds a term `L_norm`. Equation 6 does not contain this term, and the paper does not define it; the option
  `norm_loss` offers two interpretations.
- The features from which z is computed have variances of 1e-5. Without standardisation the printed recipe trains far
  too slowly: after 18 s on SmolLM2 the held-out error is 0.78, against 0.19 with standardisation. The standardisation
  is absorbed into W1 and b1.
- alpha starts at the root mean square of the target, so that the MLP's own outputs are of order one.
- Here the batch size of 128 is a number of tokens.
- The paper keeps the weights of the last epoch. However, an update of Adam at the fixed learning rate can spoil the
  weights even late in the training. On SmolLM2, for one seed of three, the held-out error is 0.16 after two epochs and
  24 after five epochs. By default, `keep` selects the weights of the best epoch.
- The paper does not say how the weights of the MLP are initialised; by default they are random. `start: ridge` is our
  addition. An MLP can be a linear map, because act(s) - act(-s) = s for GELU, SiLU and ReLU. With `start: ridge` the
  MLP is at first the least-squares map of rank H/2 from z to h.
"""
import logging
import math
import time
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.options import Count, Natural, Positive, Share, check, settings
from kdp_core.base.records import Inverse, KernelMap, ModelFacts, Module
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.methods._train import descend
from kdp_core.methods.kdp import kernel as step_1
from kdp_core.methods.kdp.features import chain, features_of
from kdp_core.states.block import gram, lift_input, load, relative_error, ridge_solve
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
NormLoss = Literal["none", "relative", "gap"]
"""Interpretations of the paper's undefined L_norm; see `fit`."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}
"""Activations by their names in transformers. The folded model looks up its activation by this name."""
RIDGE = 1e-6
"""Ridge of `start: ridge`, relative to the mean diagonal of the Gram matrix, as in the least squares of step 1."""


class Network(nn.Module):
    """I(z) = alpha * (W2 act(W1 u + b1) + b2), u the standardised z, alpha in units of the target's scale."""

    def __init__(self, z_NF: Tensor, h_ND: Tensor, width: int, activation: str, standardise: bool) -> None:
        super().__init__()
        ones_F = torch.ones(z_NF.shape[1])
        self.register_buffer("mean_F", z_NF.mean(0) if standardise else 0 * ones_F)
        self.register_buffer("std_F", z_NF.std(0).clamp_min(1e-8) if standardise else ones_F)
        self.unit = (h_ND - h_ND.mean(0)).square().mean().sqrt().item() if standardise else 1.0
        self.w1, self.w2 = nn.Linear(z_NF.shape[1], width), nn.Linear(width, h_ND.shape[1])
        if standardise:
            with torch.no_grad():
                self.w2.bias.copy_(h_ND.mean(0) / self.unit)
        self.alpha = nn.Parameter(torch.ones(()))
        self.act = ACTIVATIONS[activation]()

    def forward(self, z_NF: Tensor) -> Tensor:
        # I(z) = alpha * MLP(z)
        return self.unit * self.alpha * self.w2(self.act(self.w1((z_NF - self.mean_F) / self.std_F)))

    @torch.no_grad()
    def start_linear(self, z_NF: Tensor, h_ND: Tensor, ridge: float) -> None:
        """Set the weights so that the network is the ridge map from z to h. The rank of the map is R = H/2, or D if D
        is less. Unused hidden units contribute nothing."""
        mean_F, mean_D = z_NF.mean(0), h_ND.mean(0)
        centred_NF = z_NF - mean_F
        gram_FF = gram(centred_NF, centred_NF)
        w_FD = ridge_solve(gram_FF, gram(centred_NF, h_ND - mean_D), ridge)
        rank = min(len(self.w1.weight) // 2, len(mean_D))
        # the best map of rank R has the first principal directions of the fitted outputs: W V V'
        v_DR = torch.linalg.eigh(w_FD.T @ gram_FF @ w_FD).eigenvectors[:, -rank:]
        # act(s) - act(-s) = s; for tanh the difference is 2 s, but only near 0
        small, pair = (0.01, 2) if isinstance(self.act, nn.Tanh) else (1.0, 1)
        w_RF = small / self.unit * (w_FD @ v_DR).T
        b_R = w_RF @ (self.mean_F - mean_F).double()
        self.w1.weight[:2 * rank] = torch.cat([w_RF, -w_RF]).float() * self.std_F
        self.w1.bias[:2 * rank] = torch.cat([b_R, -b_R]).float()
        self.w2.weight.zero_()
        self.w2.weight[:, :2 * rank] = torch.cat([v_DR, -v_DR], dim=1).float() / (small * pair)
        self.w2.bias.copy_(mean_D / self.unit)


class _Data(NamedTuple):
    z_NF: Tensor
    h_ND: Tensor


def fit(hidden: HiddenStates, kernel: KernelMap, *, width: Count = 1024,
        activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu", standardise: bool = True,
        norm_loss: NormLoss = "none", start: Literal["random", "ridge"] = "random", epochs: Natural = 100,
        lr: Positive = 1e-3, batch: Count = 128,
        keep: Literal["best", "last"] = "best", heldout: Share = 0.1, seed: Natural = 0, device: str = "cpu",
        resume: Resume = OFF) -> Inverse:
    """Learn the map from the kernel space of a block back to hidden states.

    width: hidden width H of the two-layer MLP.
    activation: gelu, relu, silu or tanh.
    standardise: whether z is standardised and alpha starts at the target's scale; false follows the paper's text
        exactly.
    norm_loss: the paper's undefined L_norm: `none`, `relative` (|h^ - h|^2 / |h|^2) or `gap` ((|h^| / |h| - 1)^2).
    start: `random`, or `ridge` (the least-squares map of rank width / 2). With `keep: best` the untrained map can be
        the result.
    epochs: number of passes over the training tokens.
    lr: the fixed learning rate of Adam.
    batch: number of tokens in a minibatch.
    keep: `best` keeps the weights of the epoch with the lowest held-out error; `last` keeps the weights of the last
        epoch, as in the paper.
    heldout: share of the sequences that are used only for judging. Use the value of step 1, so that neither step is
        fitted on the judged sequences.
    seed: seed of the held-out choice (as in step 1), the start and the order of minibatches.
    device: where to train, such as cpu or cuda.
    resume: file in which the state of the training is stored.
    """
    check(fit, locals())
    began = time.perf_counter()
    train, judged = _data(hidden, kernel, heldout, seed, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network(train.z_NF.cpu(), train.h_ND.cpu(), width, activation, standardise).to(device)
    if start == "ridge":
        network.start_linear(train.z_NF, train.h_ND, RIDGE)
    curve = _train(network, train, judged, norm_loss, start, epochs, lr, batch, keep,
                   torch.Generator().manual_seed(seed), resume)
    stats = {"heldout_error": _error(network, judged), "tokens": len(train.z_NF),
             "seconds": time.perf_counter() - began + resume.earlier_s}
    return _absorbed(network, kernel, activation, curve, stats)


def _data(hidden: HiddenStates, kernel: KernelMap, heldout: float, seed: int, device: str) -> tuple[_Data, _Data]:
    """Two results, for training and for judging: the features z that the chain of operators computes, and the target
    states."""
    massive = "raw" if kernel.bypass_above is None else "bypass"
    states = load(hidden, kernel.block, massive=massive, heldout=heldout, seed=seed)
    product_FF = chain(kernel.operators_KFF).float().to(device)
    parts = []
    for which in (states.train, states.heldout):
        h_KND = states.tokens(which).to(device)
        # z = A_k ... A_1 phi(h_l)
        x_ND = lift_input(h_KND[0], kernel.lift_input)
        phi_NF = features_of(x_ND, kernel.omega_DM.to(device), kernel.b_M.to(device))
        parts.append(_Data(phi_NF @ product_FF.T, h_KND[-1]))
    return parts[0], parts[1]


def _train(network: Network, train: _Data, judged: _Data, norm_loss: str, start: str, epochs: int, lr: float,
           batch: int, keep: str, generator: torch.Generator, resume: Resume) -> list[dict[str, Any]]:
    """Train the network in place, and return one entry for each epoch. A single token can spoil the weights, even late
    in the training."""
    adam = torch.optim.Adam(network.parameters(), lr=lr)
    progress = Progress(resume, list(network.parameters()), {"adam": adam, "order": generator}, curve=[], best={},
                        total=0.0)
    if start == "ridge" and not progress.values["curve"]:
        with torch.no_grad():
            total = equation_6(network(train.z_NF), train.h_ND, norm_loss, network.unit).item()
        _judge(network, judged, norm_loss, progress, keep, 0, total)
    for epoch in progress.epochs(epochs):
        order = progress.order(lambda: torch.randperm(len(train.z_NF), generator=generator))
        for part in progress.updates(order.split(batch)):
            loss = equation_6(network(train.z_NF[part]), train.h_ND[part], norm_loss, network.unit)
            descend(loss, adam, training=f"step 2, epoch {epoch}", remedy="lower inverse.lr")
            progress.values["total"] += loss.item() * len(part) / len(train.z_NF)
        total, progress.values["total"] = progress.values["total"], 0.0
        _judge(network, judged, norm_loss, progress, keep, epoch, total)
        logger.info("step 2: epoch %d of %d, loss %.4g, held out %.4g", epoch, epochs, total,
                    progress.values["curve"][-1]["heldout_loss"])
    network.load_state_dict(progress.values["best"] or network.state_dict())
    return progress.values["curve"]


@torch.no_grad()
def _judge(network: Network, judged: _Data, norm_loss: str, progress: Progress, keep: str, epoch: int,
           loss: float) -> None:
    """Add an epoch to the curve. If `keep` is `best` and the held-out error is the lowest so far, store a copy of the
    weights."""
    heldout_loss = equation_6(network(judged.z_NF), judged.h_ND, norm_loss, network.unit).item()
    curve = progress.values["curve"]
    curve.append({"epoch": epoch, "seconds": progress.seconds(), "loss": loss, "heldout_loss": heldout_loss,
                  "heldout_error": _error(network, judged)})
    if keep == "best" and curve[-1]["heldout_error"] <= min(entry["heldout_error"] for entry in curve):
        progress.values["best"] = {name: value.clone() for name, value in network.state_dict().items()}


def equation_6(predicted_ND: Tensor, h_ND: Tensor, norm_loss: str = "none", unit: float = 1.0) -> Tensor:
    """Mean over tokens of |I(z) - h|^2 in units of `unit` squared, divided by the width, plus L_norm."""
    # |I(z) - h|^2
    loss = (predicted_ND - h_ND).square().mean() / unit ** 2
    norm_N = h_ND.norm(dim=-1).clamp_min(1e-12)
    if norm_loss == "relative":
        loss = loss + ((predicted_ND - h_ND).square().sum(-1) / norm_N.square()).mean()
    if norm_loss == "gap":
        loss = loss + (predicted_ND.norm(dim=-1) / norm_N - 1).square().mean()
    return loss


@torch.no_grad()
def _error(network: Network, judged: _Data) -> float:
    return relative_error(network(judged.z_NF), judged.h_ND)


def _absorbed(network: Network, kernel: KernelMap, activation: str, curve: list[dict[str, Any]],
              stats: dict[str, Any]) -> Inverse:
    """The record, with the standardisation of z moved into W1 and b1: W1 (z - mean) / std + b1."""
    network = network.cpu().double()
    with torch.no_grad():
        w1_HF = network.w1.weight / network.std_F
        b1_H = network.w1.bias - w1_HF @ network.mean_F
        return Inverse(kernel.block, w1_HF.float(), b1_H.float(), network.w2.weight.float(), network.w2.bias.float(),
                       network.unit * network.alpha.item(), activation, curve, stats)


def to_module(kernel: KernelMap, inverse: Inverse) -> Module:
    """The folded block of both steps: features, linear map, activation, linear map. Products are computed in float64,
    so no precision is lost."""
    m = len(kernel.b_M)
    # W1 <- W1 A_k ... A_1 / sqrt(m),  W2 <- alpha W2,  b2 <- alpha b2
    w1_HF = inverse.w1_HF.double() @ chain(kernel.operators_KFF) / math.sqrt(m)
    tensors = {"omega": kernel.omega_DM.T, "phase": kernel.b_M, "w1.weight": w1_HF.float(), "w1.bias": inverse.b1_H,
               "w2.weight": (inverse.alpha * inverse.w2_DH.double()).float(),
               "w2.bias": (inverse.alpha * inverse.b2_D.double()).float()}
    options = {"width": kernel.omega_DM.shape[0], "frequencies": m, "hidden": w1_HF.shape[0],
               "activation": inverse.activation, "lift_input": kernel.lift_input, "bypass_above": kernel.bypass_above}
    return Module(kernel.block, "rff_mlp", options, {name: t.contiguous() for name, t in tensors.items()})


def module_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Parameters of the folded block, from the options of both steps."""
    F = settings(step_1.fit, options.get("kernel", {}))["features"]
    H = settings(fit, options.get("inverse", {}))["width"]
    # Omega and b, W1 A_k .. A_1 and b1, alpha W2 and alpha b2
    return F // 2 * (facts.width + 1) + H * (F + 1) + facts.width * (H + 1)
