"""SLEB (Song et al. 2024, arXiv 2402.09025): the layer whose removal costs least goes, again and again.

In each round every layer left but the first and the last is switched off in turn, the loss of the next token
    L = -1/N sum_t log q(x_t+1 | x_1 .. x_t)
is taken over calibration text (the paper's Metric^3), and the layer of least loss goes for good. A later layer must be
better to win, so of equal ones the lowest goes.

The paper reads as 128 sequences; its code joins 128 rows of WikiText-2, which is some 10,000 tokens. The default here
are as many: 80 sequences of 128. Ten thousand tokens leave noise in the order: compare seeds.

The code runs the whole model for each candidate. Here the states before every layer of the model as pruned so far are
kept, taken once from the model itself (stored ones may be rounded to half precision), and a candidate at layer j runs
the layers after j alone: the same losses for half the work. `Judge` serves the rankings of Shortened LLaMA too.
"""
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from kdp_core.base.records import ModelFacts, Search, Tokens
from kdp_core.methods.shortgpt import RankError
from kdp_core.model import checkpoints
from kdp_core.model.passes import Passes
from kdp_core.states.hidden import HiddenStates, boundary_states

logger = logging.getLogger(__name__)


class Judge(NamedTuple):
    """A model and the sequences that it is judged on."""
    passes: Passes
    ids_ST: Tensor
    states: dict[int, Tensor]
    """h_STD, float32 on the CPU, before each layer of the model as pruned so far."""
    batch_sequences: int


def greedy(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int, device: str = "cpu",
           dtype: str = "float32", sequences: int | None = 80, largest: float = 0.5, batch_sequences: int = 8,
           seed: int = 0) -> Search:
    """Order layers by the loss that removing them causes, until `largest` of all layers have gone.

    k_max: not read: neighbours may go.
    sequences: judged on; null, or more than there are, means all.
    largest: share of the layers to order; the first and the last layer never go.
    batch_sequences: sequences of a forward pass.
    seed: of the choice of sequences.
    Raises RankError for options out of range, for sequences without a next token and for a loss that is not finite.
    """
    began = time.perf_counter()
    if not 0 < largest < 1:
        raise RankError(f"search.largest {largest}: must lie between 0 and 1, the share of layers to order")
    most = min(round(largest * facts.layers), facts.layers - 2)
    if most < 1:
        raise RankError(f"search.largest {largest} of {facts.layers} layers: none may go, as the first and the last "
                        "one stay; raise it or take a deeper model")
    ids_ST = picked(tokens, sequences, batch_sequences, seed)
    judge = judge_of(checkpoints.load_model(dense, device=device, dtype=dtype), ids_ST, batch_sequences)
    current = dense_nats = loss_nats(judge, facts.layers - 1, [facts.layers - 1])
    left, order, rises, single, tried = list(range(facts.layers)), [], [], {}, 0
    for _ in range(most):
        nats = {layer: loss_nats(judge, layer, [later for later in left if later > layer]) for layer in left[1:-1]}
        single = single or {str(layer): loss - dense_nats for layer, loss in nats.items()}
        tried += len(nats)
        # j* = argmin_j L(model without j); equal losses: the lowest layer
        layer = min(nats, key=lambda layer: (nats[layer], layer))
        rises.append(nats[layer] - current)
        current = nats[layer]
        order.append(layer)
        left.remove(layer)
        _advance(judge, left, layer)
        logger.info("layer %d goes: loss %.4f nats after %d layers, %d runs", layer, current, len(order), tried)
    return Search(order, rises, "loss", k_max, single, tried,
                  {"tokens": ids_ST.numel(), "sequences": len(ids_ST), "dense_nats": dense_nats,
                   "seconds": time.perf_counter() - began})


def picked(tokens: Tokens, sequences: int | None, batch_sequences: int, seed: int) -> Tensor:
    """The ids of so many sequences, drawn by `seed`, in their own order; all where there are fewer or None is given."""
    S, T = tokens.ids_ST.shape
    if (sequences is not None and sequences < 1) or batch_sequences < 1:
        raise RankError(f"search.sequences {sequences} and batch_sequences {batch_sequences}: give at least 1 of each")
    if T < 2:
        raise RankError(f"sequences of {T} tokens have no next token to predict; pack longer ones")
    rows = torch.randperm(S, generator=torch.Generator().manual_seed(seed))[:sequences].sort().values
    return tokens.ids_ST[rows]


def judge_of(model: nn.Module, ids_ST: Tensor, batch_sequences: int) -> Judge:
    """The dense model with its own states of the sequences."""
    passes = Passes(model, ids_ST.shape[1])
    numbers = list(range(len(passes.layers)))
    batches = [boundary_states(model, ids_BT, numbers) for ids_BT in ids_ST.split(batch_sequences)]
    return Judge(passes, ids_ST, {number: torch.cat([batch[number] for batch in batches]) for number in numbers},
                 batch_sequences)


@torch.no_grad()
def loss_nats(judge: Judge, start: int, path: Sequence[int]) -> float:
    """Mean loss of the next token once the states before layer `start` have gone through the layers of `path`."""
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
    """Sum over all tokens that have a next one; logits of a chunk of tokens at a time, (C, V)."""
    x_ND = passes.to_head(h_BTD)[:, :-1].flatten(0, 1)
    next_N = ids_BT[:, 1:].flatten().to(x_ND.device)
    # -sum_t log q(x_t+1 | x_1 .. x_t)
    return sum(functional.cross_entropy(passes.head(x_CD), next_C, reduction="sum").item()
               for x_CD, next_C in zip(x_ND.split(passes.head.chunk()), next_N.split(passes.head.chunk()), strict=True))


def _advance(judge: Judge, left: list[int], gone: int) -> None:
    """The states before the layers left, now that one more is gone."""
    h_STD, later = judge.states.pop(gone), [layer for layer in left if layer > gone]
    for layer, following in zip(later, [*later[1:], None], strict=True):
        judge.states[layer] = h_STD
        if following is not None:
            h_STD = judge.passes.run_batches(h_STD, [layer], judge.batch_sequences)
