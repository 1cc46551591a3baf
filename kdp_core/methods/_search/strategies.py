"""Strategies that search for the set of `size` layers whose removal raises an objective least. All strategies have the
same budget.

    random      sets that are drawn uniformly at random; no set is judged twice
    one_shot    the layers whose single removals are least harmful
    greedy      removes one layer after another, each time the least harmful remaining layer (SLEB, Song et al. 2024)
    swaps       starts from the one-shot set and makes the first exchange of two layers that helps, until no exchange
                helps
    beam        as greedy, but continues with the best few partial sets
    annealing   starts from a random set and exchanges layers; a harmful exchange is accepted with probability
                exp(-rise / temperature)
    evolution   (1 + lambda), elitist: mutants of the best set by one to three exchanges (EvoPress, Sieberling et al.
                2024). EvoPress judges its mutants on growing shares of the text; here each mutant is judged on all text
    tpe         optuna's tree-structured Parzen estimator over one number for each layer; the layers with the lowest
                numbers are removed

"Rethinking Layer Redundancy" (arXiv 2604.24938) compares seven searches and does not name them in its abstract, so we
chose the list above. Every strategy ends if the budget is spent or if all sets of the size have been judged. A strategy
that draws its proposals ends earlier if REPEATS proposals in a row are already known sets. The result is the
evaluator's best set. If two sets have equal values, the lexicographically smaller set is the best.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from kdp_core.methods._search.evaluator import DENSE, Evaluator, Layers, Spent

Strategy = Literal["random", "one_shot", "greedy", "swaps", "beam", "annealing", "evolution", "tpe"]
REPEATS = 100
"""A search ends after this number of consecutive proposals that were all judged before."""
HOT, COLD = 0.1, 0.001
"""Temperature of annealing at the start and at the end. The unit is the difference between the objective of the first
set and the objective of the dense model."""
MOST_EXCHANGES = 3
"""Largest number of exchanges in one mutation. The number of exchanges is the smaller of two random numbers from 1 to
MOST_EXCHANGES, as in EvoPress."""


class Space(NamedTuple):
    """The layers that a search may remove, and the settings of the search."""
    eligible: list[int]
    """Layers that may be removed, ascending."""
    size: int
    """Layers to remove."""
    seed: int
    width: int
    """Number of partial sets that the beam search keeps."""
    offspring: int
    """Number of mutants in one generation."""


def smallest_budget(layers: int, eligible: list[int]) -> int:
    """Largest number of layer passes that the one-shot search needs: for the dense model, for every single removal, and
    for one set."""
    return layers + sum(layers - layer - 1 for layer in eligible) + layers


def search(strategy: Strategy, evaluator: Evaluator, space: Space) -> None:
    """Run a search. Afterwards the evaluator contains the best set."""
    if strategy in PROPOSING:
        _follow(evaluator, space, PROPOSING[strategy](evaluator, space))
    else:
        FINISHING[strategy](evaluator, space)


def _follow(evaluator: Evaluator, space: Space, proposals: Iterable[Layers]) -> None:
    """Judge proposals until the budget is spent, until all sets are known, or until only known sets are proposed."""
    everything, repeated = math.comb(len(space.eligible), space.size), 0
    for removed in proposals:
        repeated = repeated + 1 if removed in evaluator.values else 0
        try:
            evaluator.value(removed)
        except Spent:
            return
        if repeated == REPEATS or evaluator.sets == everything:
            return


# Searches that come to an end -----------------------------------------------------------------------------------------

def singles(evaluator: Evaluator, space: Space) -> dict[int, float]:
    """For each layer, the objective of the model without this layer."""
    return {layer: evaluator.value(frozenset([layer]), reserve=evaluator.layers if space.size > 1 else 0)
            for layer in space.eligible}


def _filled(partial: Layers, values: dict[int, float], size: int) -> Layers:
    """The partial set, filled up to the wanted size with the least harmful other layers."""
    rest = sorted(set(values) - partial, key=lambda layer: (values[layer], layer))
    return partial | frozenset(rest[:size - len(partial)])


def _one_shot(evaluator: Evaluator, space: Space) -> Layers:
    found = _filled(DENSE, singles(evaluator, space), space.size)
    evaluator.value(found)
    return found


def _beam(evaluator: Evaluator, space: Space, width: int) -> None:
    alone, beams = singles(evaluator, space), [DENSE]
    try:
        for _ in range(space.size):
            found = {removed: evaluator.value(removed, reserve=0 if evaluator.best else evaluator.layers)
                     for removed in _extended(beams, space.eligible)}
            beams = sorted(found, key=lambda removed: (found[removed], sorted(removed)))[:width]
    except Spent:
        # the budget does not reach the last layer, so the order of single removals fills the set
        evaluator.value(_filled(beams[0], alone, space.size))


def _extended(beams: list[Layers], eligible: list[int]) -> list[Layers]:
    """Every partial set with one more layer; no set occurs twice. Neighbouring sets of the list have many first layers
    in common."""
    return list(dict.fromkeys(removed | {layer} for removed in beams for layer in eligible if layer not in removed))


def _swaps(evaluator: Evaluator, space: Space) -> None:
    current, alone = _one_shot(evaluator, space), singles(evaluator, space)
    try:
        while (better := _helping(evaluator, space, current, alone)) is not None:
            current = better
    except Spent:
        pass


def _helping(evaluator: Evaluator, space: Space, current: Layers, alone: dict[int, float]) -> Layers | None:
    """The set after the first exchange that lowers the objective; None if no exchange lowers the objective. An exchange
    puts one removed layer back and removes one kept layer. The most harmful removed layer and the least harmful kept
    layer are tried first."""
    for back in sorted(current, key=lambda layer: (-alone[layer], layer)):
        for out in sorted(set(space.eligible) - current, key=lambda layer: (alone[layer], layer)):
            exchanged = current - {back} | {out}
            if evaluator.value(exchanged) < evaluator.values[current]:
                return exchanged
    return None


# Searches that continue as long as the budget -------------------------------------------------------------------------

def _random(evaluator: Evaluator, space: Space) -> Iterator[Layers]:
    draw = np.random.default_rng(space.seed)
    while True:
        yield _drawn(draw, space)


def _drawn(draw: np.random.Generator, space: Space) -> Layers:
    return frozenset(draw.choice(space.eligible, space.size, replace=False).tolist())


def _exchanged(draw: np.random.Generator, space: Space, removed: Layers, count: int) -> Layers:
    """A set in which `count` removed layers are put back and `count` other layers are removed. If there are too few
    layers, fewer layers are exchanged."""
    rest = sorted(set(space.eligible) - removed)
    count = min(count, len(rest), space.size)
    back, out = (draw.choice(some, count, replace=False).tolist() for some in (sorted(removed), rest))
    return removed - frozenset(back) | frozenset(out)


def _annealing(evaluator: Evaluator, space: Space) -> Iterator[Layers]:
    draw = np.random.default_rng(space.seed)
    current = _drawn(draw, space)
    yield current
    values = evaluator.values
    scale = abs(values[current] - values[DENSE]) or 1.0
    while True:
        proposed = _exchanged(draw, space, current, 1)
        yield proposed
        # T falls from HOT to COLD by a constant factor for each layer pass
        temperature = scale * HOT * (COLD / HOT) ** (evaluator.spent / evaluator.budget)
        rise = values[proposed] - values[current]
        if rise <= 0 or draw.random() < math.exp(-rise / temperature):
            current = proposed


def _evolution(evaluator: Evaluator, space: Space) -> Iterator[Layers]:
    draw = np.random.default_rng(space.seed)
    for _ in range(space.offspring):
        yield _drawn(draw, space)
    while True:
        parent = evaluator.best
        for _ in range(space.offspring):
            yield _exchanged(draw, space, parent, int(draw.integers(1, MOST_EXCHANGES + 1, 2).min()))


def _tpe(evaluator: Evaluator, space: Space) -> Iterator[Layers]:
    # optuna takes a second to import
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=space.seed))
    keys = {f"layer {layer}": optuna.distributions.FloatDistribution(0.0, 1.0) for layer in space.eligible}
    draw = np.random.default_rng(space.seed)
    while True:
        trial = study.ask(keys)
        key = {layer: trial.params[f"layer {layer}"] for layer in space.eligible}
        known = _lowest(key, space) in evaluator.values
        yield _lowest(key, space)
        study.tell(trial, evaluator.values[_lowest(key, space)])
        if known and space.size < len(key):
            # the estimator soon proposes only a few sets again and again; an exchange of two keys gives a new set
            removed = _lowest(key, space)
            back, out = (int(draw.choice(sorted(some))) for some in (removed, set(key) - removed))
            key[back], key[out] = key[out], key[back]
            yield _lowest(key, space)
            study.add_trial(optuna.trial.create_trial(
                params={f"layer {layer}": one for layer, one in key.items()}, distributions=keys,
                value=evaluator.values[_lowest(key, space)]))


def _lowest(key: dict[int, float], space: Space) -> Layers:
    """The set of the `space.size` layers with the lowest values in `key`."""
    return frozenset(sorted(key, key=lambda layer: (key[layer], layer))[:space.size])


FINISHING: dict[str, Callable[[Evaluator, Space], object]] = {
    "one_shot": _one_shot,
    "greedy": lambda evaluator, space: _beam(evaluator, space, 1),
    "swaps": _swaps,
    "beam": lambda evaluator, space: _beam(evaluator, space, space.width),
}
PROPOSING: dict[str, Callable[[Evaluator, Space], Iterator[Layers]]] = {
    "random": _random, "annealing": _annealing, "evolution": _evolution, "tpe": _tpe,
}
