"""How many units each part of each layer keeps, so that the sum of the measured losses is minimal at the given ratio.

The losses of the parts are added, as in ZipLM (Kurtic et al. 2023). The choice is therefore a knapsack problem: one
level is chosen from the ladder of each part. Dynamic programming solves the knapsack exactly on a grid of parameters.
Between two measured levels of an MLP the loss is interpolated linearly. If the measured loss is lower with fewer units,
the difference is measurement noise. The loss with fewer units is then set to the higher loss with more units.
"""
from collections import defaultdict
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kdp_core.base.options import Count, Positive, Share, check
from kdp_core.base.records import ModelFacts, Search, Selection
from kdp_core.methods._select import BlockError, no_layer
from kdp_core.methods.heads_channels.knapsack import knapsack
from kdp_core.methods.kdp_narrow.rare import PART

GRAINS = 2000
"""Number of steps of the knapsack from zero to the goal."""
STEPS = 48
"""Number of steps into which the knapsack divides the channels of an MLP."""


class Ladder(NamedTuple):
    """The measured losses of one part of one layer."""
    units: int
    """Number of units of the dense part."""
    unit_params: int
    """Parameters that are removed with one unit."""
    losses: Mapping[int, float]
    """For each number of kept units: the loss. The entry for all units may be omitted, because its loss is 0."""
    step: int
    """Difference of two neighbouring levels: each level keeps `units` minus a multiple of this step."""
    fixed: int = 0
    """Parameters that are added as soon as one unit is removed."""

    def saved(self, kept: int) -> int:
        """Number of parameters that are removed if the part keeps `kept` units."""
        return (self.units - kept) * self.unit_params - (self.fixed if kept < self.units else 0)


class _Level(NamedTuple):
    saved: int
    """The parameters that the level removes, in steps of the knapsack."""
    loss: float
    kept: int


def by_budget(search: Search, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
              attention_price: Positive = 4.0, rare_price: Positive = 2.0) -> Selection:
    """Select the number of units that every part keeps at a ratio. `candidates` of the selection has an entry for each
    part, with `layer`, `part`, `kept`, `of`.

    ratio: share of all parameters to remove, 0 to 1.
    attention_price: factor of the losses of attentions. 1 uses the measured losses, and a high factor keeps all
        attentions.
    rare_price: factor of the losses of the embedding, if the search has measured them. 1 uses the losses on calibration
        text; rare rows lose more on text of other kinds, so a higher factor keeps the rows of more tokens.
    k_max: not used.
    module_params: not used; the method has no stand-ins.
    Raises BlockError for a ratio that cannot be reached with these ladders.
    """
    check(by_budget, locals())
    names, ladders = _ladders(search)
    price = {"attention": attention_price, "mlp": 1.0, PART: rare_price}
    ladders = [one._replace(losses={kept: price[part] * loss for kept, loss in one.losses.items()})
               for (_, part), one in zip(names, ladders, strict=True)]
    counts = _counts(ladders, ratio, facts.params_total)
    removed = sum(one.saved(count) for one, count in zip(ladders, counts, strict=True))
    chosen = [{"layer": layer, "part": part, "kept": count, "of": one.units}
              | ({name: search.stats["sizes"][part][name] for name in ("rank", "trained")} if one.fixed else {})
              for (layer, part), count, one in zip(names, counts, ladders, strict=True)]
    return no_layer(search, facts, ratio=ratio, k_max=k_max, module_params=module_params)._replace(
        criterion=search.criterion, candidates=chosen, ratio_planned=removed / facts.params_total,
        ratio_largest=_largest(ladders) / facts.params_total)


def _ladders(search: Search) -> tuple[list[tuple[int, str]], list[Ladder]]:
    """The names of the parts, (layer, part), and their ladders, in the order of the search."""
    losses: dict[tuple[int, str], dict[int, float]] = defaultdict(dict)
    for key, loss in search.single.items():
        layer, part, kept = key.split(".")
        losses[int(layer), part][int(kept)] = loss
    found = []
    for (_, part), own in losses.items():
        sizes = search.stats["sizes"][part]
        found.append(Ladder(sizes["units"], sizes["unit_params"], own, max(1, sizes["units"] // STEPS),
                            sizes.get("fixed", 0)))
    return list(losses), found


def _largest(ladders: list[Ladder]) -> int:
    """Number of parameters that are removed if every part is at the smallest level of its ladder."""
    return sum(one.saved(min(one.losses, default=one.units)) for one in ladders)


def _counts(ladders: list[Ladder], ratio: float, total: int) -> list[int]:
    """Number of units that each part keeps. Single MLP channels are added or removed to correct the rounding of the
    knapsack."""
    goal = ratio * total
    counts = allocate(ladders, round(goal), max(1, round(goal / GRAINS)))
    if counts is None:
        raise BlockError(f"ratio {ratio} is too high: all that kdp_narrow can remove is "
                         f"{_largest(ladders) / total:.4f} of all parameters; ask for less")
    channel = min(one.unit_params for one in ladders if not one.fixed)
    over = sum(one.saved(count) for one, count in zip(ladders, counts, strict=True)) - goal
    while abs(over) > channel / 2:
        # a channel is added to the MLP with the smallest kept share, or removed from the MLP with the largest
        within = [n for n, one in enumerate(ladders) if one.unit_params == channel and not one.fixed
                  and 1 < counts[n] < one.units]
        # if every MLP is whole or removed, the first or the last channel of an MLP is added or removed
        within = within or [n for n, one in enumerate(ladders) if one.unit_params == channel and not one.fixed and (
            counts[n] < one.units if over > 0 else counts[n] > 0)]
        if not within:
            break  # only heads were removed, so there is no channel to add again
        chosen = (min if over > 0 else max)(within, key=lambda n: (counts[n] / ladders[n].units, n))
        counts[chosen] += 1 if over > 0 else -1
        over -= channel if over > 0 else -channel
    return counts


def allocate(ladders: list[Ladder], goal: int, grain: int) -> list[int] | None:
    """Number of units that each part keeps, so that at least `goal` parameters are removed, apart from rounding.
    Returns None if the ladders do not reach the goal.

    grain: number of parameters in one step of the knapsack; sizes are rounded to steps.
    """
    levels, budget = [_levels(ladder, grain) for ladder in ladders], round(goal / grain)
    if sum(own[-1].saved for own in levels) < budget:
        return None
    chosen = knapsack([np.array([level.loss for level in own]) for own in levels],
                      [np.array([level.saved for level in own]) for own in levels], budget)
    return [own[number].kept for own, number in zip(levels, chosen, strict=True)]


def _levels(ladder: Ladder, grain: int) -> list[_Level]:
    """All levels of a ladder, from the dense part down to the smallest measured level."""
    points = sorted({**ladder.losses, ladder.units: 0.0}.items(), reverse=True)
    rising, highest = [], 0.0
    for kept, loss in points:
        highest = max(highest, loss)
        rising.append((kept, highest))
    kept = [ladder.units, *(count for count in range(ladder.units, rising[-1][0] - 1, -ladder.step)
                            if ladder.saved(count) > 0)]
    return [_Level(round(ladder.saved(count) / grain), _between(rising, count), count) for count in kept]


def _between(points: list[tuple[int, float]], kept: int) -> float:
    """The loss with `kept` units, interpolated between the two neighbouring `points`. Each point is a number of kept
    units and its loss; the points are in descending order of units."""
    for (more, low), (fewer, high) in pairwise(points):
        if fewer <= kept <= more:
            return low + (high - low) * (more - kept) / (more - fewer)
    return points[0][1]
