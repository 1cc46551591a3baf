"""Orders layers by a greedy search: the layer whose removal changes the model's outputs least is removed first.

CKA of hidden states measures how similar two states are. CKA does not measure how the difference of two states changes
the outputs. This search replaces a candidate layer by a stand-in and computes KL(dense || pruned) of the next-token
distributions on calibration text. Each candidate's stand-in is of the kind of kdp_core.methods.kdp_residual, and is
fitted in closed form on the dense model's states. Each round of the search removes the layer whose removal raises the
divergence least. One search therefore gives the order of removal for every ratio.

The removal of a layer rarely raises the divergence less in a later round than in an earlier round. The search therefore
uses a candidate's rise in an earlier round as a lower bound of its rise in the current round. In each round the search
measures the candidate with the lowest bound again. If the new rise is at most as high as the bounds of all other
candidates, the measured candidate is removed ("lazy" greedy, Minoux 1978). To measure a candidate, the pruned model is
run only from this candidate on. SLEB (Song et al. 2024) is also a greedy search. SLEB measures the loss instead of the
divergence, without stand-ins and without lower bounds.

The order `cka` needs no run of the model: a layer is removed early if the states before and after it are similar. The
order `cka` takes seconds. On SmolLM2-135M, models that are pruned in the order `cka` are as good as models that are
pruned in the order `divergence` (docs/kdp.md).
"""
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.options import Count, Natural, Share, check
from kdp_core.base.records import ModelFacts, Search, Similarity, Tokens
from kdp_core.methods._outputs import Compared
from kdp_core.methods._select import eligible_layers
from kdp_core.methods.kdp_residual.closed_form import fit_alone
from kdp_core.methods.kdp_residual.dictionaries import Kind, closed_form_options
from kdp_core.model import checkpoints
from kdp_core.model.passes import Passes, Step, built
from kdp_core.states import similarity as compare
from kdp_core.states.block import check_all_states
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
PROTECTED = 0.1
"""Share of the layers that cannot be removed at each end of the model, as in KDP."""
FIT_SEQUENCES = 128
"""Largest number of sequences on which the stand-ins are fitted."""


class SearchError(ValueError):
    """The search is not possible with these options or states."""


class _Run(NamedTuple):
    """The data that are needed to measure every candidate."""
    passes: Passes
    stand_ins: dict[int, nn.Module]
    """The stand-in of each eligible layer."""
    states: list[Tensor]
    """h_STD before each layer of the current pruned model, for the sequences on which candidates are judged."""
    compared: Compared
    """The dense model's outputs for these sequences."""
    batch: int


def by_divergence(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int,
                  device: str = "cpu", dtype: str = "float32", similarity: Similarity | None = None,
                  order: Literal["divergence", "cka"] = "divergence", dictionary: Kind = "neurons",
                  entries: Count = 96, judge_sequences: Count = 16, largest: Share = 0.5,
                  batch_sequences: Count = 8, seed: Natural = 0) -> Search:
    """Order layers by the divergence that their replacement causes, until the share `largest` of all layers is
    replaced.

    similarity: the similarity of the same states, which the order `cka` reads. If it is not given, it is computed
        without massive tokens.
    order: `divergence` (KL of the outputs) or `cka`. `cka` is the linear CKA of the state before the previous layer and
        the state after this layer. The order `cka` ignores the options below, except `largest`.
    dictionary: dictionary of the stand-ins: `neurons`, `rff`, `rff_learned` or `none`.
    entries: number of entries of the dictionary.
    judge_sequences: number of sequences on which outputs are compared; the stand-ins are fitted on other sequences.
    largest: share of the layers to order; a ratio that needs more layers is refused.
    batch_sequences: number of sequences in one forward pass.
    seed: seed of the choice of sequences.
    Raises SearchError if there are too few sequences or if `k_max` does not allow any removal.
    """
    check(by_divergence, locals())
    began = time.perf_counter()
    eligible, most = eligible_layers(facts.layers, PROTECTED), round(largest * facts.layers)
    _check_sizes(hidden, k_max, judge_sequences if order == "divergence" else 0)
    if order == "cka":
        check_all_states(hidden)
        removed, unlike = _by_cka((similarity or _compared(hidden)).cka_linear_LL, eligible, k_max, most)
        return Search(removed, [unlike[layer] for layer in removed], "cka_linear", k_max,
                      {str(layer): value for layer, value in unlike.items()}, 0,
                      {"seconds": time.perf_counter() - began})
    drawn = torch.randperm(hidden.sequences, generator=torch.Generator().manual_seed(seed))
    fitted, judged = drawn[judge_sequences:][:FIT_SEQUENCES].sort().values, drawn[:judge_sequences].sort().values
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    options = closed_form_options(model, hidden, dictionary=dictionary, entries=entries, seed=seed)
    stand_ins = {}
    for layer in eligible:
        stand_ins[layer] = built(fit_alone(model, hidden, (layer, layer + 1), fitted, options)).to(model.device)
        logger.info("stand-in of layer %d of %d", layer, eligible[-1])
    passes = Passes(model, hidden.tokens)
    run = _Run(passes, stand_ins, [hidden.state(k, judged) for k in range(facts.layers)],
               Compared(passes, hidden.state(facts.layers, judged), batch_sequences), batch_sequences)
    removed, rises, single, tried = _greedy(run, eligible, k_max, most)
    return Search(removed, rises, "divergence", k_max, single, tried,
                  {"fit_tokens": len(fitted) * hidden.tokens, "judge_tokens": len(judged) * hidden.tokens,
                   "seconds": time.perf_counter() - began})


def most_ordered(facts: ModelFacts, k_max: int, given: Mapping[str, Any]) -> int:
    """Largest number of layers that the search can order. At most k_max - 1 consecutive layers are removed, and at most
    the share `largest` of all layers."""
    eligible = len(eligible_layers(facts.layers, PROTECTED))
    # at least one of k_max neighbouring layers must be kept
    return min(round(given["largest"] * facts.layers), eligible - eligible // k_max)


def _compared(hidden: HiddenStates) -> Similarity:
    """The similarity of the states, computed without massive tokens. A batch has 256 tokens, or an eighth of the tokens
    if they are few."""
    return compare.similarity(hidden, batch=max(4, min(256, hidden.sequences * hidden.tokens // 8)))


def _by_cka(cka_LL: Tensor, eligible: range, k_max: int, most: int) -> tuple[list[int], dict[int, float]]:
    """Two results: the layers in order of removal, by the similarity of the states around each layer, and 1 - CKA of
    each eligible layer."""
    # CKA(h_{l-1}, h_{l+1}): the context has two layers, and the second of these layers is removed
    unlike = {layer: 1 - cka_LL[max(layer - 1, 0), layer + 1].item() for layer in eligible}
    removed: list[int] = []
    for layer in sorted(eligible, key=unlike.__getitem__):
        if len(removed) < most and _run_length(removed, layer) < k_max:
            removed.append(layer)
    return removed, unlike


def _check_sizes(hidden: HiddenStates, k_max: int, judge_sequences: int) -> None:
    if judge_sequences >= hidden.sequences:
        raise SearchError(f"search.judge_sequences {judge_sequences} of {hidden.sequences} sequences leaves none to "
                          "fit on; lower judge_sequences or add calibration sequences")
    if k_max < 2:
        raise SearchError(f"search: no layer may be removed with k_max {k_max}; raise k_max")


def _greedy(run: _Run, eligible: range, k_max: int, most: int) -> tuple[list[int], list[float], dict[str, float], int]:
    """Four results: the layers in order of removal, the rise of the divergence at each removal, the rise of each layer
    removed alone, and the number of measured candidates."""
    removed: list[int] = []
    rises: list[float] = []
    bound = dict.fromkeys(eligible, -float("inf"))  # last measured rise of the divergence
    single: dict[str, float] = {}
    tried, current = 0, 0.0
    while len(removed) < most and bound:
        fresh: set[int] = set()
        while (layer := min(bound, key=lambda layer: (bound[layer], layer))) not in fresh:
            bound[layer] = _divergence(run, removed, layer) - current
            tried += 1
            fresh.add(layer)
            if not removed:
                single[str(layer)] = bound[layer]
        rises.append(bound.pop(layer))
        current += rises[-1]
        removed.append(layer)
        _advance(run, removed, layer)
        bound = {layer: rise for layer, rise in bound.items() if _run_length(removed, layer) < k_max}
        logger.info("layer %d is removed: divergence %.4f nats after %d layers, %d runs", layer, current,
                    len(removed), tried)
    return removed, rises, single, tried


def _run_length(removed: list[int], layer: int) -> int:
    """Number of consecutive removed layers that contain `layer`, if `layer` is removed as well."""
    first = last = layer
    while first - 1 in removed:
        first -= 1
    while last + 1 in removed:
        last += 1
    return last - first + 1


def _path(run: _Run, removed: list[int], start: int) -> list[Step]:
    return [run.stand_ins[layer] if layer in removed else layer for layer in range(start, len(run.states))]


def _divergence(run: _Run, removed: list[int], layer: int) -> float:
    """KL(dense || pruned) in nats per token if `layer` is removed in addition to `removed`."""
    return run.compared.divergence(_path(run, [*removed, layer], layer), run.states[layer])


def _advance(run: _Run, removed: list[int], layer: int) -> None:
    """Recompute the pruned model's states after `layer`."""
    path = _path(run, removed, layer)
    for number, step in enumerate(path[:-1], start=layer):
        run.states[number + 1] = run.passes.run_batches(run.states[number], [step], run.batch)
