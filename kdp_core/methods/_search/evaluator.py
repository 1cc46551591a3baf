"""The objective of a model without a set of layers. Only the first changed layer and the layers after it are run.

A search judges many sets that differ in a few layers. If sets A and B contain the same layers below layer j, the states
before layer j are the same. The evaluator stores the states of the last few sets. The states of one set before every
layer are called a trail. For each trail, the first layer is found at which the new set and the set of the trail differ.
The new set continues the trail for which this layer is deepest:
    j = max over trails B of min(A xor B),    cost = number of layers of 0 .. L-1 that are kept and are not below j.
A run that continues a trail and a run through all layers give the same bits, because the same layers run on the same
states in the same batches.

The cost is counted in layer passes. One layer pass runs one layer over all sequences of the objective. The output head
and stand-ins are not counted. A value is computed once and remembered; a remembered value costs nothing. If an
evaluation would exceed the budget, it is not started, and Spent is raised.
"""
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdp_core.methods._judge import RankError
from kdp_core.methods._search.objectives import Objective
from kdp_core.model.passes import Passes
from kdp_core.states.hidden import boundary_states

Layers = frozenset[int]
"""A set of removed layers."""
DENSE: Layers = frozenset()
TRAILS = 4
"""Number of sets whose states are stored, in addition to the states of the dense model."""


class Spent(Exception):
    """The next evaluation does not fit in the budget."""


class Evaluator:
    """Computes the objective for sets of removed layers, counts the layer passes, and stores the best set of the wanted
    size."""

    def __init__(self, passes: Passes, objective: Objective, *, size: int, budget: int, batch_sequences: int,
                 stand_ins: Mapping[int, nn.Module] | None = None, trails: int = TRAILS) -> None:
        self.passes, self.objective, self.size, self.budget = passes, objective, size, budget
        self.layers, self.batch, self.stand_ins = len(passes.layers), batch_sequences, stand_ins or {}
        self.spent = self.without_trails = 0
        """`spent`: number of layer passes so far. `without_trails`: number of layer passes that the same sets would
        have needed if no states were stored."""
        self.values: dict[Layers, float] = {}
        self.best: Layers | None = None
        """The best set of `size` layers so far. If two sets have equal values, the lexicographically smaller set is the
        best."""
        self.curve: list[dict[str, Any]] = []
        """One entry for each set that was the best set when it was judged: the layer passes and evaluations until then,
        the value of the set, and its removed layers."""
        self._trails: OrderedDict[Layers, list[Tensor]] = OrderedDict()
        self._most = trails
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """Compute the value and the states of the dense model. These states stay stored."""
        self.start_STD = torch.cat([boundary_states(self.passes.model, ids_BT, [0])[0]
                                    for ids_BT in self.objective.ids_ST.split(self.batch)])
        """h_STD before layer 0."""
        self._dense = self._run(DENSE, [self.start_STD])
        self.spent = self.without_trails = self.layers
        self.values[DENSE] = self._score(DENSE, self._dense[-1])

    @property
    def sets(self) -> int:
        """How many sets of the wanted size have been judged."""
        return sum(len(removed) == self.size for removed in self.values)

    def cost(self, removed: Layers) -> int:
        """Number of layer passes that the value of a set would cost now; 0 if the value is known."""
        return 0 if removed in self.values else self._left(removed, self._nearest(removed)[0])

    @torch.no_grad()
    def value(self, removed: Layers, reserve: int = 0) -> float:
        """The objective of the model without the layers `removed`. Raises Spent if fewer than `reserve` layer passes
        would remain."""
        if removed in self.values:
            return self.values[removed]
        first, trail = self._nearest(removed)
        cost = self._left(removed, first)
        if self.spent + cost + reserve > self.budget:
            raise Spent
        states = self._run(removed, trail[:first + 1])
        self.spent += cost
        self.without_trails += self.layers - len(removed)
        self._trails[removed] = states
        if len(self._trails) > self._most:
            self._trails.popitem(last=False)
        self.values[removed] = self._score(removed, states[-1])
        self._note(removed)
        return self.values[removed]

    def _nearest(self, removed: Layers) -> tuple[int, list[Tensor]]:
        """Find the stored set that is the same as `removed` for the largest number of first layers. Returns the first
        layer at which the two sets differ, and the states of the stored set. The stored set is marked as recently
        used."""
        first, nearest = min(removed, default=self.layers), DENSE
        for other in self._trails:
            # of equally near sets the later set is used, so that the result depends only on the order of evaluations
            if (differs := min(removed ^ other, default=self.layers)) >= first:
                first, nearest = differs, other
        if nearest in self._trails:
            self._trails.move_to_end(nearest)
        return first, self._trails.get(nearest, self._dense)

    def _left(self, removed: Layers, first: int) -> int:
        """Number of kept layers from layer `first` on."""
        return sum(layer not in removed for layer in range(first, self.layers))

    def _run(self, removed: Layers, states: list[Tensor]) -> list[Tensor]:
        """The states before every layer and the last state. `states` contains the already known states before the first
        layers."""
        states = list(states)
        for layer in range(len(states) - 1, self.layers):
            if layer not in removed:
                states.append(self.passes.run_batches(states[-1], [layer], self.batch))
            elif layer in self.stand_ins:
                states.append(self.passes.run_batches(states[-1], [self.stand_ins[layer]], self.batch))
            else:
                states.append(states[-1])
        return states

    def _score(self, removed: Layers, last_STD: Tensor) -> float:
        value = self.objective.score(self.passes, last_STD, self._dense[-1])
        if not math.isfinite(value):
            raise RankError(f"without layers {sorted(removed)} the {self.objective.name} is {value}; try dtype float32 "
                            "for the model")
        return value

    def _note(self, removed: Layers) -> None:
        """Store the set as the best set if it has the wanted size and is better than the best set so far."""
        if len(removed) != self.size:
            return
        if self.best is None or (self.values[removed], sorted(removed)) < (self.values[self.best], sorted(self.best)):
            self.best = removed
            self.curve.append({"passes": self.spent, "evaluations": len(self.values), "value": self.values[removed],
                               "removed": sorted(removed)})
