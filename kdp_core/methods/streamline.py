"""LLM-Streamline (Chen et al. 2025, arXiv 2403.19135) replaces a run of layers by one trained decoder layer.

Layers s+1 .. e-1 are removed. The layer g starts from the weights of layer s. The layer g is trained to replace the
whole run. All parts of g are trained, including the attention:
    g = argmin mean_n w_n |g(state s)_n - state e_n|^2.
The optimiser is AdamW, with a learning rate that falls as a cosine. The pruned model is an ordinary checkpoint of its
family, without layers s+1 .. e-1 and with other weights in layer s. Per-layer lists of the configuration (kind of
attention) keep their entry for layer s.

In the paper, the trained layer is one of the model's own layers too. The released code trains this layer without a
mask, so that each position sees later positions. The released code counts the updates wrongly, so the learning rate
follows only the first eighth of the cosine. In this module the layer runs with the masks and positions that it has in
the model (kdp_core.model.passes). The cosine of the learning rate ends at the last update. The released code keeps only
a reference to the best weights, so it returns the last weights instead. This module copies the weights of the best
epoch and returns the layer with this copy. If no epoch improves the held-out loss, the weights of the start are used.
The held-out loss of the result is therefore never higher than at the start.

The paper's loss gives all tokens the same weight, w_n = 1 / D. The norms of massive-activation tokens are hundreds of
times those of other tokens, so massive tokens dominate this loss. But a layer after the run reads a state through a
norm, so the relative error of each token matters: w_n = 1 / |state e_n|^2 in `streamline_relative`, our variant.
Massive tokens then have the same weight as other tokens. In kdp_residual, massive tokens bypass the stand-in.
LLM-Streamline has no such bypass, so its stand-in must also be fitted to massive tokens. A run may contain the layer
that makes tokens massive. Without massive tokens, the attention loses its sink. The paper trains for one epoch on long
texts: 30,000 texts in the paper, 100,000 texts in the code. Ten epochs over a few hundred short texts are about a
hundred updates. The ten epochs cost about as much as one forward pass of a 30-layer model over these texts. Held-out
sequences choose the best epoch.
"""
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.options import Count, Natural, NotNegative, Positive, Share, check
from kdp_core.base.records import Composed, ModelFacts, Plan, Selection, Tokens
from kdp_core.base.resume import OFF, Progress, Resume
from kdp_core.methods._method import Method, Sizes
from kdp_core.methods._select import most_alike
from kdp_core.methods._train import copies, cosine, descend, restore
from kdp_core.model import checkpoints
from kdp_core.model.families import family_of
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params
from kdp_core.states.block import Counted, FitError, TokenWeight, relative_error, split
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


class _Options(NamedTuple):
    """Options of the training; see `compose`."""
    lr: float
    min_lr: float
    weight_decay: float
    epochs: int
    batch_sequences: int
    clip: float
    massive: str
    token_weight: str
    heldout: float
    seed: int


class _Data(NamedTuple):
    """The inputs and the targets of the layer."""
    start_STD: Tensor
    goal_STD: Tensor
    weight_ST: Tensor
    """w_n of each token; 0 for tokens that are excluded from the loss."""


class _Trained(NamedTuple):
    """The result of the training. This record does not contain the weights of the best epoch: they are in the trained
    layer itself."""
    curve: list[dict[str, Any]]
    epoch: int
    """The epoch whose weights are used; 0 is the start."""


def module_params(facts: ModelFacts, options: dict[str, dict[str, Any]]) -> int:
    """Number of parameters of the layer that replaces the run."""
    return facts.params_per_layer[0]


def training(method: str, weight: TokenWeight) -> Callable[..., Composed]:
    """Make the function `compose` of a method. `weight` is the default of its option `token_weight`."""

    def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
                dtype: str = "float32", lr: Positive = 2e-4, min_lr: NotNegative = 5e-5,
                weight_decay: NotNegative = 1e-3, epochs: Natural = 10, batch_sequences: Count = 8,
                clip: Positive = 5.0, massive: Counted = "raw", token_weight: TokenWeight = weight,
                heldout: Share = 0.1, seed: Natural = 0, resume: Resume = OFF) -> Composed:
        """Train the first layer of a run to replace the whole run, and remove the other layers of the run.

        lr: learning rate of AdamW at the first update.
        min_lr: learning rate at the last update. From `lr` to `min_lr`, the rate falls as a cosine.
        weight_decay: weight decay of AdamW, for all trained weights.
        epochs: passes over the sequences. The weights of the epoch with the lowest held-out loss are used, or those of
            the start if their loss is lower. With 0 epochs the start is used.
        batch_sequences: number of sequences in one update.
        clip: largest norm of the gradient.
        massive: `raw` treats all tokens in the same way; `mask` excludes massive tokens from the loss.
        token_weight: `none` gives all tokens the same weight, as the paper does. `inverse_norm` gives a token the
            weight 1 / |target state|^2, so that the loss is a sum of relative errors.
        heldout: share of the sequences that are used only for judging, never for training.
        seed: seed of the held-out choice and of the order of training.
        resume: file in which the state of the training is stored.
        Raises FitError, before any model is loaded, if the options, the run and the states do not match. Raises
        TrainingFailed for a loss that is not a number.
        """
        check(compose, locals())
        began = time.perf_counter()
        options = _Options(lr, min_lr, weight_decay, epochs, batch_sequences, clip, massive, token_weight, heldout,
                           seed)
        _check(options, selection, hidden.sequences)
        start, stop = selection.blocks[0]
        data = _data(hidden, start, stop, options)
        held, kept = split(hidden.sequences, heldout, seed)
        model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
        passes = Passes(model, hidden.tokens)
        # the layer is trained in float32, whatever the precision of the model is
        layer = passes.layers[start].float().requires_grad_(True)
        trained = _train(passes, start, data, kept, held, options, resume)
        prefix = f"{family_of(model).prefix}{start}."
        tensors = {prefix + name: weight.detach().cpu().clone() for name, weight in layer.named_parameters()}
        error = _error(passes, start, data, held, ~hidden.massive([start, stop]), batch_sequences)
        plan = Plan(method, [(number, "whole") for number in range(start + 1, stop)], [], tensors)
        return Composed(plan, trained.curve, [{"block": (start, stop), "heldout_error": error,
                                               "params": count_params(layer)}],
                        {"tokens": len(kept) * hidden.tokens, "epoch": trained.epoch,
                         "heldout_loss": trained.curve[trained.epoch]["heldout_loss"],
                         "seconds": time.perf_counter() - began + resume.earlier_s})

    return compose


def _check(options: _Options, selection: Selection, sequences: int) -> None:
    blocks = selection.blocks
    if len(blocks) != 1 or blocks[0][1] - blocks[0][0] < 2:
        raise FitError(f"LLM-Streamline replaces one run of two layers or more by one layer; the blocks are {blocks}; "
                       "raise the ratio")
    if options.min_lr > options.lr:
        raise FitError(f"compose.lr is {options.lr} and min_lr {options.min_lr}; the rate falls from lr to min_lr, so "
                       "give a min_lr of at most lr")
    if max(1, round(options.heldout * sequences)) >= sequences:
        raise FitError(f"compose.heldout {options.heldout} of {sequences} sequences "
                       "leaves none to fit on or none to judge on; change it or add calibration sequences")


def _data(hidden: HiddenStates, start: int, stop: int, options: _Options) -> _Data:
    """The states before and after the run, and the weight of each token."""
    start_STD, goal_STD = hidden.state(start), hidden.state(stop)
    for number, h_STD in ((start, start_STD), (stop, goal_STD)):
        if not torch.isfinite(h_STD).all():
            raise FitError(f"{hidden.path}: state {number} is not finite; extract the hidden states again")
    weight_ST = torch.full(goal_STD.shape[:2], 1 / goal_STD.shape[-1])
    if options.token_weight == "inverse_norm":
        # w_n = 1 / |y_n|^2: the loss is a sum of relative errors
        weight_ST = 1 / goal_STD.square().sum(dim=-1).clamp_min(1e-12)
    massive_ST = hidden.massive([start, stop])
    if massive_ST.all():
        raise FitError(f"run {start}-{stop}: every token is massive; raise hidden.massive_factor")
    return _Data(start_STD, goal_STD, weight_ST * ~massive_ST if options.massive == "mask" else weight_ST)


def _train(passes: Passes, number: int, data: _Data, kept: Tensor, held: Tensor, options: _Options,
           resume: Resume) -> _Trained:
    """Train the layer with the number `number` inside its model. At the end the layer has the weights with the lowest
    held-out loss."""
    weights = list(passes.layers[number].parameters())
    adam = torch.optim.AdamW(weights, lr=options.lr, weight_decay=options.weight_decay)
    generator, batch = torch.Generator().manual_seed(options.seed), options.batch_sequences
    each = math.ceil(len(kept) / batch)
    progress = Progress(resume, weights, {"adam": adam, "order": generator}, best=0, best_weights=copies(weights),
                        sums=0.0, curve=[{"epoch": 0, "seconds": 0.0, "lr": None, "loss": None,
                                          "heldout_loss": _judge(passes, number, data, held, batch)}])
    values, curve = progress.values, progress.values["curve"]
    for epoch in progress.epochs(options.epochs):
        order = progress.order(lambda: kept[torch.randperm(len(kept), generator=generator)])
        for which in progress.updates(order.split(batch)):
            update = (epoch - 1) * each + progress.update
            adam.param_groups[0]["lr"] = _rate(update, options.epochs * each, options.lr, options.min_lr)
            values["sums"] += _update(passes, number, data, which, adam, options.clip)
        loss, values["sums"] = values["sums"] / _counted(data, kept), 0.0
        curve.append({"epoch": epoch, "seconds": progress.seconds(), "lr": adam.param_groups[0]["lr"], "loss": loss})
        with progress.judging():
            curve[epoch]["heldout_loss"] = _judge(passes, number, data, held, batch)
        logger.info("epoch %d of %d: loss %.4g, held out %.4g", epoch, options.epochs, loss,
                    curve[epoch]["heldout_loss"])
        if curve[epoch]["heldout_loss"] < curve[values["best"]]["heldout_loss"]:
            values |= {"best": epoch, "best_weights": copies(weights)}
    restore(weights, values["best_weights"])
    return _Trained(curve, values["best"])


def _rate(update: int, total: int, lr: float, min_lr: float) -> float:
    """The learning rate of an update: `lr` at the first of `total` updates, and `min_lr` at the last update."""
    # eta = eta_min + (eta_max - eta_min) (1 + cos(pi t / (T - 1))) / 2
    return min_lr + (lr - min_lr) * cosine(update, total - 1)


def _update(passes: Passes, number: int, data: _Data, which: Tensor, adam: torch.optim.Optimizer,
            clip: float) -> float:
    """One update. Returns the loss, summed over the tokens of the update."""
    sums = _sum(passes, number, data, which)
    descend(sums / _counted(data, which), adam, training="LLM-Streamline", remedy="lower compose.lr", clip=clip)
    return sums.item()


def _sum(passes: Passes, number: int, data: _Data, which: Tensor) -> Tensor:
    """The loss of the sequences `which`, summed over tokens."""
    predicted_BTD = passes.layer(number, data.start_STD[which].to(passes.device))
    goal_BTD, weight_BT = data.goal_STD[which].to(passes.device), data.weight_ST[which].to(passes.device)
    # sum_n w_n |g(state s)_n - state e_n|^2
    return (weight_BT * (predicted_BTD - goal_BTD).square().sum(dim=-1)).sum()


def _counted(data: _Data, which: Tensor) -> int:
    """Number of tokens that are part of the loss, in the sequences `which`. If all tokens are excluded, the number is
    1, because the loss is 0 then."""
    return max(1, int((data.weight_ST[which] > 0).sum()))


@torch.no_grad()
def _judge(passes: Passes, number: int, data: _Data, held: Tensor, batch: int) -> float:
    """The loss of the sequences `held`, as a mean over the tokens that are part of the loss."""
    return sum(_sum(passes, number, data, which).item() for which in held.split(batch)) / _counted(data, held)


@torch.no_grad()
def _error(passes: Passes, number: int, data: _Data, held: Tensor, keep_ST: Tensor, batch: int) -> float:
    """Relative squared error over the tokens that `keep_ST` marks. Massive tokens would dominate an error over all
    tokens."""
    predicted_STD = torch.cat([passes.layer(number, data.start_STD[which].to(passes.device)).cpu()
                               for which in held.split(batch)])
    return relative_error(predicted_STD[keep_ST[held]], data.goal_STD[held][keep_ST[held]])


def _flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    return given["epochs"] * sizes.tokens * 6 * sizes.layer_macs


METHODS = (
    Method("streamline", "Chen et al. 2025, LLM-Streamline: a run of layers replaced by one trained layer",
           "layers replaced", most_alike, module_params=module_params, compose=training("streamline", "none"),
           flops={"compose": _flops}, keeps=1, example={"compose": {"epochs": 2, "heldout": 0.2}}),
    Method("streamline_relative", "Chen et al. 2025, LLM-Streamline, with relative errors of tokens in its loss, a "
                                  "variant of ours", "layers replaced", most_alike, module_params=module_params,
           compose=training("streamline_relative", "inverse_norm"), flops={"compose": _flops}, keeps=1,
           example={"compose": {"epochs": 2, "heldout": 0.2}}),
    Method("cosine_run", "Chen et al. 2025, LLM-Streamline's selection alone, as LoRP compares with it",
           "layers removed", most_alike),
)
