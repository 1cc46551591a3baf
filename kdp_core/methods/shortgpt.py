"""ShortGPT (Men et al. 2024, arXiv 2403.03853) ranks layers once, by the angle between a layer's input and output.

    BI_i = 1 - E_x [ x_i . x_i+1 / (|x_i| |x_i+1|) ],    x_i the state before layer i.
All tokens have the same weight in the mean. The layer with the least block influence is removed first. Scores are
computed once.

The paper has no released code. A public implementation (sramshetty/ShortGPT) reads the last state from transformers'
`hidden_states`, after the final norm. The final norm raises the influence of the last layer, so the implementation
rarely removes this layer. The implementation does not exclude pad tokens, assigns the value 0.5 to a token with a zero
state, and sorts equal scores in no fixed order. In this module the last state is the output of the last layer
(`last_state`), and sequences contain no pad tokens. Tokens with a zero state are excluded, and their number is
reported. If two scores are equal, the lower layer is removed first. For LLaMA-2-7B the order of sramshetty/ShortGPT
differs from the paper's order, but the set of removed layers is the same (kdp_core.study.oracles).
"""
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.records import ModelFacts, Search, Tokens
from kdp_core.methods._judge import RankError, ranked
from kdp_core.methods._method import Method, Sizes
from kdp_core.methods._select import in_order
from kdp_core.model import checkpoints
from kdp_core.model.distil import to_head
from kdp_core.states.block import Counted
from kdp_core.states.hidden import HiddenStates

LastState = Literal["pre_norm", "final_norm"]
"""Whether the last state is taken before or after the final norm."""
BATCH = 8
"""Number of sequences that are compared at once, in float64."""


class _Influence(NamedTuple):
    """Block influence of one layer."""
    score: float
    masked: int
    """Number of massive tokens, which are excluded from the score."""
    undefined: int
    """Number of tokens that are not massive but are excluded because one of their states is zero."""


def block_influence(dense: Path, hidden: HiddenStates, tokens: Tokens, facts: ModelFacts, *, k_max: int,
                    device: str = "cpu", dtype: str = "float32", last_state: LastState = "pre_norm",
                    massive: Counted = "raw") -> Search:
    """Rank all layers by block influence, which is computed from stored states.

    k_max: not read; neighbouring layers may be removed.
    last_state: which state follows the last layer in the score: `pre_norm` is the output of this layer, and
        `final_norm` is this output after the final norm, as in the public implementation. The model is loaded only for
        `final_norm`.
    massive: `raw` gives all tokens the same weight, as the paper does; `mask` excludes tokens that are massive before
        or after the layer.
    Raises RankError if all tokens of a layer are excluded, and HiddenError for a state that is not stored.
    """
    options.check(block_influence, locals())
    began = time.perf_counter()
    for layer in range(facts.layers + 1):
        hidden.index(layer)
    model = checkpoints.load_model(dense, device=device, dtype=dtype) if last_state == "final_norm" else None
    before_STD, found = hidden.state(0), {}
    for layer in range(facts.layers):
        after_STD = hidden.state(layer + 1)
        keep_ST = torch.ones(after_STD.shape[:2], dtype=torch.bool)
        if massive == "mask":
            keep_ST = ~hidden.massive([layer, layer + 1])
        normed = model if layer + 1 == facts.layers else None
        found[layer] = _influence(layer, before_STD, after_STD, keep_ST, normed)
        before_STD = after_STD
    stats = {"tokens": hidden.sequences * hidden.tokens, "masked": sum(one.masked for one in found.values()),
             "undefined": sum(one.undefined for one in found.values()), "seconds": time.perf_counter() - began}
    return ranked({layer: one.score for layer, one in found.items()}, "block_influence", k_max, 0, stats)


@torch.no_grad()
def _influence(layer: int, before_STD: Tensor, after_STD: Tensor, keep_ST: Tensor,
               normed: nn.Module | None) -> _Influence:
    """Block influence of a layer over the tokens that `keep_ST` marks. If the model `normed` is given, its final norm
    is applied to the state after the layer."""
    total, counted = 0.0, 0
    for x_BTD, y_BTD, keep_BT in zip(*(part.split(BATCH) for part in (before_STD, after_STD, keep_ST)), strict=True):
        if normed is not None:
            y_BTD = to_head(normed, y_BTD).cpu()
        x_ND, y_ND = x_BTD[keep_BT].double(), y_BTD[keep_BT].double()
        norms_N = x_ND.norm(dim=-1) * y_ND.norm(dim=-1)
        there_N = norms_N > 0
        # sum_x x_i . x_i+1 / (|x_i| |x_i+1|)
        total += ((x_ND * y_ND).sum(-1)[there_N] / norms_N[there_N]).sum().item()
        counted += int(there_N.sum())
    if not counted:
        raise RankError(f"layer {layer}: no token is left to judge it by, all states before or after it are zero or "
                        "massive; extract the hidden states again, or set search.massive to raw")
    kept = int(keep_ST.sum())
    # BI_i = 1 - E cos(x_i, x_i+1)
    return _Influence(1 - total / counted, keep_ST.numel() - kept, kept - counted)


def _flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    # only stored states are read, and the time for reading is negligible
    return 0.0


METHODS = (
    Method("shortgpt", "Men et al. 2024, ShortGPT: the layers of least block influence", "layers removed", in_order,
           search=block_influence, flops={"search": _flops}, needs="states"),
    Method("block_drop", "He et al. 2024, LLM-Drop: whole layers by the cosine around them, which is block influence",
           "layers removed", in_order, search=block_influence, flops={"search": _flops}, needs="states"),
)
