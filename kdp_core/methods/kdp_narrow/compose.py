"""kdp_narrow: every layer stays, its MLP and its attention get narrower, and the writers make up for it.

KDP replaces the layers between two states by a map of the first state. Such a map reads one token, so what the removed
attentions gave is lost. Here every layer keeps a part of its own attention, hence the context:
1. `ladder`  what each part of each layer loses at the outputs with fewer channels or heads;
2. `budget`  what each part keeps, so that the sum of losses is least at the given ratio;
3. `in_order`  the optimal brain surgeon chooses channels and heads on the already pruned prefix, and each writer is
   solved again in closed form against the dense model's states (o_proj and down_proj in LLaMA's words);
4. `train`  all writers together against the outputs of the dense model, for `epochs` epochs.
So the last matrices of attentions and MLPs are changed, and all other kept weights are those of the dense model. With
`solve: false` and `epochs: 0` every kept weight is untouched.

ZipLM (Kurtic et al. 2023), OSSCAR (Meng et al. 2024) and SlimGPT (Ling et al. 2024) have the surgeon's rule and the new
solution. New here: the target is the state of the dense model, as in kdp_residual; the price of a unit is the loss at
the outputs; heads and channels share one budget; and the writers are trained together.
"""
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdp_core.base.options import Chance, Count, Natural, NotNegative, Positive, Share, check
from kdp_core.base.records import Composed, Plan, Selection, Tokens
from kdp_core.base.resume import OFF, Resume
from kdp_core.methods import _outputs
from kdp_core.methods._select import BlockError
from kdp_core.methods._widths import PARTS, coupled_of, narrow_tensors, sizes_of, width_of
from kdp_core.methods.kdp_narrow import fit, parts
from kdp_core.methods.kdp_narrow.budget import Ladder, allocate
from kdp_core.methods.kdp_narrow.fit import Closed, Part
from kdp_core.model import checkpoints
from kdp_core.model.families import decoder_layers, family_of
from kdp_core.model.passes import Passes
from kdp_core.model.sizes import count_params
from kdp_core.model.surgery import narrow
from kdp_core.states.block import FitError, split
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
GRAINS = 2000
"""Steps of the knapsack up to the goal."""
STEPS = 48
"""Steps of the channels of an MLP in the knapsack."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", solve: bool = True, ridge: NotNegative = 1e-3, sequences: Count = 320,
            ladder_sequences: Count = 96, judge_sequences: Count = 8, epochs: Natural = 2, lr: Positive = 2e-4,
            batch_sequences: Count = 8, positions: Count = 64, kl_weight: Chance = 0.8, heldout: Share = 0.05,
            seed: Natural = 0, resume: Resume = OFF) -> Composed:
    """Narrow the attentions and MLPs of all layers to the ratio, and fit their writers.

    `dense` is the checkpoint folder; `hidden` holds all its states over `tokens`.
    solve: whether writers are solved again; otherwise kept weights stay as they are until they are trained.
    ridge: ridge of the closed form towards the old matrix, relative to the mean diagonal of the Gram matrix.
    sequences: sequences that the writers are solved on.
    ladder_sequences: sequences that the writers of a ladder are solved on.
    judge_sequences: other sequences, on which ladders compare outputs.
    epochs: passes of training all writers against the dense model's outputs; 0 keeps the closed form.
    lr: peak learning rate of Adam.
    batch_sequences: sequences of an update and of a forward pass.
    positions: tokens of a sequence whose outputs are compared in an update, drawn anew each time.
    kl_weight: the lambda of lambda KL(dense || pruned) + (1 - lambda) cross-entropy of the next token.
    heldout: share of the sequences that judge and are never fitted on.
    seed: seed of the held-out choice and of the order of training.
    resume: where the state of training is kept.
    Raises BlockError for a ratio out of reach, FitError for states that are not stored or too few sequences.
    """
    check(compose, locals())
    began = time.perf_counter()
    held, kept = split(hidden.sequences, heldout, seed)
    _check(hidden, len(kept), judge_sequences)
    model = checkpoints.load_model(dense, device=device, dtype=dtype).requires_grad_(False)
    passes, how = Passes(model, hidden.tokens), Closed(ridge, solve, batch_sequences)
    drawn = kept[torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))]
    judged, fitted = drawn[:judge_sequences], drawn[judge_sequences:]
    sizes, ladders = _sizes(passes, hidden, selection.ratio_target, fitted[:ladder_sequences], judged, how)
    after_ladders = time.perf_counter()
    found = fit.in_order(passes, hidden, sizes, fitted[:sequences].sort().values, held, how)
    after_fit = time.perf_counter()
    small, widths = _small(model, dense, found, device, dtype)
    curve: list[dict[str, Any]] = []
    if epochs:
        curve = _trained(small, hidden, tokens, kept, held, epochs=epochs, lr=lr, batch_sequences=batch_sequences,
                         positions=positions, kl_weight=kl_weight, seed=seed, resume=resume)
    best = min(curve, key=lambda row: row["heldout_loss"]) if curve else {}
    stats = {"tokens": len(kept) * hidden.tokens, **_described(found, ladders, count_params(model)),
             **{name: best[name] for name in ("epoch", "heldout_loss", "heldout_kl") if best},
             "seconds_ladders": after_ladders - began, "seconds_closed_form": after_fit - after_ladders,
             "seconds": time.perf_counter() - began + resume.earlier_s}
    return Composed(Plan("kdp_narrow", [], [], _tensors(small), shape={"widths": widths}), curve,
                    [{"block": (part.layer, part.layer + 1), "part": part.name, "heldout_error": error, "params": 0}
                     for part, _, error in found], stats)


def _check(hidden: HiddenStates, kept: int, judge_sequences: int) -> None:
    if hidden.layers != list(range(len(hidden.layers))):
        raise FitError(f"{hidden.path} lacks states (stored: {hidden.layers}); set hidden.layers to all")
    if judge_sequences >= kept:
        raise FitError(f"compose.judge_sequences {judge_sequences} of {kept} sequences leave none to fit on; lower it "
                       "or add calibration sequences")


def _parts(model: nn.Module) -> list[Part]:
    """All parts in the order of depth, with their units and what a unit counts."""
    layers = decoder_layers(model)
    sizes = sizes_of(layers[0], coupled_of(layers[0], family_of(model)), model.config, len(layers))
    return [Part(number, name, sizes.units[name], sizes.unit_params[name])
            for number in range(len(layers)) for name in PARTS]


def _sizes(passes: Passes, hidden: HiddenStates, ratio: float, fitted: Tensor, judged: Tensor,
           how: Closed) -> tuple[list[tuple[Part, int]], list[Ladder]]:
    """What each part keeps, and the ladders of all parts."""
    every = _parts(passes.model)
    ladders = [fit.ladder(passes, hidden, part, fitted, judged, how, max(1, part.units // STEPS)) for part in every]
    return list(zip(every, _counts(ladders, ratio * count_params(passes.model), ratio), strict=True)), ladders


def _counts(ladders: list[Ladder], goal: float, ratio: float) -> list[int]:
    """Units that each part keeps. The rounding of the knapsack is made good in the MLPs, one channel at a time."""
    counts = allocate(ladders, round(goal), max(1, round(goal / GRAINS)))
    if counts is None:
        most = sum((one.units - min(one.losses)) * one.unit_params for one in ladders)
        raise BlockError(f"ratio {ratio} is too high: kdp_narrow removes at most {most / goal * ratio:.4f} of all "
                         "parameters, since each part keeps some of its units; ask for less")
    channel = min(one.unit_params for one in ladders)
    over = sum((one.units - count) * one.unit_params for one, count in zip(ladders, counts, strict=True)) - goal
    while abs(over) > channel / 2:
        # channels come back where the smallest share is left, and leave where the largest is
        within = [n for n, one in enumerate(ladders) if one.unit_params == channel and 1 < counts[n] < one.units]
        chosen = (min if over > 0 else max)(within, key=lambda n: (counts[n] / ladders[n].units, n))
        counts[chosen] += 1 if over > 0 else -1
        over -= channel if over > 0 else -channel
    return counts


def _small(model: nn.Module, dense: Path, found: list[tuple[Part, Tensor, float]], device: str,
           dtype: str) -> tuple[nn.Module, list[dict[str, int]]]:
    """The narrowed model, and the widths of its layers."""
    layers = decoder_layers(model)
    coupled = coupled_of(layers[0], family_of(model))
    sizes = sizes_of(layers[0], coupled, model.config, len(layers))
    kept: list[dict[str, Tensor]] = [{} for _ in layers]
    for part, units, _ in found:
        kept[part.layer][part.name] = units
    state, widths = dict(model.state_dict()), []
    for number, own in enumerate(kept):
        state |= narrow_tensors(model, number, coupled, own, sizes)
        widths.append(width_of(model.config, sizes, *(sizes.units[name] - len(own[name]) for name in PARTS)))
    small = checkpoints.load_model(dense, device=device, dtype=dtype)
    narrow(small, widths)
    small.load_state_dict(state)
    return small.requires_grad_(False).eval(), widths


def _trained(small: nn.Module, hidden: HiddenStates, tokens: Tokens, kept: Tensor, held: Tensor,
             **options: Any) -> list[dict[str, Any]]:
    """Train the writers of the narrowed model in place."""
    passes = Passes(small, hidden.tokens)
    weights = [parts.writer_of(passes, layer, part).weight.requires_grad_(True)
               for layer in range(len(passes.layers)) for part in PARTS]
    curve = _outputs.train(passes, list(range(len(passes.layers))), _outputs.data_of(hidden, tokens, 0), weights, kept,
                           held, **options)
    small.requires_grad_(False)
    return curve


def _tensors(small: nn.Module) -> dict[str, Tensor]:
    """The tensors of the parts of all layers, on the CPU."""
    family, state = family_of(small), small.state_dict()
    names = [f"{family.prefix}{number}.{one.name}" for number, layer in enumerate(decoder_layers(small))
             for one in coupled_of(layer, family)]
    return {name: state[name].detach().cpu().clone() for name in names}


def _described(found: list[tuple[Part, Tensor, float]], ladders: list[Ladder], total: int) -> dict[str, Any]:
    """What left, from where, and the ladders that led to it."""
    removed = sum((part.units - len(units)) * part.unit_params for part, units, _ in found)
    return {"share": removed / total,
            "layers": [{"layer": part.layer, "part": part.name, "kept": len(units), "of": part.units}
                       for part, units, _ in found],
            "ladders": [{"layer": part.layer, "part": part.name,
                         "losses": {str(kept): loss for kept, loss in ladder.losses.items()}}
                        for (part, _, _), ladder in zip(found, ladders, strict=True)]}
