"""Functions that rankings of layers share: the next-token loss without some layers, its gradients, and the ranking.

    L = -1/N sum_t log q(x_t+1 | x_1 .. x_t),    the mean over all tokens that have a next token.

A `Judge` contains the states before every layer of the already pruned model. The pruned model computes these states
once; they are not read from disk, because stored states may be rounded to half precision. If a candidate differs from
the model only in layer j and later layers, only layer j and later layers are run. The losses equal the losses of runs
through all layers, but cost only half as much. The gradients equal those of one backward pass over all sequences. The
gradients are computed layer by layer from stored states, so that only one layer's gradients are in memory at a time.
"""
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdp_core.base.records import Search, Tokens
from kdp_core.model.passes import Passes
from kdp_core.states.hidden import boundary_states


class RankError(ValueError):
    """The options or states do not allow a ranking of layers."""


class Judge(NamedTuple):
    """A model, and the sequences on which the loss of the model is computed."""
    passes: Passes
    ids_ST: Tensor
    states: dict[int, Tensor]
    """h_STD, float32 on the CPU, before each layer of the already pruned model."""
    batch_sequences: int


def ranked(scores: dict[int, float], criterion: str, k_max: int, evaluations: int, stats: dict[str, Any]) -> Search:
    """Rank layers by their scores; the scores are not computed again after a removal. The layer with the lowest score
    is removed first. If scores are equal, the lower layer is removed first."""
    if broken := [layer for layer, score in scores.items() if not math.isfinite(score)]:
        raise RankError(f"layer {broken[0]}: its {criterion} is {scores[broken[0]]}; try dtype float32 for the model")
    order = sorted(scores, key=lambda layer: (scores[layer], layer))
    return Search(order, [scores[layer] for layer in order], criterion, k_max,
                  {str(layer): score for layer, score in scores.items()}, evaluations, stats)


def picked(tokens: Tokens, sequences: int | None, seed: int) -> Tensor:
    """The ids of `sequences` sequences, which `seed` selects at random. The selected sequences keep their order. If
    `sequences` is None or too large, all sequences are selected."""
    S, T = tokens.ids_ST.shape
    if T < 2:
        raise RankError(f"sequences of {T} tokens have no next token to predict; pack longer ones")
    drawn = torch.randperm(S, generator=torch.Generator().manual_seed(seed))[:sequences].sort().values
    return tokens.ids_ST[drawn]


def judge_of(model: nn.Module, ids_ST: Tensor, batch_sequences: int) -> Judge:
    """Make a Judge of the dense model. The dense model computes the states of the sequences."""
    passes = Passes(model, ids_ST.shape[1])
    numbers = list(range(len(passes.layers)))
    batches = [boundary_states(model, ids_BT, numbers) for ids_BT in ids_ST.split(batch_sequences)]
    return Judge(passes, ids_ST, {number: torch.cat([batch[number] for batch in batches]) for number in numbers},
                 batch_sequences)


@torch.no_grad()
def loss_nats(judge: Judge, start: int, path: Sequence[int]) -> float:
    """Mean next-token loss of a model that runs only the layers of `path` on the states before layer `start`."""
    passes, total = judge.passes, 0.0
    for h_BTD, ids_BT in zip(judge.states[start].split(judge.batch_sequences),
                             judge.ids_ST.split(judge.batch_sequences), strict=True):
        last_BTD = passes.run(h_BTD.to(passes.device, passes.model.dtype), path)
        total += _summed_nats(passes, last_BTD, ids_BT)
    loss = total / judge.ids_ST[:, 1:].numel()
    if not math.isfinite(loss):
        raise RankError(f"the loss from layer {start} through {len(path)} layers is {loss}; try dtype float32 for the "
                        "model")
    return loss


def _summed_nats(passes: Passes, h_BTD: Tensor, ids_BT: Tensor) -> float:
    """Sum of the loss over all tokens that have a next token. Logits (C, V) are computed for one chunk of tokens at a
    time."""
    x_ND = passes.to_head(h_BTD)[:, :-1].flatten(0, 1)
    next_N = ids_BT[:, 1:].flatten().to(x_ND.device)
    # -sum_t log q(x_t+1 | x_1 .. x_t)
    return sum(functional.cross_entropy(passes.head(x_CD), next_C, reduction="sum").item()
               for x_CD, next_C in zip(x_ND.split(passes.head.chunk()), next_N.split(passes.head.chunk()), strict=True))


def backward(judge: Judge, layers: range, weights_of: Callable[[nn.Module], list[nn.Parameter]],
             squared: bool = False) -> Iterator[tuple[int, list[nn.Parameter], list[Tensor], list[Tensor]]]:
    """One backward pass of the loss, summed over all predictions. Only one layer's gradients are in memory at a time.

    The layers are processed from the last to the first. For each of `layers` the function yields the number of the
    layer, the weights that `weights_of` returns, and the gradients of these weights. If `squared` is true, the function
    also yields the squared gradients of single sequences, summed over the sequences.
    """
    # gradients of single sequences are squared, so each batch is one sequence
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

    The loss is a sum and not a mean, because gradients divided by thousands of tokens would vanish in half precision.
    """
    h_BTD = h_BTD.to(passes.device, passes.model.dtype).detach().requires_grad_()
    x_ND = passes.to_head(h_BTD)[:, :-1].flatten(0, 1)
    chunk, gradients = passes.head.chunk(), []
    for x_CD, next_C in zip(x_ND.detach().split(chunk), ids_BT[:, 1:].flatten().split(chunk), strict=True):
        # -sum_t log q(x_t+1 | x_1 .. x_t)
        logits_CV = passes.head(x_CD.requires_grad_())
        loss = functional.cross_entropy(logits_CV, next_C.to(logits_CV.device), reduction="sum")
        gradients += torch.autograd.grad(loss, x_CD)
    gradient, = torch.autograd.grad(x_ND, h_BTD, torch.cat(gradients))
    return gradient.float().cpu()


def _layer_gradients(judge: Judge, layer: int, weights: list[nn.Parameter], goal_STD: Tensor,
                     squared: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The backward pass through one layer. `goal_STD` is the gradient of the state after the layer. Three results: the
    gradient of the state before the layer, the gradients of the weights summed over all batches, and the sums of the
    squared gradients."""
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
