"""SLEB (Song et al. 2024, arXiv 2402.09025) removes one layer in each round: the layer whose removal raises the loss
least.

In each round, every remaining layer except the first and the last is bypassed, one at a time. For each bypassed layer
the next-token loss
    L = -1/N sum_t log q(x_t+1 | x_1 .. x_t)
is computed over calibration text (the paper's Metric^3). The layer whose bypass gives the lowest loss is removed. If
two losses are equal, the lower layer is removed.

The paper suggests 128 sequences. The paper's code joins 128 lines of WikiText-2, which are about 10,000 tokens. The
default of this module is the same number of tokens: 80 sequences of 128 tokens. With ten thousand tokens the order is
noisy, so several seeds should be compared.

The paper's code runs the whole model for each candidate. This module runs only the layers after the candidate, from
stored states (kdp_core.methods._judge). The losses are equal to the losses of the paper's code, but need half of the
computation.
"""
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdp_core.base import options
from kdp_core.base.options import Count, Share
from kdp_core.base.records import ModelFacts, Search, Tokens
from kdp_core.methods._judge import Judge, RankError, judge_of, loss_nats, picked
from kdp_core.methods._method import Method, Sizes
from kdp_core.methods._select import in_order
from kdp_core.model import checkpoints
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


def most_ordered(facts: ModelFacts, k_max: int, given: Mapping[str, Any]) -> int:
    """Largest number of layers that the search can order: the share `largest` of all layers, but never the first and
    the last layer."""
    return min(round(given["largest"] * facts.layers), facts.layers - 2)


def greedy(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int, device: str = "cpu",
           dtype: str = "float32", sequences: Count | None = 80, largest: Share = 0.5, batch_sequences: Count = 8,
           seed: int = 0) -> Search:
    """Order layers by the loss that their removal causes, until the share `largest` of all layers is removed.

    k_max: not read; neighbouring layers may be removed.
    sequences: number of sequences on which losses are computed. null, or a number that is too large, means all.
    largest: share of the layers to order; the first and the last layer are never removed.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises RankError for options out of range, for sequences without a next token and for a loss that is not finite.
    """
    options.check(greedy, locals())
    began = time.perf_counter()
    most = most_ordered(facts, k_max, {"largest": largest})
    if most < 1:
        raise RankError(f"search.largest {largest} of {facts.layers} layers: none may be removed, as the first and "
                        "the last layer are kept; raise it or take a deeper model")
    ids_ST = picked(tokens, sequences, seed)
    judge = judge_of(checkpoints.load_model(dense, device=device, dtype=dtype), ids_ST, batch_sequences)
    current = dense_nats = loss_nats(judge, facts.layers - 1, [facts.layers - 1])
    left, order, rises, single, tried = list(range(facts.layers)), [], [], {}, 0
    for _ in range(most):
        nats = {layer: loss_nats(judge, layer, [later for later in left if later > layer]) for layer in left[1:-1]}
        single = single or {str(layer): loss - dense_nats for layer, loss in nats.items()}
        tried += len(nats)
        # j* = argmin_j L(model without j); if losses are equal, the lower layer is removed
        layer = min(nats, key=lambda layer: (nats[layer], layer))
        rises.append(nats[layer] - current)
        current = nats[layer]
        order.append(layer)
        left.remove(layer)
        _advance(judge, left, layer)
        logger.info("layer %d is removed: loss %.4f nats after %d layers, %d runs", layer, current, len(order), tried)
    return Search(order, rises, "loss", k_max, single, tried,
                  {"tokens": ids_ST.numel(), "sequences": len(ids_ST), "dense_nats": dense_nats,
                   "seconds": time.perf_counter() - began})


def _advance(judge: Judge, left: list[int], removed: int) -> None:
    """Recompute the stored states before the remaining layers, after the layer `removed` is removed."""
    h_STD, later = judge.states.pop(removed), [layer for layer in left if layer > removed]
    for layer, following in zip(later, [*later[1:], None], strict=True):
        judge.states[layer] = h_STD
        if following is not None:
            h_STD = judge.passes.run_batches(h_STD, [layer], judge.batch_sequences)


def _flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    # after each removal, every remaining layer is tried; a trial runs the layers after this layer, and the head
    all_layers, most = sizes.layers, round(given["largest"] * sizes.layers)
    tried = sum(left * (left / 2 * sizes.layer_macs + sizes.head_macs)
                for left in range(all_layers, all_layers - most, -1))
    return 2 * min(given["sequences"] or math.inf, sizes.sequences) * sizes.length * tried


METHODS = (
    Method("sleb", "Song et al. 2024, SLEB: the layer whose removal raises the loss least, scored again after each",
           "layers removed", in_order, search=greedy, orders=most_ordered, flops={"search": _flops},
           example={"search": {"sequences": 4}}),
)
