"""ReplaceMe, least squares (Shopkhoev et al. 2025, arXiv 2505.02819): a run of layers absorbed into the MLP before it.

Layers s .. e-1 go. With m the output of the MLP of layer s-1 and x the state after that layer's attention, state s is
x + m; a matrix T with x + T'm ~ state e takes the run's place:
    T = (X'X + alpha I)^-1 X'Y,    X = m,    Y = state_e - x,
and is multiplied into that MLP's last matrix, so that not one parameter is added. Both products are streamed.

The paper weighs all tokens alike and takes alpha = 0; with few calibration tokens a small ridge is needed. Massive
tokens own X'X then; `massive: mask` leaves them out of the fit.
"""
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core import models
from kdp_core.hidden import HiddenStates
from kdp_core.modeling import decoder_layers, layers_prefix
from kdp_core.passes import Passes
from kdp_core.records import Composed, Plan, Selection, Tokens
from kdp_core.states import FitError, relative_error, ridge_solve, split

LAST = {"llama": "mlp.down_proj", "mistral": "mlp.down_proj", "qwen3": "mlp.down_proj", "opt": "fc2"}
"""The last matrix of a layer's MLP; its output is added to the state as it is (in Gemma 3 a norm stands between)."""
MASSIVE = ("raw", "mask")


class _Fit(NamedTuple):
    """The pairs of one batch: what the MLP gives, what is missing."""
    m_ND: Tensor
    goal_ND: Tensor
    rest_ND: Tensor
    """State after the attention."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", ridge: float = 1e-4, massive: str = "raw", batch_sequences: int = 8,
            heldout: float = 0.1, seed: int = 0) -> Composed:
    """Fit T for the one run of layers and multiply it into the MLP before it.

    ridge: alpha, relative to the mean diagonal of X'X.
    massive: `raw` fits all tokens alike, `mask` leaves massive-activation tokens out.
    batch_sequences: sequences of a forward pass.
    heldout: share of the sequences that judge and are never fitted on.
    seed: of the held-out choice.
    Raises FitError for a family whose MLP output is not added as it is, and for a run that starts at the first layer.
    """
    began = time.perf_counter()
    model = models.load_model(dense, device=device, dtype=dtype)
    (start, stop), family = selection.blocks[0], model.config.model_type
    _check(selection, family, massive, heldout, hidden.sequences)
    passes = Passes(model, hidden.tokens)
    held, kept = split(hidden.sequences, heldout, seed)
    keep_ST = torch.ones(hidden.sequences, hidden.tokens, dtype=torch.bool)
    if massive == "mask":
        keep_ST &= ~hidden.massive([start, stop])
    gram, cross = 0.0, 0.0
    for rows in kept.split(batch_sequences):
        fit = _pairs(passes, hidden, rows, keep_ST, start, stop)
        gram, cross = gram + fit.m_ND.T @ fit.m_ND, cross + fit.m_ND.T @ fit.goal_ND
    # T = (X'X + alpha I)^-1 X'Y
    t_DD = ridge_solve(gram, cross, ridge)
    parts = [_pairs(passes, hidden, rows, keep_ST, start, stop) for rows in held.split(batch_sequences)]
    error = relative_error(torch.cat([p.rest_ND + p.m_ND @ t_DD for p in parts]),
                           torch.cat([p.rest_ND + p.goal_ND for p in parts]))
    plan = Plan("replaceme_lstsq", [], [], _absorbed(model, family, start - 1, t_DD))
    seconds = time.perf_counter() - began
    return Composed(plan, [], [{"block": (start, stop), "heldout_error": error, "params": 0}],
                    {"tokens": len(kept) * hidden.tokens, "seconds": seconds})


def _check(selection: Selection, family: str, massive: str, heldout: float, sequences: int) -> None:
    if family not in LAST:
        raise FitError(f"ReplaceMe cannot be folded into a {family} model: a norm follows its MLPs; it knows "
                       f"{', '.join(LAST)}")
    if massive not in MASSIVE:
        raise FitError(f"compose.massive {massive!r}: choose one of {', '.join(MASSIVE)}")
    if len(selection.blocks) != 1 or selection.blocks[0][0] == 0:
        raise FitError(f"ReplaceMe folds one run of layers into the layer before it; the blocks are {selection.blocks}")
    if not 0 < heldout < 1 or max(1, round(heldout * sequences)) >= sequences:
        raise FitError(f"compose.heldout {heldout} of {sequences} sequences leaves none on one side; change it or add "
                       "calibration sequences")


@torch.no_grad()
def _pairs(passes: Passes, hidden: HiddenStates, rows: Tensor, keep_ST: Tensor, start: int, stop: int) -> _Fit:
    """The counted tokens of some sequences, float64."""
    caught: list[Tensor] = []
    last = passes.layers[start - 1].get_submodule(LAST[passes.model.config.model_type])
    hook = last.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        h_BTD = passes.layer(start - 1, hidden.state(start - 1)[rows].to(passes.device, passes.model.dtype))
    finally:
        hook.remove()
    keep_BT = keep_ST[rows]
    m_ND = caught[0].view(h_BTD.shape).cpu()[keep_BT].double()
    rest_ND = h_BTD.cpu()[keep_BT].double() - m_ND
    return _Fit(m_ND, hidden.state(stop)[rows][keep_BT].double() - rest_ND, rest_ND)


def _absorbed(model: nn.Module, family: str, layer: int, t_DD: Tensor) -> dict[str, Tensor]:
    """The MLP's last matrix, and its bias where it has one, with T' before them."""
    prefix = f"{layers_prefix(family)}{layer}.{LAST[family]}"
    last: Any = decoder_layers(model)[layer].get_submodule(LAST[family])
    # down <- T' down
    made = {f"{prefix}.weight": (t_DD.T @ last.weight.detach().cpu().double()).to(last.weight.dtype)}
    if last.bias is not None:
        made[f"{prefix}.bias"] = (t_DD.T @ last.bias.detach().cpu().double()).to(last.bias.dtype)
    return made
