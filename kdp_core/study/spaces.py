"""What pruning does in three spaces: states h, logits z = W norm(h), probabilities p = softmax(z / T).

Paper: "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026), Theorems 1 to 3, Figures 4 to 8.
With D = other - dense, and D_o what is left of D when its part along the dense vector is taken off:
    1 - cos(h, h + D)  ~ |D_o|^2 / (2 |h|^2), the same for z
    1 - cos(p, p')     ~ Var_r(Dz) / (2 T^2),    r = p^2 / sum p^2
    KL(p || p')        ~ Var_p(Dz) / (2 T^2)
All are of second order: exact in the limit of small changes, and measured here beside what they stand for.

Three stages:
- `probe`: one sublayer or layer at a time left out, all before it dense; both states after it go through the final norm
  and the head (Figures 4, 5, 6).
- `compare`, decoding: what the dense model says on after a prompt, read by both models (teacher-forced), and the
  pruned model's own continuation beside it (free-running, Figure 7); state by state on the same text.
- `compare`, choices: one token out of a few letters; p over all tokens beside p over the letters (Figure 8).

Where we differ from the released code (CASE-Lab-UMD/Pruning-on-Representations ba1c25b):
- it applies the head to inner states WITHOUT the final norm; here with it, unless `final_norm` is off;
- the direction of KL and the weights of its estimate change between its modes; here KL(dense || other) throughout;
- it samples up to 512 tokens from one prompt at T = 0.5, so histories part by chance; here both models are greedy, over
  several prompts, with standard errors, and the teacher-forced reading has one history;
- its cached steps of a pruned attention see the present token alone; here caches are the models' own.
Position 0, a massive-activation token in most models, is never looked at.
"""
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdp_core.base.records import Probes, Spaces
from kdp_core.methods import slicegpt
from kdp_core.model import checkpoints
from kdp_core.model.distil import head_of, to_head
from kdp_core.model.families import Family, decoder_layers, family_of
from kdp_core.model.passes import Passes
from kdp_core.score import standard_errors
from kdp_core.score.diagnose import kept_states
from kdp_core.states.hidden import boundary_states

logger = logging.getLogger(__name__)
PARTS = ("attention", "mlp", "whole")
DEPTH_STEPS = 8
"""About so many of the decoding steps are compared state by state: every state goes through the head."""
LETTERS = "ABCDEFGHIJ"
ERRORS = "_stderr"
TOPS = (5, 10)
"""Numbers of most likely tokens over which the variance of Dz is taken too."""


class SpacesError(ValueError):
    """Models, text or options that give nothing to compare."""


class Choice(NamedTuple):
    """One multiple-choice item."""
    context: str
    choices: list[str]


# One pair of vectors a token ------------------------------------------------------------------------------------------

def angle(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """1 - cos(a, b) of each row, float64."""
    # 1 - cos = |a / |a| - b / |b||^2 / 2, which keeps its digits where the cosine is near 1
    unit_a_ND, unit_b_ND = (nn.functional.normalize(x_ND.double(), dim=-1) for x_ND in (a_ND, b_ND))
    return (unit_a_ND - unit_b_ND).square().sum(dim=-1) / 2


def split(a_ND: Tensor, b_ND: Tensor) -> tuple[Tensor, Tensor]:
    """|part of b - a along a| / |a| and |the rest| / |a| of each row, float64."""
    a_ND, d_ND = a_ND.double(), (b_ND - a_ND).double()
    square_N = a_ND.square().sum(dim=-1).clamp_min(1e-300)
    along_N = (d_ND * a_ND).sum(dim=-1) / square_N
    rest_ND = d_ND - along_N[:, None] * a_ND
    return along_N.abs(), (rest_ND.square().sum(dim=-1) / square_N).sqrt()


def variance(weight_NV: Tensor, d_NV: Tensor) -> Tensor:
    """Var_w(d) of each row; weights sum to 1."""
    mean_N = (weight_NV * d_NV).sum(dim=-1)
    return (weight_NV * (d_NV - mean_N[:, None]).square()).sum(dim=-1)


def outputs(z_NV: Tensor, other_NV: Tensor, temperature: float) -> dict[str, Tensor]:
    """What two logits of each token differ by in p, and the estimates of it from z alone; float64."""
    z_NV, d_NV = z_NV.double(), (other_NV - z_NV).double()
    logp_NV, logq_NV = (z_NV / temperature).log_softmax(dim=-1), ((z_NV + d_NV) / temperature).log_softmax(dim=-1)
    p_NV, scale = logp_NV.exp(), 2 * temperature ** 2
    r_NV = p_NV.square() / p_NV.square().sum(dim=-1, keepdim=True)
    found = {"angle_p": angle(p_NV, logq_NV.exp()),
             # KL(p || q) = sum_v p_v (log p_v - log q_v)
             "kl": (p_NV * (logp_NV - logq_NV)).sum(dim=-1).clamp_min(0),
             # 1 - cos p ~ Var_r(Dz) / (2 T^2),  KL ~ Var_p(Dz) / (2 T^2)
             "estimate_p": variance(r_NV, d_NV) / scale, "estimate_kl": variance(p_NV, d_NV) / scale,
             "estimate_uniform": d_NV.var(dim=-1, correction=0) / scale,
             "agreement": (logp_NV.argmax(dim=-1) == logq_NV.argmax(dim=-1)).double()}
    for top in TOPS:
        first_NK = logp_NV.topk(min(top, logp_NV.shape[-1]), dim=-1).indices
        found[f"estimate_top{top}"] = d_NV.gather(-1, first_NK).var(dim=-1, correction=0) / scale
    return found


def measures(h_ND: Tensor, other_ND: Tensor, z_NV: Tensor, other_NV: Tensor, temperature: float) -> dict[str, Tensor]:
    """All that two states and their logits differ by, a number a token each, float64."""
    found = {}
    for space, a, b in (("h", h_ND, other_ND), ("z", z_NV, other_NV)):
        parallel_N, orthogonal_N = split(a, b)
        # 1 - cos ~ |D_o|^2 / (2 |a|^2)
        found |= {f"angle_{space}": angle(a, b), f"parallel_{space}": parallel_N, f"orthogonal_{space}": orthogonal_N,
                  f"estimate_{space}": orthogonal_N.square() / 2}
    return found | outputs(z_NV, other_NV, temperature)


def compared(dense: nn.Module, other: nn.Module, h_ND: Tensor, other_ND: Tensor, temperature: float,
             final_norm: bool = True, basis_DE: Tensor | None = None) -> dict[str, Tensor]:
    """`measures` of states before the final norm, each through its own model's head, a chunk of tokens at a time.

    basis_DE: of a sliced model's states, which are turned back to the dense model's basis before they are compared.
    """
    # float64 and half a dozen matrices of logits at once
    size = max(1, head_of(dense).chunk() // 8)
    chunks = [measures(*turned(dense, h_CD, o_CD, basis_DE),
                       logits(dense, h_CD, final_norm).cpu(), logits(other, o_CD, final_norm).cpu(), temperature)
              for h_CD, o_CD in zip(h_ND.split(size), other_ND.split(size), strict=True)]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def turned(dense: nn.Module, h_ND: Tensor, other_NE: Tensor, basis_DE: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both states in the dense model's basis: a sliced model's are turned back, and lack the mean of layer norms."""
    if basis_DE is None:
        return h_ND, other_NE
    return slicegpt.mean_free(h_ND, family_of(dense)), other_NE @ basis_DE.T


def logits(model: nn.Module, h_ND: Tensor, final_norm: bool = True) -> Tensor:
    """z = W norm(h), or W h as the released code reads inner states."""
    return head_of(model)(to_head(model, h_ND) if final_norm else h_ND)


def averaged(found: dict[str, Tensor], groups: int) -> dict[str, float | None]:
    """Mean of each measure over its tokens, and its standard error over equal groups of them, one after another."""
    row: dict[str, float | None] = {}
    for name, values_N in found.items():
        mean_G = values_N.view(groups, -1).mean(dim=1)
        row[name] = mean_G.mean().item()
        row[name + ERRORS] = standard_errors.mean(mean_G)
    return row


# One layer at a time --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def probe(dense_folder: str | Path, ids_ST: Tensor, *, parts: list[str] | None = None, windows: int = 8,
          positions: int = 16, temperature: float = 1.0, final_norm: bool = True, device: str = "cpu",
          dtype: str = "float32") -> Probes:
    """Leave out one part of one layer at a time and compare the states after that layer.

    parts: of a layer that are left out in turn: attention, mlp, whole; null means all three.
    windows: of held-out text, the first ones.
    positions: tokens of a window that are looked at, evenly spaced, the last one in.
    temperature: T of the probabilities, above 0.
    final_norm: whether inner states go through the final norm before the head; off as in the released code.
    Raises SpacesError for parts, windows or positions that are not there.
    """
    began, parts = time.perf_counter(), list(PARTS) if parts is None else parts
    if unknown := [part for part in parts if part not in PARTS]:
        raise SpacesError(f"spaces.probe.parts names {unknown[0]!r}; choose among {', '.join(PARTS)}")
    _check(ids_ST, windows, temperature)
    chosen = spaced(ids_ST.shape[1], positions)
    model = checkpoints.load_model(dense_folder, device=device, dtype=dtype)
    ids_BT, family = ids_ST[:windows], family_of(model)
    passes, layers = Passes(model, ids_ST.shape[1]), len(decoder_layers(model))
    h_KBTD = boundary_states(model, ids_BT, list(range(layers + 1)))
    rows, tokens = [], []
    for layer in range(layers):
        before_BTD = h_KBTD[layer].to(model.device, model.dtype)
        after_ND = _picked(h_KBTD[layer + 1], chosen)
        for part in parts:
            with without(passes.layers[layer], family, part):
                left_BTD = before_BTD if part == "whole" else passes.layer(layer, before_BTD)
            # the state after the last layer passes the final norm in the model itself
            normed = final_norm or layer + 1 == layers
            found = compared(model, model, after_ND, _picked(left_BTD.float().cpu(), chosen), temperature, normed)
            rows.append({"layer": layer, "part": part, **averaged(found, windows)})
            tokens += [{"layer": layer, "part": part, "window": window,
                        **{name: found[name].view(windows, -1)[window, -1].item()
                           for name in ("angle_p", "estimate_p", "kl", "estimate_kl")}} for window in range(windows)]
        logger.info("probe: layer %d of %d", layer + 1, layers)
    return Probes(temperature, final_norm, windows, chosen, rows, tokens, {"seconds": time.perf_counter() - began})


@contextmanager
def without(layer: nn.Module, family: Family, part: str) -> Iterator[None]:
    """The layer with its attention or its MLP adding nothing; `whole` is for the caller to leave out."""
    if part == "whole":
        yield
        return
    adding = layer.get_submodule(family.parts[part].module)

    def nothing(_: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    hook = adding.register_forward_hook(nothing)
    try:
        yield
    finally:
        hook.remove()


def spaced(length: int, count: int) -> list[int]:
    """So many positions of a window, evenly spaced: the last is the window's last, 0 is never one."""
    if not 1 <= count < length:
        raise SpacesError(f"spaces.probe.positions {count}: windows have {length} tokens, of which the first is left "
                          f"out; give 1 to {length - 1}")
    return [length - 1 - (count - 1 - i) * (length - 1) // count for i in range(count)]


def _picked(h_BTD: Tensor, positions: Sequence[int]) -> Tensor:
    return h_BTD[:, positions].flatten(0, 1)


# A pruned model beside the dense one ----------------------------------------------------------------------------------

@torch.inference_mode()
def compare(dense_folder: str | Path, pruned_folder: str | Path, ids_ST: Tensor, items: list[Choice], *,
            dropped: list[int], prompts: int = 8, prompt_tokens: int = 64, steps: int = 32, choices: int = 32,
            temperature: float = 1.0, final_norm: bool = True, device: str = "cpu", dtype: str = "float32") -> Spaces:
    """Decode after prompts and answer multiple-choice items with both models.

    ids_ST: windows of held-out text, whose beginnings are the prompts.
    items: multiple-choice items; none are needed.
    dropped: layers of the dense model that the pruned one lacks whole, for the numbers of its states.
    prompts: number of prompts, the first windows.
    prompt_tokens: of each prompt.
    steps: tokens that are decoded after it.
    choices: items at most, the first ones.
    temperature: T of the probabilities, above 0; the choice of tokens is greedy whatever it is.
    final_norm: whether inner states go through the final norm before the head; off as in the released code.
    Raises SpacesError for windows, prompts or letters that do not fit.
    """
    began = time.perf_counter()
    _check(ids_ST, prompts, temperature)
    if not 2 <= prompt_tokens <= ids_ST.shape[1] or steps < 1:
        raise SpacesError(f"spaces.compare: prompts of {prompt_tokens} tokens and {steps} steps; windows have "
                          f"{ids_ST.shape[1]} tokens, so give 2 to {ids_ST.shape[1]} and at least 1 step")
    dense, pruned = (checkpoints.load_model(folder, device=device, dtype=dtype) for folder in (dense_folder, pruned_folder))
    states = kept_states(len(decoder_layers(dense)), dropped)
    if len(states) != len(decoder_layers(pruned)) + 1:
        raise SpacesError(f"dropped names {len(dropped)} layers and the pruned model has "
                          f"{len(decoder_layers(pruned))} left; give the layers of its own plan")
    prompt_BT = ids_ST[:prompts, :prompt_tokens]
    said_BG, own_BG = (greedy(model, prompt_BT, steps) for model in (dense, pruned))
    rows, depth = _decoding(dense, pruned, prompt_BT, said_BG, own_BG, states, temperature, final_norm)
    logger.info("spaces: %d prompts of %d steps decoded", prompts, steps)
    answers = _answers(dense, pruned, checkpoints.load_tokenizer(dense_folder), items[:choices], temperature)
    return Spaces(temperature, final_norm, prompts, prompt_tokens, steps, rows, depth, answers,
                  {"seconds": time.perf_counter() - began})


def greedy(model: nn.Module, prompt_BT: Tensor, steps: int) -> Tensor:
    """The next `steps` most likely tokens after each prompt, id_BG; of equal ones the lowest, and no stop at an end."""
    output = model(prompt_BT.to(model.device), use_cache=True)
    said = [output.logits[:, -1].argmax(dim=-1)]
    while len(said) < steps:
        output = model(said[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        said.append(output.logits[:, -1].argmax(dim=-1))
    return torch.stack(said, dim=1).cpu()


def _decoding(dense: nn.Module, pruned: nn.Module, prompt_BT: Tensor, said_BG: Tensor, own_BG: Tensor,
              states: list[int], temperature: float, final_norm: bool) -> tuple[list[dict[str, Any]],
                                                                               list[dict[str, Any]]]:
    """Rows by decoding step, of both histories, and by state, of the dense model's history."""
    (B, T), G, own = prompt_BT.shape, said_BG.shape[1], list(range(len(states)))
    # the state at position T - 1 + g predicts the token of step g
    at = list(range(T - 1, T - 1 + G))
    dense_KBTD = boundary_states(dense, torch.cat((prompt_BT, said_BG[:, :-1]), dim=1), states)
    forced_KBTD = boundary_states(pruned, torch.cat((prompt_BT, said_BG[:, :-1]), dim=1), own)
    free_BTD, = boundary_states(pruned, torch.cat((prompt_BT, own_BG[:, :-1]), dim=1), own[-1:])
    last_ND = _picked(dense_KBTD[-1], at)
    bases = slicegpt.bases_of(dense, pruned) if getattr(pruned.config, "sliced", None) else [None] * len(states)
    rows = []
    for history, other_BTD in (("dense", forced_KBTD[-1]), ("own", free_BTD)):
        found = compared(dense, pruned, last_ND, _picked(other_BTD, at), temperature, basis_DE=bases[-1])
        by_step = {name: values_N.view(B, G) for name, values_N in found.items()}
        # a text is the same as far as all its tokens are
        by_step["same_text"] = (said_BG == own_BG).double().cumprod(dim=1)
        rows += [{"history": history, "step": step + 1,
                  **averaged({name: values_BG[:, step] for name, values_BG in by_step.items()}, B)}
                 for step in range(G)]
    few = at[::max(1, G // DEPTH_STEPS)]
    depth = []
    for state, basis_DE, *pair in zip(states, bases, dense_KBTD, forced_KBTD, strict=True):
        h_ND, other_ND, last = *(_picked(h_BTD, few) for h_BTD in pair), state == states[-1]
        if basis_DE is not None and not last:
            # a sliced model's head reads the basis of its last state alone
            found = compared(dense, dense, *turned(dense, h_ND, other_ND, basis_DE), temperature, final_norm)
        else:
            found = compared(dense, pruned, h_ND, other_ND, temperature, final_norm or last, basis_DE)
        depth.append({"state": state, **averaged(found, B)})
    return rows, depth


def prompt_of(item: Choice) -> str:
    """An item as a question for a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
    return "\n".join(["How does this text go on?", item.context, *lines, "Answer:"])


def restricted(z_NV: Tensor, other_NV: Tensor, candidates: list[int], temperature: float) -> dict[str, Tensor]:
    """p over all tokens beside p over the candidates, renormalised, a number a token each."""
    full, few = (outputs(z, other, temperature) for z, other in (
        (z_NV, other_NV), (z_NV[:, candidates], other_NV[:, candidates])))
    p_NV, q_NV = ((z / temperature).double().softmax(dim=-1) for z in (z_NV, other_NV))
    best_N = p_NV[:, candidates].max(dim=-1).values
    names = ("angle_p", "kl", "agreement")
    return {**{name: full[name] for name in names}, **{f"{name}_candidates": few[name] for name in names},
            "mass": p_NV[:, candidates].sum(dim=-1), "mass_other": q_NV[:, candidates].sum(dim=-1),
            # how many tokens are more likely than the likeliest candidate, plus one
            "rank": (p_NV > best_N[:, None]).sum(dim=-1).double() + 1}


def _answers(dense: nn.Module, pruned: nn.Module, tokenizer: Any, items: list[Choice],
             temperature: float) -> list[dict[str, Any]]:
    """A row an item."""
    rows = []
    for number, item in enumerate(items):
        if not 2 <= len(item.choices) <= len(LETTERS):
            raise SpacesError(f"item {number} has {len(item.choices)} choices; give 2 to {len(LETTERS)}")
        # the last sub-token of " A", as the released code takes it
        candidates = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"][-1]
                      for letter in LETTERS[:len(item.choices)]]
        if len(set(candidates)) < len(candidates):
            raise SpacesError(f"the tokenizer gives two letters of {LETTERS[:len(candidates)]} the same last token; "
                              "set spaces.compare.choices to 0")
        ids_1T = torch.tensor([tokenizer(prompt_of(item))["input_ids"]])
        z_1V, other_1V = (model(ids_1T.to(model.device), use_cache=False).logits[:, -1].float().cpu()
                          for model in (dense, pruned))
        found = restricted(z_1V, other_1V, candidates, temperature)
        rows.append({"item": number, "candidates": len(candidates),
                     **{name: value_1.item() for name, value_1 in found.items()}})
    return rows


def _check(ids_ST: Tensor, windows: int, temperature: float) -> None:
    if not 1 <= windows <= len(ids_ST):
        raise SpacesError(f"spaces: {windows} windows asked for, there are {len(ids_ST)} of held-out text; give 1 to "
                          f"{len(ids_ST)}, or more text")
    if not temperature > 0:
        raise SpacesError(f"spaces: temperature {temperature} is not above 0; give 1, or less for sharper outputs")
