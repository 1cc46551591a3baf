"""The closed-form half of kdp_narrow: the ladders of all parts, and the writers in the order of depth.

Ladders are measured on the dense model: one part is narrowed at a time, its writer solved again, and the outputs of the
model judge by KL(dense || pruned). Then the sizes are known, and the parts are narrowed for good in the order of depth.
Each writer is solved on what the already pruned model feeds it, with the dense model's state as the target. So it also
takes back what earlier parts did wrong.
Axes: as in `parts`.
"""
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from kdp_core.methods._widths import PARTS, columns_of
from kdp_core.methods.kdp_narrow import parts
from kdp_core.methods.kdp_narrow.budget import Ladder
from kdp_core.methods.kdp_narrow.parts import Fed
from kdp_core.methods.kdp_narrow.surgeon import Regression, kept_units, regression, solved
from kdp_core.model.distil import token_losses
from kdp_core.model.passes import Passes
from kdp_core.states.block import relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
RUNGS = (0.75, 0.5, 0.25)
"""Shares of the channels of an MLP at which its loss is measured."""


class Closed(NamedTuple):
    """How writers are solved."""
    ridge: float
    solve: bool
    """Whether writers are solved again; otherwise kept weights stay as they are."""
    batch: int
    """Sequences of a forward pass."""


class Part(NamedTuple):
    """A part of a layer that may lose units."""
    layer: int
    name: str
    units: int
    unit_params: int


def ladder(passes: Passes, hidden: HiddenStates, part: Part, fitted: Tensor, judged: Tensor, how: Closed,
           step: int) -> Ladder:
    """The loss at each rung of one part of the dense model; its writer is as before afterwards."""
    length = _inputs(passes, part)
    counts = list(range(1, part.units)) if length > 1 else [max(1, round(part.units * share)) for share in RUNGS]
    given = parts.fed(passes, part.layer, part.name, hidden.state(part.layer)[fitted], how.batch)
    equations, old_FD = _equations(passes, part, given, _goal(passes, hidden, part, given, fitted, how), how)
    kept = kept_units(equations, part.units, counts, parts.gain_after(passes, part.layer, part.name))
    losses = {}
    for count, units in kept.items():
        _narrow(passes, part, units, equations, old_FD, how)
        losses[count] = _divergence(passes, hidden, part.layer, judged, how)
    parts.put(parts.writer_of(passes, part.layer, part.name), old_FD, torch.arange(len(old_FD)))
    logger.info("layer %d, %s: divergence %s", part.layer, part.name,
                ", ".join(f"{loss:.4f} with {count}" for count, loss in losses.items()))
    return Ladder(part.units, part.unit_params, losses, 1 if length > 1 else step)


def in_order(passes: Passes, hidden: HiddenStates, sizes: list[tuple[Part, int]], fitted: Tensor, held: Tensor,
             how: Closed) -> list[tuple[Part, Tensor, float]]:
    """Narrow the parts, which are given in the order of depth: (part, kept units, held-out error of the state after).

    The writers of the model are changed in place; removed units get zeros there.
    """
    which, found, changed = torch.cat((fitted, held)), [], False
    h_STD = hidden.state(sizes[0][0].layer)[which]
    for part, count in sizes:
        given = parts.fed(passes, part.layer, part.name, h_STD, how.batch)
        y_STD = _goal(passes, hidden, part, None, which, how)
        changed = changed or count < part.units
        units = torch.arange(part.units)
        if count < part.units or (changed and how.solve):
            fed = Fed(*(one[:len(fitted)] for one in given))
            equations, old_FD = _equations(passes, part, fed, y_STD[:len(fitted)], how)
            units = kept_units(equations, part.units, [count], parts.gain_after(passes, part.layer, part.name))[count]
            _narrow(passes, part, units, equations, old_FD, how)
        after_STD = parts.after(passes, part.layer, part.name, given, how.batch)
        error = relative_error(after_STD[len(fitted):].flatten(0, 1), y_STD[len(fitted):].flatten(0, 1))
        found.append((part, units, error))
        logger.info("layer %d, %s: %d of %d units are kept, held-out error %.4f", part.layer, part.name, count,
                    part.units, error)
        h_STD = after_STD if part.name == PARTS[-1] else h_STD
    return found


def _inputs(passes: Passes, part: Part) -> int:
    """Inputs of the writer that belong to one unit."""
    return parts.writer_of(passes, part.layer, part.name).in_features // part.units


def _goal(passes: Passes, hidden: HiddenStates, part: Part, given: Fed | None, which: Tensor, how: Closed) -> Tensor:
    """The state of the dense model after a part; the part itself still has its own weights."""
    if part.name == PARTS[-1]:
        return hidden.state(part.layer + 1)[which]
    given = given or parts.fed(passes, part.layer, part.name, hidden.state(part.layer)[which], how.batch)
    return parts.after(passes, part.layer, part.name, given, how.batch)


def _equations(passes: Passes, part: Part, given: Fed, y_STD: Tensor, how: Closed) -> tuple[Regression, Tensor]:
    """The normal equations of a part's writer, and its matrix as it is."""
    gram_FF, cross_FD = parts.products(passes, part.layer, part.name, given, y_STD, how.batch)
    old_FD = parts.weights_of(parts.writer_of(passes, part.layer, part.name))
    return regression(gram_FF, cross_FD, old_FD, how.ridge), old_FD


def _narrow(passes: Passes, part: Part, units: Tensor, equations: Regression, old_FD: Tensor, how: Closed) -> None:
    """Give the writer of a part zeros for all units but these, and a new or the old matrix for these."""
    inputs = columns_of(units, _inputs(passes, part))
    parts.put(parts.writer_of(passes, part.layer, part.name),
              solved(equations.of(inputs)) if how.solve else old_FD[inputs], inputs)


@torch.no_grad()
def _divergence(passes: Passes, hidden: HiddenStates, start: int, judged: Tensor, how: Closed) -> float:
    """KL(dense || pruned) in nats a token, of the model as it is now from layer `start` on."""
    h_STD = passes.run_batches(hidden.state(start)[judged], range(start, len(passes.layers)), how.batch)
    final_STD, total = hidden.state(hidden.layers[-1])[judged], 0.0
    for h_BTD, final_BTD in zip(h_STD.split(how.batch), final_STD.split(how.batch), strict=True):
        student, teacher = (passes.to_head(h).flatten(0, 1) for h in (h_BTD, final_BTD))
        losses = token_losses(student, teacher, torch.zeros(len(student), dtype=torch.int64), passes.head, passes.head,
                              kl_weight=1.0)
        total += losses.kl_nats.item() * len(h_BTD)
    return total / len(h_STD)
