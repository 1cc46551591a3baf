"""Step 1 of KDP: a learnable random-Fourier-feature kernel, in which the map of one layer is nearly linear.

Paper: KDP (ICLR 2026), equations 2 and 5, Algorithm 1 lines 3-10, appendix B. The module `features` defines the
features phi, the operators A_i and the loss. This module trains the features and the operators.

Where the paper is silent or ambiguous (each an argument of `fit`):
- Scale: on raw states, lambda = 0 gives a kernel that is so narrow that no two tokens are similar.
  With `bandwidth: median`, x is therefore divided by `bandwidth_scale` times the median distance of two tokens. With
  `unit`, x is divided by `bandwidth_scale` alone.
- Lift input: `raw` states, or states at unit root mean square (`rms`), as the layers read them.
- The paper says that A_i = I + gamma_i B_i is "initialised at the start of each iteration with its OLS estimate". With
  `ols_every: iteration`, A_i is the least-squares solution of each minibatch. In this case Adam updates only lambda and
  L, because the next least-squares solution would overwrite any update of gamma_i and B_i. With `epoch` or `start`, A_i
  is solved only at the start of an epoch or of the training, and Adam then also updates gamma_i and B_i. After
  training, A_i is solved once more on all training tokens (`final_ols`).
- Equation 5 sums the separate errors of the operators (`loss: steps`). Algorithm 1 line 7 chains all A_i and predicts
  only the last state (`loss: chain`).
- The paper says of the weight W of the cosine term: "greater importance to tokens towards the end" and "a geometric
  sequence with base 2 and exponents from 0 to num_layers - 1"; see `cosine_weights`.
- Here the batch size of 100 is a number of sequences.
- Where the paper sums the loss over tokens, kdp takes the mean. Adam's updates hardly
  depend on this factor.
"""
import logging
import math
import time
from typing import Annotated, Any, Literal, NamedTuple

import torch
from annotated_types import Ge, MultipleOf
from torch import Tensor

from kdp_core.base.options import Count, Natural, NotNegative, Positive, Share, check
from kdp_core.base.records import Block, KernelMap
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.methods._train import TrainingFailed, descend
from kdp_core.methods.kdp.features import Lift, Operators, Weight, chain, cosine_weights, equation_5, ols
from kdp_core.states.block import (
    BlockStates,
    LiftInput,
    Massive,
    gram,
    lift_input,
    load,
    relative_error,
    ridge_solve,
)
from kdp_core.states.hidden import HiddenStates
from kdp_core.states.pairwise import sampled_median_distance

logger = logging.getLogger(__name__)


class KernelCollapsed(RuntimeError):
    """The features hardly differ between tokens. Maps between such features are trivially linear, so the features are
    useless."""


def fit(hidden: HiddenStates, block: Block, *, features: Annotated[int, Ge(2), MultipleOf(2)] = 1024,
        rank: Count = 16, lift: LiftInput = "raw", bandwidth: Literal["median", "unit"] = "median",
        bandwidth_scale: Positive = 3.0, loss: Literal["steps", "chain"] = "steps", weight: Weight = "position",
        massive: Massive = "bypass", epochs: Natural = 100, batch_sequences: Count = 100, lr: Positive = 0.01,
        patience: Natural = 3, factor: Share = 0.5, ols_every: Literal["iteration", "epoch", "start"] = "iteration",
        final_ols: bool = True, ridge: NotNegative = 1e-6, heldout: Share = 0.1, collapse_variance: NotNegative = 1e-4,
        decode_every: Natural = 0, model_layers: int = 0, seed: Natural = 0,
        device: str = "cpu", resume: Resume = OFF) -> KernelMap:
    """Learn the lift and the operators of one block.

    features: dimension of the kernel space, the paper's 2m.
    rank: rank of the low-rank factor L.
    lift: input of the lift: `raw` states, or `rms` (states at unit root mean square).
    bandwidth: `median` (input in units of the median distance) or `unit` (lambda = 0 exactly as printed).
    bandwidth_scale: kernel width at the start, in the units that `bandwidth` names.
    loss: `steps` (equation 5, one error for each operator) or `chain` (Algorithm 1, the last state predicted from the
        first).
    weight: W of the cosine term: none, position, position_depth or step.
    massive: `bypass` excludes massive-activation tokens from the fit, and they bypass the folded block; `raw` treats
        all tokens in the same way.
    epochs: number of passes over the training sequences; the paper trains until convergence, about 100 epochs.
    batch_sequences: number of sequences in a minibatch.
    lr: Adam's learning rate at the start.
    patience: number of epochs without a lower loss after which the learning rate is reduced.
    factor: factor by which each reduction multiplies the learning rate.
    ols_every: when A_i is set to the least-squares solution: at each `iteration`, at each `epoch`, or only at the
        `start`.
    final_ols: whether A_i is solved once more at the end, on all training tokens.
    ridge: ridge of the least squares, relative to the mean diagonal of the Gram matrix.
    heldout: share of the sequences that are used only for judging, never for fitting.
    collapse_variance: the training stops if the held-out variance of phi, summed over features, falls below this value.
    decode_every: number of epochs after which the error of the state decoded by ridge is added to the curve. 0 computes
        this error only at the end.
    model_layers: number of layers of the model, for the weight position_depth; 0 means the index of the last stored
        state.
    seed: seed of Z, V, b, the held-out choice and the order of minibatches.
    device: where to train, such as cpu or cuda.
    resume: file in which the state of the training is stored.
    """
    check(fit, locals())
    began = time.perf_counter()
    states = load(hidden, block, massive=massive, heldout=heldout, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x_ND = lift_input(states.tokens(states.train)[0], lift)
    unit = sampled_median_distance(x_ND, generator) if bandwidth == "median" else 1.0
    phi = Lift(hidden.width, features, rank, bandwidth_scale * unit, generator).to(device)
    operators = Operators(block[1] - block[0], features).to(device)
    run = _Run(states.on(device), phi, operators, lift, loss == "chain", weight, model_layers or hidden.layers[-1],
               ridge, ols_every, device)
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


class _Run(NamedTuple):
    """The data and options that every part of the training needs."""
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
        """phi_KNF of the counted tokens of the given sequences, without gradient."""
        with torch.no_grad():
            return self.phi(lift_input(self.states.tokens(which), self.lift).to(self.device))

    def weights(self, which: Tensor) -> Tensor:
        """W for the counted tokens of the given sequences."""
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
    """Train lambda and L by Adam, and also gamma_i and B_i if least squares does not set them in each iteration.
    Returns one entry for each epoch."""
    learned = [*run.phi.parameters(), *(run.operators.parameters() if run.ols_every != "iteration" else ())]
    adam = torch.optim.Adam(learned, lr=lr)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, factor=factor, patience=patience)
    progress = Progress(resume, [*run.phi.parameters(), *run.operators.parameters()],
                        {"adam": adam, "plateau": plateau, "order": generator}, curve=[], losses=[])
    for epoch in progress.epochs(epochs):
        if progress.update == 0 and (run.ols_every == "epoch" or (run.ols_every == "start" and epoch == 1)):
            run.operators.start(ols(run.features(run.states.train), run.ridge))
        order = progress.order(
            lambda: run.states.train[torch.randperm(len(run.states.train), generator=generator)])
        # minibatches have nearly equal sizes: least squares would fit the few tokens of a small remainder exactly
        for part in progress.updates(order.tensor_split(math.ceil(len(order) / batch))):
            progress.values["losses"].append(_iteration(run, adam, part))
        losses, progress.values["losses"] = progress.values["losses"], []
        entry = {"epoch": epoch, "seconds": progress.seconds(), "lr": adam.param_groups[0]["lr"]}
        entry |= {name: sum(loss[name] for loss in losses) / len(losses) for name in losses[0]}
        plateau.step(entry["loss"])
        with progress.judging():
            entry |= run.judge() | {"operator_norm": torch.linalg.matrix_norm(run.operators().detach(), ord=2).tolist()}
            progress.values["curve"].append(entry)
            _check(entry, collapse_variance)
            if decode_every and epoch % decode_every == 0:
                entry |= _decode_errors(run, run.operators().detach(), run.features(run.states.train), run.ridge)
        logger.info("step 1: epoch %d of %d, loss %.4g, held out %.4g", epoch, epochs, entry["loss"],
                    entry["heldout_loss"])
    return progress.values["curve"]


def _iteration(run: _Run, adam: torch.optim.Optimizer, which: Tensor) -> dict[str, float]:
    """One minibatch: the least-squares solution if `ols_every` is `iteration`, the loss of equation 5, and one update
    of Adam."""
    phi_KNF = run.phi(lift_input(run.states.tokens(which), run.lift).to(run.device))
    if not math.isfinite(phi_KNF.sum().item()):
        raise TrainingFailed("step 1: the features are not finite; lower kernel.lr")
    if run.ols_every == "iteration":
        run.operators.start(ols(phi_KNF.detach(), run.ridge))
    a_KFF = run.operators()
    a_KFF = a_KFF.detach() if run.ols_every == "iteration" else a_KFF
    loss = equation_5(a_KFF, phi_KNF, run.weights(which), chained=run.chained)
    descend(loss.total, adam, training="step 1", remedy="lower kernel.lr, or look for broken hidden states")
    return {"loss": loss.total.item(), "mse": loss.mse.item(), "cos": loss.cos.item()}


def _check(entry: dict[str, Any], collapse_variance: float) -> None:
    if not math.isfinite(entry["heldout_loss"]):
        raise TrainingFailed(f"step 1, epoch {entry['epoch']}: the held-out loss is not a number; lower kernel.lr")
    if entry["phi_variance"] < collapse_variance:
        raise KernelCollapsed(f"step 1, epoch {entry['epoch']}: the features are nearly constant (variance "
                              f"{entry['phi_variance']:.2g} of 1, limit {collapse_variance:g}), which makes any map "
                              "linear and loses the state; lower kernel.bandwidth_scale, kernel.lr or kernel.epochs")


def _decode_errors(run: _Run, a_KFF: Tensor, phi_KNF: Tensor, ridge: float) -> dict[str, float]:
    """Two held-out relative errors of the last state, which a ridge regression decodes: once from the features that the
    chain predicts, and once from the true features.

    If the features collapse, the loss of equation 5 falls, but these two errors do not fall. The errors can therefore
    judge a lift.
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
