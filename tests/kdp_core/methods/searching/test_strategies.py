"""The searches: beside the enumeration of all sets, on made-up costs and on a pico model, under exact budgets."""
import itertools
from typing import get_args

import pytest

from kdp_core.methods._search.evaluator import DENSE, Spent
from kdp_core.methods._search.strategies import Strategy, search, smallest_budget
from kdp_core.methods.sleb import greedy
from kdp_core.model import checkpoints
from tests import pico
from tests.kdp_core.methods.searching.whole import IDS_ST, LAYERS, TOKENS, evaluator, space

EVERY = get_args(Strategy)
DRAWING = ("random", "annealing", "evolution", "tpe")
TIRELESS = ("random", "evolution")
"""The other searches that draw may propose known sets only, and then end before the budget does."""


@pytest.fixture(scope="module")
def model():
    return pico.lively(pico.model("llama", layers=LAYERS))


def enumerated(judged, size, layers=LAYERS):
    return {frozenset(some): judged.value(frozenset(some))
            for some in itertools.combinations(range(1, layers - 1), size)}


def best_of_all(goal, model, size, layers):
    values = enumerated(evaluator(model, goal), size, layers)
    return min(values, key=lambda removed: (values[removed], sorted(removed)))


@pytest.mark.parametrize("strategy", ["random", "evolution", "annealing", "swaps", "beam"])
def test_a_search_finds_the_best_of_all_sets_of_a_small_model(strategy):
    """20 sets; annealing, the beam of 2 and the swaps find the best one here too, though nothing promises it."""
    model = pico.lively(pico.model("llama", layers=8))
    judged = evaluator(model, size=3)
    search(strategy, judged, space(3, layers=8))
    assert judged.best == best_of_all("kl", model, 3, 8)
    if strategy in TIRELESS:
        assert judged.sets == 20 and judged.spent < judged.budget, "it ends when all sets are known"


@pytest.mark.parametrize("goal", ["loss", "margin", "accuracy", "last_state"])
def test_the_best_of_all_sets_is_found_under_every_objective(model, goal):
    judged = evaluator(model, goal)
    search("random", judged, space())
    assert judged.best == best_of_all(goal, model, 2, LAYERS)


def test_greedy_is_the_order_of_sleb(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    order = greedy(tmp_path / "model", None, TOKENS._replace(ids_ST=IDS_ST), checkpoints.facts(
        model, source="pico", sha256=""), k_max=2, sequences=5, largest=0.5).order
    for size in (1, 2, 3):
        judged = evaluator(model, "loss", size)
        search("greedy", judged, space(size))
        assert judged.best == frozenset(order[:size])


def test_one_shot_takes_the_least_harmful_single_layers(model):
    judged = evaluator(model)
    search("one_shot", judged, space())
    single = enumerated(evaluator(model, size=1), 1)
    assert judged.best == frozenset().union(*sorted(single, key=single.get)[:2])
    assert set(judged.values) == {DENSE, *single, judged.best}


class MadeUp:
    """An evaluator of costs made up; each evaluation costs one pass."""

    def __init__(self, cost, size, budget):
        self.costs, self.size, self.budget, self.layers = cost, size, budget, 1
        self.spent, self.values, self.best, self.curve = 1, {DENSE: cost(DENSE)}, None, []

    @property
    def sets(self):
        return sum(len(removed) == self.size for removed in self.values)

    def value(self, removed, reserve=0):
        if removed in self.values:
            return self.values[removed]
        if self.spent + 1 + reserve > self.budget:
            raise Spent
        self.spent += 1
        self.values[removed] = self.costs(removed)
        if len(removed) == self.size and (self.best is None or (self.values[removed], sorted(removed)) < (
                self.values[self.best], sorted(self.best))):
            self.best = removed
            self.curve.append(self.values[removed])
        return self.values[removed]


def together(first, second):
    """Layers that are harmless alone and harmful together, which misleads the order of single removals."""
    def cost(removed):
        return sum(0.1 * layer for layer in removed) + 10 * ({first, second} <= removed)
    return cost


def test_swaps_and_greedy_repair_what_one_shot_cannot_see():
    found = {}
    for strategy in ("one_shot", "greedy", "swaps", "beam"):
        judged = MadeUp(together(1, 2), 3, 10_000)
        search(strategy, judged, space(3, layers=12))
        found[strategy] = sorted(judged.best)
    assert found == {"one_shot": [1, 2, 3], "greedy": [1, 3, 4], "swaps": [1, 3, 4], "beam": [1, 3, 4]}


def hidden_pair(removed):
    """The best pair has the worst but one single removals of its kind: greedy misses it, a wide beam does not."""
    return {frozenset([1]): 1.0, frozenset([2]): 1.1, frozenset([3]): 1.2, frozenset([2, 3]): 0.5}.get(
        removed, 3.0 + len(removed))


def test_a_beam_keeps_partial_sets_that_greedy_gives_up():
    found = {}
    for strategy in ("greedy", "beam"):
        judged = MadeUp(hidden_pair, 2, 10_000)
        search(strategy, judged, space(2, layers=8))
        found[strategy] = judged.values[judged.best]
    assert found == {"greedy": 5.0, "beam": 0.5}


@pytest.mark.parametrize("strategy", EVERY)
@pytest.mark.parametrize("budget", [0, 1, 7, 40])
def test_budgets_are_kept_exactly(model, strategy, budget):
    """A set of the wanted size always comes out, and a tireless search stops only when the next step may not fit."""
    budget += smallest_budget(LAYERS, list(range(1, LAYERS - 1)))
    judged = evaluator(model, size=2, budget=budget)
    search(strategy, judged, space())
    assert judged.spent <= budget and len(judged.best) == 2
    if strategy in TIRELESS and judged.sets < 6:
        assert judged.spent > budget - LAYERS


@pytest.mark.parametrize("strategy", EVERY)
def test_a_search_ends_no_worse_than_it_starts(strategy):
    costs = {frozenset(some): (7 * sum(layer ** 2 for layer in some)) % 101 + 0.1 * len(some)
             for size in range(5) for some in itertools.combinations(range(1, 11), size)}
    for seed in range(3):
        judged = MadeUp(costs.get, 4, 120)
        search(strategy, judged, space(4, seed, layers=12))
        assert judged.values[judged.best] == judged.curve[-1] <= judged.curve[0]
        assert judged.curve == sorted(judged.curve, reverse=True) and judged.spent <= 120


@pytest.mark.parametrize("strategy", EVERY)
def test_same_seed_same_evaluations(strategy):
    costs = {frozenset(some): (7 * sum(layer ** 2 for layer in some)) % 101
             for size in range(5) for some in itertools.combinations(range(1, 11), size)}
    ran = []
    for seed in (0, 0, 1):
        judged = MadeUp(costs.get, 4, 90)
        search(strategy, judged, space(4, seed, layers=12))
        ran.append(list(judged.values))
    assert ran[0] == ran[1]
    assert (ran[0] != ran[2]) == (strategy in DRAWING), "the others draw nothing"


def test_evolution_changes_a_few_layers_of_the_best_set():
    costs = {frozenset(some): sum(some) for some in itertools.combinations(range(1, 11), 4)} | {DENSE: 0.0}
    judged = MadeUp(costs.get, 4, 60)
    search("evolution", judged, space(4, layers=12))
    order = [removed for removed in judged.values if removed != DENSE]
    for place in range(4, len(order)):
        # offspring 4: the parent is the best of the sets before this generation
        nearest = min(len(order[place] - other) for other in order[:place])
        assert 1 <= nearest <= 3


def test_tpe_beats_random_where_one_layer_decides():
    """Every set with layer 10 is bad; among the first sets a third has it, and of the later ones few."""
    judged = MadeUp(lambda removed: 10.0 * (10 in removed) + 0.01 * sum(removed), 4, 60)
    search("tpe", judged, space(4, layers=12))
    order = [10 in removed for removed in judged.values if removed != DENSE]
    assert sum(order[:12]) / 12 > sum(order[-12:]) / 12


def test_annealing_accepts_harm_less_and_less():
    judged = MadeUp({frozenset(some): sum(some) for some in itertools.combinations(range(1, 11), 4)}.get, 4, 200)
    judged.values[DENSE] = 0.0
    search("annealing", judged, space(4, layers=12))
    order = [removed for removed in judged.values if removed != DENSE]
    assert all(any(len(one - other) == 1 for other in order[:place]) for place, one in enumerate(order) if place)
    assert judged.values[judged.best] == 1 + 2 + 3 + 4
