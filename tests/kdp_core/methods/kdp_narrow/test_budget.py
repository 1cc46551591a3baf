"""The knapsack against all combinations."""
import itertools

import pytest

from kdp_core.methods.kdp_narrow.budget import Ladder, allocate

HEADS = Ladder(3, 100, {2: 0.4, 1: 1.5}, 1)
MLPS = [Ladder(12, 10, {9: 0.2, 6: 0.5, 3: 2.0}, 3), Ladder(12, 10, {9: 0.05, 6: 0.6, 3: 0.7}, 3)]
LADDERS = [HEADS, *MLPS]


def cost(kept):
    return sum((ladder.units - count) * ladder.unit_params for ladder, count in zip(LADDERS, kept, strict=True))


def loss(kept):
    return sum({**ladder.losses, ladder.units: 0.0}[count] for ladder, count in zip(LADDERS, kept, strict=True))


@pytest.mark.parametrize("goal", [30, 60, 100, 150, 250, 320])
def test_no_other_choice_that_removes_as_much_loses_less(goal):
    every = itertools.product([3, 2, 1], [12, 9, 6, 3], [12, 9, 6, 3])
    best = min(loss(kept) for kept in every if cost(kept) >= goal)
    found = allocate(LADDERS, goal, 10)
    assert cost(found) >= goal and loss(found) == pytest.approx(best)


def test_between_two_rungs_the_loss_is_linear():
    ladder = Ladder(12, 10, {6: 0.6}, 1)
    other = Ladder(12, 10, {6: 0.3}, 1)
    # every unit of the second costs half as much, so all come from it until it is at its last rung
    assert allocate([ladder, other], 50, 10) == [12, 7]
    assert allocate([ladder, other], 80, 10) == [10, 6]


def test_a_loss_that_falls_with_fewer_units_counts_as_the_one_before():
    noisy, steady = Ladder(4, 10, {3: 0.5, 2: 0.1}, 1), Ladder(4, 10, {3: 0.2, 2: 0.4}, 1)
    assert allocate([noisy, steady], 20, 10) == [4, 2]


def test_what_the_rungs_cannot_reach_is_none():
    assert allocate(LADDERS, cost([1, 3, 3]), 10) == [1, 3, 3]
    assert allocate(LADDERS, cost([1, 3, 3]) + 10, 10) is None
