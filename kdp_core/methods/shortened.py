"""Shortened LLaMA (Kim et al. 2024, arXiv 2402.02834) ranks layers once, by one of three criteria.

perplexity  PPL_n = exp(L(model without layer n)) on calibration text.
taylor      I_n = sum_k sum_ij |dL/dW_ij W_ij|, W = W^{k,n} the weights of layer n, L the mean loss of the next token.
magnitude   I_n = sum_k sum_ij |W_ij|, without data.

The layer with the lowest score is removed first. If two scores are equal, the lower layer is removed first. In the
paper, the first four and the last two layers are never removed, with any score (marked "+" in its tables). By Taylor
and magnitude, layer 0 would be among the first removed layers. The released code protects these six layers only at the
removal, so the orders that it writes contain all layers (kdp_core.study.oracles). The orders of this module do not
contain protected layers.

The sums in the paper contain only the weights of linear maps. The sums of the released code and of this module also
contain the weights of norms. The sums contain no biases (LLaMA has no biases, OPT has some). Gemma's norms multiply by
1 + w. In this module the sum for Gemma contains 1 + w, because I_n estimates the loss if a factor of the model becomes
0. For Gemma, the sum of the released code would contain w instead of 1 + w.

As in SLEB, each perplexity is computed from the stored states before the removed layer. The gradients are equal to
those of one backward pass over all sequences. This module computes the gradients layer by layer, so that only one
layer's gradients are in memory at a time.
"""
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Count, Natural
from kdp_core.base.records import ModelFacts, Search, Tokens
from kdp_core.methods._judge import Judge, RankError, backward, judge_of, loss_nats, picked, ranked
from kdp_core.methods._method import Method
from kdp_core.methods._select import in_order
from kdp_core.model import checkpoints
from kdp_core.model.families import Family, decoder_layers, family_of
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)


def perplexity(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int,
               device: str = "cpu", dtype: str = "float32", keep_first: Natural = 4, keep_last: Natural = 2,
               sequences: Count | None = 10, batch_sequences: Count = 8, seed: int = 0) -> Search:
    """Rank layers by the perplexity of the model in which only this layer is removed.

    k_max: not read; neighbouring layers may be removed.
    keep_first: number of layers at the start of the model that cannot be removed.
    keep_last: number of layers at the end of the model that cannot be removed.
    sequences: number of sequences on which perplexities are computed. null, or a number that is too large, means all.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises RankError for options out of range, for sequences without a next token and for a loss that is not finite.
    """
    options.check(perplexity, locals())
    began = time.perf_counter()
    eligible = _eligible(facts.layers, keep_first, keep_last)
    ids_ST = picked(tokens, sequences, seed)
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
           dtype: str = "float32", keep_first: Natural = 4, keep_last: Natural = 2, sequences: Count | None = 10,
           batch_sequences: Count = 10, seed: int = 0) -> Search:
    """Rank layers by the sum of |weight times gradient| over the weights of their linear maps and norms, without
    biases.

    k_max: not read; neighbouring layers may be removed.
    keep_first: number of layers at the start of the model that cannot be removed.
    keep_last: number of layers at the end of the model that cannot be removed.
    sequences: number of sequences whose mean loss is differentiated. null, or a number that is too large, means all.
    batch_sequences: number of sequences in one forward pass. Gradients are summed over all sequences before their
        absolute values are computed. If all sequences are in one pass, no layer runs twice, but the activations of all
        layers are in memory.
    seed: seed of the choice of sequences.
    Raises RankError for options out of range, for sequences without a next token and for a score that is not finite.
    """
    options.check(taylor, locals())
    began = time.perf_counter()
    eligible = _eligible(facts.layers, keep_first, keep_last)
    ids_ST = picked(tokens, sequences, seed)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    scores = _first_order(judge_of(model, ids_ST, batch_sequences, graphs=True), eligible)
    stats = {"tokens": ids_ST.numel(), "sequences": len(ids_ST), "seconds": time.perf_counter() - began}
    return ranked(scores, "taylor", k_max, 1, stats)


def magnitude(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int,
              device: str = "cpu", dtype: str = "float32", norm: Literal["l1", "l2"] = "l1", keep_first: Natural = 4,
              keep_last: Natural = 2) -> Search:
    """Rank layers by the size of the weights of their linear maps and norms, without biases. No data is read.

    k_max: not read; neighbouring layers may be removed.
    norm: `l1` sums absolute values, `l2` sums squares.
    keep_first: number of layers at the start of the model that cannot be removed.
    keep_last: number of layers at the end of the model that cannot be removed.
    Raises RankError for options out of range.
    """
    options.check(magnitude, locals())
    began = time.perf_counter()
    eligible = _eligible(facts.layers, keep_first, keep_last)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    scores = {}
    for layer in eligible:
        sizes = (_gain(weight.detach(), family_of(model)).abs() for weight in _weights(decoder_layers(model)[layer]))
        # I_n = sum_k sum_ij |W_ij|, or W_ij^2
        scores[layer] = sum((size if norm == "l1" else size.square()).sum(dtype=torch.float64).item() for size in sizes)
    return ranked(scores, f"magnitude_{norm}", k_max, 0, {"tokens": 0, "seconds": time.perf_counter() - began})


def _eligible(layers: int, keep_first: int, keep_last: int) -> range:
    """Layers that may be removed."""
    if keep_first + keep_last >= layers:
        raise RankError(f"search.keep_first {keep_first} and keep_last {keep_last} of {layers} layers leave none that "
                        "may be removed; lower these options")
    return range(keep_first, layers - keep_last)


def _most_ordered(facts: ModelFacts, k_max: int, given: Mapping[str, Any]) -> int:
    """Largest number of layers that a search can order."""
    return len(_eligible(facts.layers, given["keep_first"], given["keep_last"]))


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The weights of all linear maps and norms of a layer, including the norms of queries and keys."""
    return [module.weight for module in layer.modules() if isinstance(getattr(module, "weight", None), nn.Parameter)]


def _gain(weight: Tensor, family: Family) -> Tensor:
    """The values by which a weight multiplies its input, float32. If the weight belongs to a norm (one axis), the
    family's `gain_offset` is added."""
    return weight.float() + (family.gain_offset if weight.ndim == 1 else 0.0)


def _first_order(judge: Judge, eligible: range) -> dict[int, float]:
    """sum |W dL/dW| of each eligible layer. The sums are computed from the last layer to the first."""
    scores, family = {}, family_of(judge.passes.model)
    for layer, weights, gradients, _ in backward(judge, eligible, _weights):
        # I_n = sum_k sum_ij |dL/dW_ij W_ij|, L the mean over all predictions
        products = (gradient * _gain(weight.detach(), family)
                    for gradient, weight in zip(gradients, weights, strict=True))
        scores[layer] = (sum(one.abs().sum(dtype=torch.float64).item() for one in products)
                         / judge.ids_ST[:, 1:].numel())
        logger.info("layer %d of %d: %.4g", layer, eligible.start, scores[layer])
    return {layer: scores[layer] for layer in eligible}


METHODS = (
    Method("shortened_ppl", "Kim et al. 2024, Shortened LLaMA: layers by the perplexity without each",
           "layers removed", in_order, search=perplexity, orders=_most_ordered, example={"search": {"sequences": 4}}),
    Method("shortened_taylor", "Kim et al. 2024, Shortened LLaMA: layers by sum |W g|", "layers removed", in_order,
           search=taylor, orders=_most_ordered, example={"search": {"sequences": 4}}),
    Method("shortened_magnitude", "Kim et al. 2024, Shortened LLaMA: layers by sum |W|", "layers removed", in_order,
           search=magnitude, orders=_most_ordered),
)
