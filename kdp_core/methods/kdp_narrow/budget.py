"""How much each part of each layer loses: the least sum of measured losses with a given number of parameters removed.

Losses are taken as additive, as ZipLM (Kurtic et al. 2023) and others do. So the choice is a knapsack over the parts,
each with a ladder of levels, and dynamic programming solves it exactly on a grid of parameters. Between two measured
levels of an MLP the loss is interpolated linearly. A loss that falls with fewer units is noise of the measurement and
counts as the one before it.
"""
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple


class Ladder(NamedTuple):
    """The measured losses of one part of one layer."""
    units: int
    """Units of the dense part."""
    unit_params: int
    """Parameters that leave with one unit."""
    losses: Mapping[int, float]
    """Units kept -> loss; the dense part has none and need not be named."""
    step: int
    """Kept units are the dense number less multiples of this."""


class _Level(NamedTuple):
    cost: int
    loss: float
    kept: int


def allocate(ladders: list[Ladder], goal: int, grain: int) -> list[int] | None:
    """Units that each part keeps, so that at least about `goal` parameters leave; None if that is out of reach.

    grain: parameters that count as one in the knapsack; sizes are rounded to it.
    """
    most = round(goal / grain)
    infinite = float("inf")
    best, chosen = [0.0] + [infinite] * most, []
    for ladder in ladders:
        after, taken = [infinite] * (most + 1), [0] * (most + 1)
        levels = _levels(ladder, grain)
        for number, level in enumerate(levels):
            for before in range(most + 1):
                # what exceeds the goal counts as the goal
                at, loss = min(before + level.cost, most), best[before] + level.loss
                if loss < after[at]:
                    after[at], taken[at] = loss, number * (most + 1) + before
        chosen.append((levels, taken))
        best = after
    return _traced(chosen, most) if best[most] < infinite else None


def _traced(chosen: list[tuple[list[_Level], list[int]]], most: int) -> list[int]:
    kept, at = [], most
    for levels, taken in reversed(chosen):
        number, at = divmod(taken[at], most + 1)
        kept.append(levels[number].kept)
    return kept[::-1]


def _levels(ladder: Ladder, grain: int) -> list[_Level]:
    """All levels of a ladder, from the dense part down to the smallest measured one."""
    points = sorted({**ladder.losses, ladder.units: 0.0}.items(), reverse=True)
    rising, highest = [], 0.0
    for kept, loss in points:
        highest = max(highest, loss)
        rising.append((kept, highest))
    return [_Level(round((ladder.units - kept) * ladder.unit_params / grain), _between(rising, kept), kept)
            for kept in range(ladder.units, rising[-1][0] - 1, -ladder.step)]


def _between(points: list[tuple[int, float]], kept: int) -> float:
    """The loss at a number of kept units, linear between its neighbours; `points` descend."""
    for (more, low), (fewer, high) in pairwise(points):
        if fewer <= kept <= more:
            return low + (high - low) * (more - kept) / (more - fewer)
    return points[0][1]
