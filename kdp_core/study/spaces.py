"""What pruning does to states, logits and probabilities, for one removed layer at a time and for a whole pruned model.

Paper: "Demystifying When Pruning Works via Representation Hierarchies" (ICML 2026), Figures 4 to 8. The module
`distances` defines the three spaces, the distances and their estimates.
- `probe` removes one layer, attention or MLP at a time. All layers before the changed layer are those of the dense
  model. The states of both models after the changed layer are compared. The final norm and the head are applied to the
  dense and to the pruned state (Figures 4, 5, 6).
- `compare` measures two continuations of a prompt. Both models read the continuation that the dense model wrote
  (teacher-forced). The pruned model also reads the continuation that it wrote itself (free-running, Figure 7). On the
  dense model's continuation the two models are also compared state by state.
- `compare` also lets both models answer questions with a letter. For these answers it measures p over all tokens and p
  over the letters alone (Figure 8).

Differences from the released code (CASE-Lab-UMD/Pruning-on-Representations ba1c25b):
- The released code applies the head to inner states WITHOUT the final norm. Here the final norm is applied first,
  unless `final_norm` is false.
- The released code samples up to 512 tokens from one prompt at T = 0.5, so the texts of the two models also differ by
  chance. Here both models decode greedily after several prompts, and standard errors are computed. In the
  teacher-forced comparison, both models read the dense model's text.
- In the released code, a pruned attention sees only the present token during cached decoding. Here each model has its
  own cache.
Position 0, a massive token in most models, is never measured.
"""
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from annotated_types import Ge
from torch import Tensor, nn

from kdp_core.base import options
from kdp_core.base.measurements import Probes, Spaces
from kdp_core.base.options import Count, Natural, Positive
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.passes import Passes
from kdp_core.model.surgery import without
from kdp_core.score.diagnose import kept_states
from kdp_core.score.generation import greedy
from kdp_core.states.bases import bases_of
from kdp_core.states.hidden import boundary_states
from kdp_core.study.distances import averaged, compared, restricted, turned

logger = logging.getLogger(__name__)
Part = Literal["attention", "mlp", "whole"]
DEPTH_STEPS = 8
"""Approximate number of decoded tokens for which all states are compared. The number is small, because the output head
must read every state of these tokens, which is slow."""
LETTERS = "ABCDEFGHIJ"
"""The letters that name the choices of an item."""


class SpacesError(ValueError):
    """These options or this text do not allow a comparison."""


class Choice(NamedTuple):
    """One multiple-choice item."""
    context: str
    choices: list[str]


# One layer at a time --------------------------------------------------------------------------------------------------

@torch.inference_mode()
def probe(dense_folder: str | Path, ids_ST: Tensor, *, parts: list[Part] | None = None, windows: Count = 8,
          positions: Count = 16, temperature: Positive = 1.0, final_norm: bool = True, device: str = "cpu",
          dtype: str = "float32") -> Probes:
    """Remove one part of one layer at a time, and compare the states after this layer with the dense states.

    parts: the parts that are removed, one at a time; null means attention, mlp and whole.
    windows: number of windows of held-out text; the first windows are taken.
    positions: number of tokens compared in each window, evenly spaced up to the last token.
    temperature: T of the probabilities.
    final_norm: whether the final norm is applied to inner states before the head; false as in the released code.
    Raises OptionError for a value out of range, and SpacesError if the text has too few windows or the windows too few
    positions.
    """
    options.check(probe, locals())
    began, parts = time.perf_counter(), list(get_args(Part)) if parts is None else parts
    _check(ids_ST, windows)
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
            # in the model itself the final norm is applied to the state after the last layer
            normed = final_norm or layer + 1 == layers
            found = compared(model, model, after_ND, _picked(left_BTD.float().cpu(), chosen), temperature, normed)
            rows.append({"layer": layer, "part": part, **averaged(found, windows)})
            tokens += [{"layer": layer, "part": part, "window": window,
                        **{name: found[name].view(windows, -1)[window, -1].item()
                           for name in ("angle_p", "estimate_p", "kl", "estimate_kl")}} for window in range(windows)]
        logger.info("probe: layer %d of %d", layer + 1, layers)
    return Probes(temperature, final_norm, windows, chosen, rows, tokens, {"seconds": time.perf_counter() - began})


def spaced(length: int, count: int) -> list[int]:
    """`count` evenly spaced positions of a window. The last position is always included, and position 0 never."""
    if count >= length:
        raise SpacesError(f"spaces.probe.positions is {count}, but windows have {length} tokens, of which the first is "
                          f"left out; give 1 to {length - 1}")
    return [length - 1 - (count - 1 - i) * (length - 1) // count for i in range(count)]


def _picked(h_BTD: Tensor, positions: Sequence[int]) -> Tensor:
    return h_BTD[:, positions].flatten(0, 1)


# A pruned model and the dense one -------------------------------------------------------------------------------------

@torch.inference_mode()
def compare(dense_folder: str | Path, pruned_folder: str | Path, ids_ST: Tensor, items: list[Choice], *,
            dropped: list[int], prompts: Count = 8, prompt_tokens: Annotated[int, Ge(2)] = 64, steps: Count = 32,
            choices: Natural = 32, temperature: Positive = 1.0, final_norm: bool = True, device: str = "cpu",
            dtype: str = "float32") -> Spaces:
    """With both models, decode after prompts and answer multiple-choice items.

    ids_ST: windows of held-out text; the beginnings of the windows are the prompts.
    items: multiple-choice items; the list may be empty.
    dropped: numbers of the whole layers that were removed from the dense model. These numbers decide which states are
        compared.
    prompts: number of prompts; they come from the first windows.
    prompt_tokens: number of tokens of each prompt.
    steps: number of tokens that are decoded after each prompt.
    choices: largest number of multiple-choice items; the first items are used.
    temperature: T of the probabilities. Decoding is always greedy.
    final_norm: whether the final norm is applied to inner states before the head; false as in the released code.
    Raises OptionError for a value out of range, and SpacesError for windows, prompts or letters that do not fit
    together.
    """
    options.check(compare, locals())
    began = time.perf_counter()
    _check(ids_ST, prompts)
    if prompt_tokens > ids_ST.shape[1]:
        raise SpacesError(f"spaces.compare.prompt_tokens is {prompt_tokens}, but windows have {ids_ST.shape[1]} "
                          f"tokens; give 2 to {ids_ST.shape[1]}")
    dense, pruned = (checkpoints.load_model(folder, device=device, dtype=dtype)
                     for folder in (dense_folder, pruned_folder))
    states = kept_states(len(decoder_layers(dense)), dropped)
    if len(states) != len(decoder_layers(pruned)) + 1:
        raise SpacesError(f"dropped names {len(dropped)} layers, but the pruned model has "
                          f"{len(decoder_layers(pruned))}; give the layers of its own plan")
    prompt_BT = ids_ST[:prompts, :prompt_tokens]
    said_BG, own_BG = (greedy(model, prompt_BT, steps) for model in (dense, pruned))
    rows, depth = _decoding(dense, pruned, prompt_BT, said_BG, own_BG, states, temperature, final_norm)
    logger.info("spaces: %d tokens decoded after each of %d prompts", steps, prompts)
    answers = _answers(dense, pruned, checkpoints.load_tokenizer(dense_folder), items[:choices], temperature)
    return Spaces(temperature, final_norm, prompts, prompt_tokens, steps, rows, depth, answers,
                  {"seconds": time.perf_counter() - began})


def _decoding(dense: nn.Module, pruned: nn.Module, prompt_BT: Tensor, said_BG: Tensor, own_BG: Tensor,
              states: list[int], temperature: float, final_norm: bool) -> tuple[list[dict[str, Any]],
                                                                               list[dict[str, Any]]]:
    """Two lists of rows. The first list has one row for each decoded token of both histories: of the dense model's text
    and of the pruned model's own text. The second list has one row for each state; these states are computed on the
    dense model's text."""
    (B, T), G, own = prompt_BT.shape, said_BG.shape[1], list(range(len(states)))
    # the state at position T - 1 + g predicts decoded token g
    at = list(range(T - 1, T - 1 + G))
    dense_KBTD = boundary_states(dense, torch.cat((prompt_BT, said_BG[:, :-1]), dim=1), states)
    forced_KBTD = boundary_states(pruned, torch.cat((prompt_BT, said_BG[:, :-1]), dim=1), own)
    free_BTD, = boundary_states(pruned, torch.cat((prompt_BT, own_BG[:, :-1]), dim=1), own[-1:])
    last_ND = _picked(dense_KBTD[-1], at)
    bases = bases_of(dense, pruned) if getattr(pruned.config, "sliced", None) else [None] * len(states)
    rows = []
    for history, other_BTD in (("dense", forced_KBTD[-1]), ("own", free_BTD)):
        found = compared(dense, pruned, last_ND, _picked(other_BTD, at), temperature, basis_DE=bases[-1])
        by_step = {name: values_N.view(B, G) for name, values_N in found.items()}
        # two texts agree up to the first token that differs
        by_step["same_text"] = (said_BG == own_BG).double().cumprod(dim=1)
        rows += [{"history": history, "step": step + 1,
                  **averaged({name: values_BG[:, step] for name, values_BG in by_step.items()}, B)}
                 for step in range(G)]
    few = at[::max(1, G // DEPTH_STEPS)]
    depth = []
    for state, basis_DE, *pair in zip(states, bases, dense_KBTD, forced_KBTD, strict=True):
        h_ND, other_ND, last = *(_picked(h_BTD, few) for h_BTD in pair), state == states[-1]
        if basis_DE is not None and not last:
            # the head of a sliced model needs only the basis of the last state
            found = compared(dense, dense, *turned(dense, h_ND, other_ND, basis_DE), temperature, final_norm)
        else:
            found = compared(dense, pruned, h_ND, other_ND, temperature, final_norm or last, basis_DE)
        depth.append({"state": state, **averaged(found, B)})
    return rows, depth


def prompt_of(item: Choice) -> str:
    """The text of an item as a question whose answer is a letter."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, item.choices, strict=False)]
    return "\n".join(["How does this text go on?", item.context, *lines, "Answer:"])


def _answers(dense: nn.Module, pruned: nn.Module, tokenizer: Any, items: list[Choice],
             temperature: float) -> list[dict[str, Any]]:
    """One row with the comparison of both models for each item."""
    rows = []
    for number, item in enumerate(items):
        if not 2 <= len(item.choices) <= len(LETTERS):
            raise SpacesError(f"item {number} has {len(item.choices)} choices; give 2 to {len(LETTERS)}")
        # the last token of " A", as in the released code
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


def _check(ids_ST: Tensor, windows: int) -> None:
    if windows > len(ids_ST):
        raise SpacesError(f"spaces asks for {windows} windows, but the held-out text has {len(ids_ST)}; give 1 to "
                          f"{len(ids_ST)}, or more text")
