"""Ranks layers, attentions and MLPs by an estimate of how much their removal changes the next-token distribution.

    KL(p || p') ~ Var_p(Dz) / (2 T^2),    z = W norm(h),  p = softmax(z / T),  Dz = z' - z

The estimate is Theorem 3 of "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026). As in the
paper, one layer is removed at a time: all layers before it are dense, and the state right after it is the input of the
final norm and the head. One pass of the dense model over the text therefore gives the estimates of all layers. A second
pass gives the estimates of all attentions, and a third pass gives those of all MLPs. The paper does not rank layers; we
added the ranking. The unit (layer, attention or MLP) with the lowest estimate, as a mean over tokens, is removed first.
If two estimates are equal, the lower layer is removed first, and in one layer the attention before the MLP.

The logits of an inner state are not the outputs of the model. With `at: output`, Dz is therefore the change of the
logits at the model's output. With `at: output` the layers after each removed unit are run too. For each unit this costs
half a forward pass on average.

The formula is a second-order approximation. If a removal changes the distribution much, the estimate is far from the
true KL. Position 0, a massive token in most models, is excluded.
"""
import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.options import Count, Natural, Positive
from kdp_core.base.records import Composed, ModelFacts, Plan, Search, Selection, Tokens
from kdp_core.methods._judge import RankError, ranked
from kdp_core.methods._method import no_state_between
from kdp_core.methods._search.objectives import drawn, spaced
from kdp_core.methods._select import ROUNDING, BlockError, Match, as_drops, between, enough
from kdp_core.model import checkpoints
from kdp_core.model.distil import variance
from kdp_core.model.families import decoder_layers, family_of, type_of
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params, part_params
from kdp_core.model.surgery import without
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates, boundary_states

logger = logging.getLogger(__name__)
Unit = tuple[int, str]
"""(layer, `whole`, `attention` or `mlp`)."""
At = Literal["layer", "output"]
Part = Literal["attention", "mlp"]


def rank(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int, device: str = "cpu",
         dtype: str = "float32", temperature: Positive = 1.0, at: At = "layer", sequences: Count = 16,
         draw: Natural = 0, positions: Count = 16, keep_first: Natural = 1, keep_last: Natural = 1,
         batch_sequences: Count = 8) -> Search:
    """Rank layers by Var_p(Dz) / (2 T^2).

    k_max: not read; neighbouring layers may be removed.
    temperature: T of the probabilities.
    at: which logits are compared: with `layer` those of the state right after the layer, as in the paper; with `output`
        those of the whole model.
    sequences: number of calibration sequences from which the estimates are computed.
    draw: number of a random sample, from 0. Two samples with different numbers have no sequence in common.
    positions: number of tokens of each sequence whose logits are compared, evenly spaced up to the last token.
    keep_first: number of layers at the start of the model that cannot be removed.
    keep_last: number of layers at the end of the model that cannot be removed.
    batch_sequences: number of sequences in one forward pass.
    Raises RankError for too few sequences or tokens and BlockError if no layer may be removed.
    """
    options.check(rank, locals())
    began = time.perf_counter()
    eligible = between(facts.layers, keep_first, keep_last)
    ids_ST = _read(tokens, sequences, draw, positions)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    scores = estimates(model, ids_ST, [(layer, "whole") for layer in eligible], temperature=temperature, at=at,
                       positions=positions, batch_sequences=batch_sequences)
    stats = {"tokens": len(ids_ST) * positions, "temperature": temperature, "at": at,
             "seconds": time.perf_counter() - began}
    return ranked({layer: scores[layer, "whole"] for layer in eligible}, "fragility", k_max, 1, stats)


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", parts: list[Part] | None = None, temperature: Positive = 1.0, at: At = "layer",
            sequences: Count = 16, draw: Natural = 0, positions: Count = 16, batch_sequences: Count = 8,
            match: Match = "nearest") -> Composed:
    """Remove attentions and MLPs in the order of Var_p(Dz) / (2 T^2), in one common list.

    parts: parts that may be removed, attention or mlp; null means both.
    temperature: T of the probabilities.
    at: which logits are compared: with `layer` those of the state right after the layer, as in the paper; with `output`
        those of the whole model.
    sequences: number of calibration sequences from which the estimates are computed.
    draw: number of a random sample, from 0. Two samples with different numbers have no sequence in common.
    positions: number of tokens of each sequence whose logits are compared, evenly spaced up to the last token.
    batch_sequences: number of sequences in one forward pass.
    match: with `nearest` the removed share is nearest to the ratio, with `reach` at least the ratio.
    Raises BlockError for a ratio that cannot be reached, RankError for too few sequences or tokens, and FitError for a
    model whose norms follow the sum of state and output.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    config = checkpoints.config_of(dense)
    if (why := no_state_between(family_of(config))) or not family_of(config).norms_first(config):
        raise FitError(f"fragility_parts cannot remove parts of this {type_of(config)} model: "
                       f"{why or 'its norms follow the sum'}; use fragility, which removes layers")
    ids_ST = _read(tokens, sequences, draw, positions)
    blank = checkpoints.on_meta(config)
    size = {(layer, part): part_params(module, family_of(blank), part)
            for layer, module in enumerate(decoder_layers(blank)) for part in parts or ["attention", "mlp"]}
    units, total = list(size), count_params(blank)
    if selection.ratio_target > (reachable := sum(size.values()) / total) + ROUNDING:
        raise BlockError(f"ratio {selection.ratio_target} is too high: all that fragility_parts can remove is "
                         f"{reachable:.4f} of all parameters; ask for less")
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    scores = estimates(model, ids_ST, units, temperature=temperature, at=at, positions=positions,
                       batch_sequences=batch_sequences)
    order = sorted(units, key=lambda unit: (scores[unit], unit))
    shares = [removed / total for removed in itertools.accumulate((size[unit] for unit in order), initial=0)]
    count = enough(shares, selection.ratio_target, match)
    removed = [{"layer": layer, "part": part, "estimate": scores[layer, part]} for layer, part in order]
    return Composed(Plan("fragility_parts", as_drops(order[:count]), [], {}), [], [],
                    {"tokens": len(ids_ST) * positions, "temperature": temperature, "at": at, "order": removed,
                     "removed": count, "seconds": time.perf_counter() - began})


def _read(tokens: Tokens, sequences: int, draw: int, positions: int) -> Tensor:
    """The calibration sequences from which the estimates are computed."""
    ids_ST = drawn(tokens, sequences, draw)
    if positions >= ids_ST.shape[1]:
        raise RankError(f"positions is {positions}, but sequences have {ids_ST.shape[1]} tokens, of which the first is "
                        f"excluded; give 1 to {ids_ST.shape[1] - 1}")
    return ids_ST


@torch.no_grad()
def estimates(model: nn.Module, ids_ST: Tensor, units: Sequence[Unit], *, temperature: float, at: str, positions: int,
              batch_sequences: int) -> dict[Unit, float]:
    """Var_p(Dz) / (2 T^2) of each unit, as a mean over sequences and positions."""
    passes, (S, T) = Passes(model, ids_ST.shape[1]), ids_ST.shape
    chosen = spaced(T, positions)
    sums, layers = dict.fromkeys(units, 0.0), len(passes.layers)
    for number, ids_BT in enumerate(ids_ST.split(batch_sequences)):
        h_KBTD = boundary_states(model, ids_BT, list(range(layers + 1)))
        for unit, left_BTD in _removed(passes, h_KBTD, units):
            after = unit[0] + 1 if at == "layer" else layers
            left_BTD = passes.run(left_BTD, range(unit[0] + 1, after))
            sums[unit] += _estimated(passes, h_KBTD[after][:, chosen], left_BTD[:, chosen], temperature)
        logger.info("fragility: %d of %d sequences", min((number + 1) * batch_sequences, S), S)
    return {unit: total / (S * positions) for unit, total in sums.items()}


def _removed(passes: Passes, h_KBTD: list[Tensor], units: Sequence[Unit]) -> Iterator[tuple[Unit, Tensor]]:
    """For each unit: the state after the unit's layer in a model that lacks only this unit. The layers before the
    unit's layer are layers of the dense model."""
    family = family_of(passes.model)
    for layer, part in units:
        before_BTD = h_KBTD[layer].to(passes.device, passes.model.dtype)
        with without(passes.layers[layer], family, part):
            yield (layer, part), before_BTD if part == "whole" else passes.layer(layer, before_BTD)


def estimated_kl(z_NV: Tensor, other_NV: Tensor, temperature: float) -> Tensor:
    """Second-order approximation (in z' - z) of KL(softmax(z / T) || softmax(z' / T)) for each token, from the logits;
    float64.

    "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026), Theorem 3. The error of the
    approximation is of third order in z' - z.
    """
    z_NV, d_NV = z_NV.double(), (other_NV - z_NV).double()
    # KL(p || p') ~ Var_p(Dz) / (2 T^2),  p = softmax(z / T)
    return variance((z_NV / temperature).softmax(dim=-1), d_NV) / (2 * temperature ** 2)


def _estimated(passes: Passes, dense_BPD: Tensor, other_BPD: Tensor, temperature: float) -> float:
    """Sum of the estimates over tokens. About six float64 matrices of logits are in memory at once, so chunks are
    small.
    """
    size = max(1, passes.head.chunk() // 8)
    return sum(estimated_kl(*(passes.head(passes.to_head(h_CD)).cpu() for h_CD in pair), temperature).sum().item()
               for pair in zip(dense_BPD.flatten(0, 1).split(size), other_BPD.flatten(0, 1).split(size), strict=True))
