"""LLM-Drop (He et al. 2024, "What matters in Transformers?") removes attentions, MLPs or both, one part at a time.

The redundancy of a part is the cosine between the state before the part and the state after the part, as a mean over
tokens:
    attention:  cos(x, x + attention(norm x)),    MLP:  cos(y, y + mlp(norm y)),  y = x + attention(norm x).
Each round removes the most redundant part together with its norms, until the ratio is reached. Where a part is removed,
the state passes unchanged. `joint_drop` orders attentions and MLPs in one list. By default the scores are those of the
dense model. These scores were stored when the hidden states were extracted, so no weights are loaded. With `iterative`
the model is run again after every removal. If both parts of a layer are removed, the whole layer is removed. ShortGPT's
block influence removes whole layers by the same cosine.

For Gemma the released code computes the MLP's score at the wrong place, because Gemma applies a norm to the attention's
output. This module computes the score from the state y to which the MLP's output is added. If two scores are equal, the
part of the lower layer is removed first. Within one layer the attention is removed before the MLP.
"""
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from kdp_core.base import options
from kdp_core.base.options import Count
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.methods._method import Method, no_state_between
from kdp_core.methods._select import ROUNDING, BlockError, Match, as_drops, no_layer
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES, Family, decoder_layers, entrance, family_of, is_known, type_of
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params, part_params
from kdp_core.model.surgery import drop_parts
from kdp_core.states.block import FitError
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
Unit = tuple[int, str]
"""(layer, `attention` or `mlp`)."""


def removing(method: str, *parts: str) -> Callable[..., Composed]:
    """Make the function `compose` of a method that can remove these kinds of parts: `attention`, `mlp` or both."""

    def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
                dtype: str = "float32", iterative: bool = False, sequences: Count | None = None,
                batch_sequences: Count = 8, match: Match = "nearest") -> Composed:
        """Remove the parts with the highest cosine, one by one.

        iterative: whether the scores are computed again after every removal instead of once.
        sequences: number of calibration sequences from which the scores are computed; null means all.
        batch_sequences: number of sequences in one forward pass; only `iterative` runs forward passes.
        match: with `nearest` the removed share is nearest to the ratio, with `reach` at least the ratio.
        Raises BlockError for a ratio that cannot be reached, FitError for too many sequences and for a model that
        applies its norms after adding to the state.
        """
        options.check(compose, locals())
        return _drop(method, parts, dense, hidden, selection, device, dtype, iterative, sequences, batch_sequences,
                     match)

    return compose


def _drop(method: str, parts: tuple[str, ...], dense: Path, hidden: HiddenStates, selection: Selection, device: str,
          dtype: str, iterative: bool, sequences: int | None, batch: int, match: str) -> Composed:
    began = time.perf_counter()
    _check(method, dense, sequences, hidden.sequences)
    blank = checkpoints.on_meta(checkpoints.config_of(dense))
    family, total = family_of(blank), count_params(blank)
    shares = {(layer, part): part_params(module, family, part) / total
              for layer, module in enumerate(decoder_layers(blank)) for part in parts}
    reachable = sum(shares.values())
    if selection.ratio_target > reachable + ROUNDING:
        raise BlockError(f"ratio {selection.ratio_target} is too high: all that {method} can remove is "
                         f"{reachable:.4f} of all parameters; ask for less")
    order, removed = [], 0.0
    scores = _stored(hidden, len(decoder_layers(blank)), sequences)
    if iterative:
        model = checkpoints.load_model(dense, device=device, dtype=dtype)
        passes, start_STD = Passes(model, hidden.tokens), hidden.state(0)[:sequences]
    while shares:
        layer, part = unit = max(shares, key=lambda unit: (scores[unit], -unit[0], unit[1] == "attention"))
        if order and _enough(removed, removed + shares[unit], selection.ratio_target, match):
            break
        removed += shares.pop(unit)
        order.append({"layer": layer, "part": part, "cosine": scores[unit], "share": removed})
        logger.info("%s of layer %d is removed: cosine %.4f", part, layer, scores[unit])
        if iterative:
            drop_parts(model, {part: [layer]})
            scores = _cosines(passes, family, start_STD, batch)
    plan = Plan(method, as_drops([(entry["layer"], entry["part"]) for entry in order]), [], {})
    return Composed(plan, [], [], {"tokens": (sequences or hidden.sequences) * hidden.tokens, "order": order,
                                   "seconds": time.perf_counter() - began})


def _check(method: str, dense: Path, sequences: int | None, have: int) -> None:
    if sequences is not None and not 1 <= sequences <= have:
        raise FitError(f"compose.sequences {sequences}: there are {have} sequences; give 1 to {have}, or null for all")
    config = checkpoints.config_of(dense)
    if not is_known(config) or refuses(family_of(config)) or not family_of(config).norms_first(config):
        why = f": {refuses(family_of(config))}" if is_known(config) and refuses(family_of(config)) else ""
        fits = [name for name, family in FAMILIES.items() if not refuses(family)]
        raise FitError(f"{method} cannot remove parts of this {type_of(config)} model{why}; choose a model of "
                       f"{', '.join(fits)} whose parts only add to the state")


def refuses(family: Family) -> str:
    """The reason why parts of this family cannot be ordered by cosines; empty if they can be ordered."""
    return no_state_between(family)


def _enough(share: float, with_next: float, ratio: float, match: str) -> bool:
    """Whether enough parts are removed. With `nearest`: the share removed so far is at least as near to the ratio as
    the share after the removal of one more part. With `reach`: the share removed so far is at least the ratio."""
    if match == "reach":
        return share >= ratio - ROUNDING
    return ratio - share <= with_next - ratio


def _stored(hidden: HiddenStates, layers: int, sequences: int | None) -> dict[Unit, float]:
    """Cosine between the states before and after every part of the dense model, as an unweighted mean over tokens."""
    if (there := hidden.layers[-1]) == layers:
        cos_LPS = hidden.sublayers()
        there = len(cos_LPS)
    if there < layers:
        raise FitError(f"{hidden.path} has the sublayers of the first {there} of {layers} layers; set hidden.layers "
                       f"to null, or add {layers} to it")
    cos_LP = cos_LPS[:, :, :sequences].double().mean(dim=-1)
    return {(layer, part): cos_LP[layer, index].item() for layer in range(layers)
            for index, part in enumerate(("attention", "mlp"))}


@torch.no_grad()
def _cosines(passes: Passes, family: Family, start_STD: Tensor, batch: int) -> dict[Unit, float]:
    """The cosines of `_stored`, computed in the model that is pruned so far."""
    sums: dict[Unit, float] = {}
    for h_BTD in start_STD.split(batch):
        h_BTD = h_BTD.to(passes.device, passes.model.dtype)
        for number, layer in enumerate(passes.layers):
            caught: list[Tensor] = []
            # the first module of the MLP part reads y = x + attention(norm x)
            reader = entrance(layer, family, "mlp")
            hook = reader.register_forward_pre_hook(lambda _, args, caught=caught: caught.append(args[0]))
            try:
                after_BTD = passes.layer(number, h_BTD)
            finally:
                hook.remove()
            y_BTD = caught[0].view(h_BTD.shape)
            for part, one_BTD, other_BTD in (("attention", h_BTD, y_BTD), ("mlp", y_BTD, after_BTD)):
                cos_BT = cosine_similarity(one_BTD.float(), other_BTD.float(), dim=-1)
                sums[number, part] = sums.get((number, part), 0.0) + cos_BT.sum().item()
            h_BTD = after_BTD
    return {unit: value / (start_STD.shape[0] * start_STD.shape[1]) for unit, value in sums.items()}


METHODS = (
    Method("attn_drop", "He et al. 2024, LLM-Drop: attentions removed by the cosine around them", "parts removed",
           no_layer, compose=removing("attn_drop", "attention"), refuses=refuses),
    Method("mlp_drop", "He et al. 2024, LLM-Drop: MLPs removed by the cosine around them", "parts removed",
           no_layer, compose=removing("mlp_drop", "mlp"), refuses=refuses),
    Method("joint_drop", "He et al. 2024, LLM-Drop: attentions and MLPs from one list", "parts removed", no_layer,
           compose=removing("joint_drop", "attention", "mlp"), refuses=refuses),
)
