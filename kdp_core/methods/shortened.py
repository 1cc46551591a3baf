"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834): layers ranked once, by one of three criteria.

perplexity  PPL_n = exp(L(model without layer n)) on calibration text.
taylor      I_n = sum_k sum_ij |dL/dW_ij W_ij|, W = W^{k,n} the weights of layer n, L the mean loss of the next token.
magnitude   I_n = sum_k sum_ij |W_ij|: no data.

The lowest goes first; of equal ones the lowest layer. The paper keeps the first four and the last two layers whatever
they score (its "+"): by Taylor and magnitude layer 0 would be among the first to go. The released code applies it when
it removes and writes unprotected orders (kdp_core.study.oracles); here protected layers are not ordered at all.

The paper sums over linear weights; the released code adds the weights of the norms, and so do we. Biases never count
(LLaMA has none, OPT has). Gemma's norms multiply by 1 + w: that gain counts, where the code would read w, as I_n stands
for what is lost when a factor becomes 0.

Perplexities start at the states before the removed layer, as SLEB's losses here. The gradients are those of one
backward pass over all sequences, but made layer by layer from kept states, so that only one layer's stand in memory.
"""
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kdp_core.base.records import ModelFacts, Search, Tokens
from kdp_core.methods.shortgpt import RankError, ranked
from kdp_core.methods.sleb import Judge, judge_of, loss_nats, picked
from kdp_core.model import checkpoints
from kdp_core.model.distil import token_losses
from kdp_core.model.families import Family, decoder_layers, family_of
from kdp_core.model.passes import Passes
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)

NORMS = ("l1", "l2")


def perplexity(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int,
               device: str = "cpu", dtype: str = "float32", keep_first: int = 4, keep_last: int = 2,
               sequences: int | None = 10, batch_sequences: int = 8, seed: int = 0) -> Search:
    """Rank layers by the perplexity of the model without each.

    k_max: not read: neighbours may go.
    keep_first: layers at the start that stay.
    keep_last: layers at the end that stay.
    sequences: judged on; null, or more than there are, means all.
    batch_sequences: sequences of a forward pass.
    seed: of the choice of sequences.
    Raises RankError for options out of range, for sequences without a next token and for a loss that is not finite.
    """
    began = time.perf_counter()
    eligible = _eligible(facts.layers, keep_first, keep_last)
    ids_ST = picked(tokens, sequences, batch_sequences, seed)
    judge = judge_of(checkpoints.load_model(dense, device=device, dtype=dtype), ids_ST, batch_sequences)
    scores = {}
    for layer in eligible:
        # PPL_n = exp(L(model without layer n))
        scores[layer] = math.exp(loss_nats(judge, layer, range(layer + 1, facts.layers)))
        logger.info("without layer %d of %d: perplexity %.2f", layer, eligible[-1], scores[layer])
    stats = {"tokens": ids_ST.numel(), "sequences": len(ids_ST),
             "dense_ppl": math.exp(loss_nats(judge, facts.layers - 1, [facts.layers - 1])),
             "seconds": time.perf_counter() - began}
    return ranked(scores, "ppl", k_max, len(eligible), stats)


def taylor(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int, device: str = "cpu",
           dtype: str = "float32", keep_first: int = 4, keep_last: int = 2, sequences: int | None = 10,
           batch_sequences: int = 8, seed: int = 0) -> Search:
    """Rank layers by the sum of |weight times gradient| over their linear and norm weights; biases do not count.

    k_max: not read: neighbours may go.
    keep_first: layers at the start that stay.
    keep_last: layers at the end that stay.
    sequences: whose mean loss is differentiated; null, or more than there are, means all.
    batch_sequences: sequences of a forward pass; gradients are summed over all before their size is taken.
    seed: of the choice of sequences.
    Raises RankError for options out of range, for sequences without a next token and for a score that is not finite.
    """
    began = time.perf_counter()
    eligible = _eligible(facts.layers, keep_first, keep_last)
    ids_ST = picked(tokens, sequences, batch_sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    scores = _first_order(judge_of(model, ids_ST, batch_sequences), eligible)
    stats = {"tokens": ids_ST.numel(), "sequences": len(ids_ST), "seconds": time.perf_counter() - began}
    return ranked(scores, "taylor", k_max, 1, stats)


def magnitude(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int,
              device: str = "cpu", dtype: str = "float32", norm: str = "l1", keep_first: int = 4,
              keep_last: int = 2) -> Search:
    """Rank layers by the size of their linear and norm weights; biases do not count, no data is read.

    k_max: not read: neighbours may go.
    norm: `l1` sums absolute values, `l2` squares.
    keep_first: layers at the start that stay.
    keep_last: layers at the end that stay.
    Raises RankError for options out of range.
    """
    began = time.perf_counter()
    eligible = _eligible(facts.layers, keep_first, keep_last)
    if norm not in NORMS:
        raise RankError(f"search.norm {norm!r}: choose one of {', '.join(NORMS)}")
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    scores = {}
    for layer in eligible:
        sizes = (_gain(weight.detach(), family_of(model)).abs() for weight in _weights(decoder_layers(model)[layer]))
        # I_n = sum_k sum_ij |W_ij|, or W_ij^2
        scores[layer] = sum((size if norm == "l1" else size.square()).sum(dtype=torch.float64).item() for size in sizes)
    return ranked(scores, f"magnitude_{norm}", k_max, 0, {"tokens": 0, "seconds": time.perf_counter() - began})


def _eligible(layers: int, keep_first: int, keep_last: int) -> range:
    """Layers that may go."""
    if keep_first < 0 or keep_last < 0 or keep_first + keep_last >= layers:
        raise RankError(f"search.keep_first {keep_first} and keep_last {keep_last} of {layers} layers leave none that "
                        "may go; lower them, not below 0")
    return range(keep_first, layers - keep_last)


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """Of all linear maps and norms of a layer, those of heads' queries and keys in."""
    return [module.weight for module in layer.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]


def _gain(weight: Tensor, family: Family) -> Tensor:
    """What states are multiplied by, float32: of a norm, whose weight has one axis, with what its family adds."""
    return weight.float() + (family.gain_offset if weight.ndim == 1 else 0.0)


def _first_order(judge: Judge, eligible: range) -> dict[int, float]:
    """sum |W dL/dW| of each eligible layer, from the last layer back."""
    scores, family = {}, family_of(judge.passes.model)
    for layer, weights, gradients, _ in backward(judge, eligible, _weights):
        # I_n = sum_k sum_ij |dL/dW_ij W_ij|, L the mean over all predictions
        products = (gradient * _gain(weight.detach(), family)
                    for gradient, weight in zip(gradients, weights, strict=True))
        scores[layer] = (sum(one.abs().sum(dtype=torch.float64).item() for one in products)
                         / judge.ids_ST[:, 1:].numel())
        logger.info("layer %d of %d: %.4g", layer, eligible.start, scores[layer])
    return {layer: scores[layer] for layer in eligible}


def backward(judge: Judge, layers: range, weights_of: Callable[[nn.Module], list[nn.Parameter]],
             squared: bool = False) -> Iterator[tuple[int, list[nn.Parameter], list[Tensor], list[Tensor]]]:
    """One backward pass of the loss summed over all predictions; only one layer's gradients stand in memory.

    Of each of `layers`, the last first: its number, the weights that `weights_of` names, their gradients and, where
    `squared`, the sums over sequences of the squared gradients of each, else none.
    """
    # squares are of single sequences, so these go one by one
    judge = judge._replace(batch_sequences=1) if squared else judge
    passes, last = judge.passes, len(judge.passes.layers) - 1
    final_STD = passes.run_batches(judge.states[last], [last], judge.batch_sequences)
    goal_STD = torch.cat([_head_gradient(passes, h_BTD, ids_BT) for h_BTD, ids_BT in
                          zip(final_STD.split(judge.batch_sequences), judge.ids_ST.split(judge.batch_sequences),
                              strict=True)])
    for layer in range(last, layers.start - 1, -1):
        weights = weights_of(passes.layers[layer]) if layer in layers else []
        goal_STD, gradients, squares = _layer_gradients(judge, layer, weights, goal_STD, squared)
        if layer in layers:
            yield layer, weights, gradients, squares


def _head_gradient(passes: Passes, h_BTD: Tensor, ids_BT: Tensor) -> Tensor:
    """d(summed loss)/d(last state) of a batch, float32 on the CPU.

    The sum, not the mean: half precision would lose gradients divided by thousands of tokens.
    """
    h_BTD = h_BTD.to(passes.device, passes.model.dtype).detach().requires_grad_()
    x_ND = passes.to_head(h_BTD)[:, :-1].flatten(0, 1)
    loss = token_losses(x_ND, x_ND.detach(), ids_BT[:, 1:].flatten(), passes.head, passes.head, kl_weight=0.0).loss
    gradient, = torch.autograd.grad(loss * len(x_ND), h_BTD)
    return gradient.float().cpu()


def _layer_gradients(judge: Judge, layer: int, weights: list[nn.Parameter], goal_STD: Tensor,
                     squared: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """From d/d(state after a layer) those of the state before it and, summed over all batches, of its weights; and
    the sums of their squares."""
    passes, before = judge.passes, []
    summed = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    squares = [torch.zeros_like(total) for total in summed] if squared else []
    for weight in weights:
        weight.requires_grad_(True)
    for h_BTD, goal_BTD in zip(judge.states[layer].split(judge.batch_sequences),
                               goal_STD.split(judge.batch_sequences), strict=True):
        h_BTD = h_BTD.to(passes.device, passes.model.dtype).detach().requires_grad_()
        after_BTD = passes.layer(layer, h_BTD)
        state, *found = torch.autograd.grad(after_BTD, [h_BTD, *weights], goal_BTD.to(after_BTD))
        before.append(state.float().cpu())
        for total, gradient in zip(summed, found, strict=True):
            total += gradient
        for total, gradient in zip(squares, found, strict=squared):
            total += gradient.float().square()
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat(before), summed, squares
