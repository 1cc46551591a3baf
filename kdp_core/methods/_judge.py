"""Functions that rankings of layers share: the next-token loss without some layers, its gradients, and the ranking.

    L = -1/N sum_t log q(x_t+1 | x_1 .. x_t),    the mean over all tokens that have a next token.

A `Judge` contains the states before every layer of the already pruned model. The pruned model computes these states
once; they are not read from disk, because stored states may be rounded to half precision. If a candidate differs from
the model only in layer j and later layers, only layer j and later layers are run. The losses equal the losses of runs
through all layers, but cost only half as much. The gradients equal those of one backward pass over all sequences. The
gradients are computed layer by layer, so that only one layer's gradients are in memory at a time. If there are several
batches, each layer runs again on its stored states. If all sequences are in one batch, one forward pass is enough, but
the activations of all layers are in memory then.
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


def judge_of(model: nn.Module, ids_ST: Tensor, batch_sequences: int, *, graphs: bool = False) -> Judge:
    """Make a Judge of the dense model. The dense model computes the states of the sequences.

    graphs: for `backward` without squared gradients. If all sequences are in one batch, the Judge then contains only
        the states before the first layer, and `backward` keeps the graph of its forward pass.
    """
    passes = Passes(model, ids_ST.shape[1])
    numbers = [0] if graphs and len(ids_ST) <= batch_sequences else list(range(len(passes.layers)))
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
    goal_STD, graphs = None, _graphs(judge, layers, weights_of) if len(judge.states) <= last else []
    for layer in range(last, layers.start - 1, -1):
        weights = weights_of(passes.layers[layer]) if layer in layers else []
        runs = iter([graphs.pop()]) if graphs else _runs(judge, layer, weights)
        goal_STD, gradients, squares = _layer_gradients(judge, runs, weights, goal_STD, squared)
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


_Run = tuple[Tensor, Tensor]
"""The states before and after a layer, with the graph between them."""


def _graphs(judge: Judge, layers: range, weights_of: Callable[[nn.Module], list[nn.Parameter]]) -> list[_Run]:
    """One forward pass over all sequences, one entry for each layer. Layers before `layers` have no graph."""
    h_BTD, found = judge.states[0].to(judge.passes.device, judge.passes.model.dtype), []
    for number, layer in enumerate(judge.passes.layers):
        for weight in weights_of(layer) if number in layers else []:
            weight.requires_grad_(True)
        with torch.set_grad_enabled(number >= layers.start):
            h_BTD = h_BTD.detach().requires_grad_(number >= layers.start)
            found.append((h_BTD, judge.passes.layer(number, h_BTD)))
        h_BTD = found[-1][1]
    return found


def _runs(judge: Judge, layer: int, weights: list[nn.Parameter]) -> Iterator[_Run]:
    """Run a layer on its stored states, one batch at a time."""
    for weight in weights:
        weight.requires_grad_(True)
    for h_BTD in judge.states[layer].split(judge.batch_sequences):
        h_BTD = h_BTD.to(judge.passes.device, judge.passes.model.dtype).detach().requires_grad_()
        yield h_BTD, judge.passes.layer(layer, h_BTD)


def _layer_gradients(judge: Judge, runs: Iterator[_Run], weights: list[nn.Parameter], goal_STD: Tensor | None,
                     squared: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The backward pass through one layer, whose `runs` are one for each batch. `goal_STD` is the gradient of the state
    after the layer; None means that the output head follows. Three results: the gradient of the state before the layer,
    the gradients of the weights summed over all batches, and the sums of the squared gradients."""
    before: list[Tensor] = []
    summed = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    squares = [torch.zeros_like(total) for total in summed] if squared else []
    followed_by = judge.ids_ST if goal_STD is None else goal_STD
    for (h_BTD, after_BTD), next_B in zip(runs, followed_by.split(judge.batch_sequences), strict=True):
        goal_BTD = _head_gradient(judge.passes, after_BTD, next_B) if goal_STD is None else next_B
        state, *found = torch.autograd.grad(after_BTD, [h_BTD, *weights], goal_BTD.to(after_BTD))
        before.append(state.float().cpu())
        for total, gradient in zip(summed, found, strict=True):
            total += gradient
        for total, gradient in zip(squares, found, strict=squared):
            total += gradient.float().square()
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat(before), summed, squares
