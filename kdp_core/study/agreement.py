"""How far searches for layers agree, and how much the removal of the chosen layers costs on held-out text.

This module reads the records of several runs of `layer_search`, and removes from the dense model the layers that each
search chose. Held-out text is cut into windows. The next-token loss is measured on each window. Each window is also a
multiple-choice item: the models choose among four ends for the beginning of the window. The sets of removed layers are
measured in the order of their layers. In this order, neighbouring sets share the states of all layers below their first
difference (kdp_core.methods._search.evaluator). The module kdp_core.study.objectives compares the searches and defines
the paper's claims.
"""
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.measurements import Agreement
from kdp_core.base.options import Count
from kdp_core.methods._search.evaluator import Evaluator, Layers
from kdp_core.methods._search.objectives import items_of_text, objective_of
from kdp_core.model import checkpoints
from kdp_core.model.passes import Passes
from kdp_core.study import objectives

CHOICES = 4
"""Number of ends among which the model chooses."""
AT_ONCE = 16
"""Number of windows whose states are in memory at the same time."""
UNLIMITED = 10 ** 9
KEPT = ("objective", "strategy", "draw", "removed", "single", "value", "dense_value", "passes",
        "passes_without_trails", "evaluations", "budget", "tokens", "seconds", "best_so_far")
"""Fields of a search's record that the result contains."""


class AgreementError(ValueError):
    """These searches cannot be compared."""


def measure(dense: str | Path, searches: Mapping[str, Mapping[str, Any]], ids_ST: Tensor, *, device: str = "cpu",
            dtype: str = "float32", windows: Annotated[int, Ge(CHOICES)] = 64,
            batch_sequences: Count = 8) -> Agreement:
    """Compare the searches. Measure the dense model without the layers that each search chose.

    searches: the record of each variant's search. ids_ST: windows of held-out text.
    windows: number of windows that are read, evenly spaced over the text.
    batch_sequences: number of sequences in a forward pass.
    Raises AgreementError if there are fewer than two searches, or if the text is too short.
    """
    options.check(measure, locals())
    began = time.perf_counter()
    if len(searches) < 2:
        raise AgreementError("one search agrees with none; name at least two variants under agreement.variants")
    if len(ids_ST) < windows:
        raise AgreementError(f"agreement.heldout.windows is {windows}, but the held-out text has {len(ids_ST)} windows "
                             f"of {ids_ST.shape[1]} tokens; lower it or give a longer text")
    places = torch.linspace(0, len(ids_ST) - 1, windows).long()
    passes = Passes(checkpoints.load_model(dense, device=device, dtype=dtype), ids_ST.shape[1])
    chosen = {name: frozenset(one["removed"]) for name, one in searches.items()}
    found = heldout(passes, list(chosen.values()), ids_ST[places], batch_sequences)
    dense_nats, dense_accuracy = found[frozenset()]
    rows = [{"variant": name, **{key: one[key] for key in KEPT}, "heldout_nats": found[chosen[name]][0],
             "heldout_ppl_ratio": math.exp(found[chosen[name]][0] - dense_nats),
             "heldout_accuracy": found[chosen[name]][1]} for name, one in searches.items()]
    return Agreement(rows, objectives.pairs(rows).to_dict("records"), objectives.claims(rows).to_dict("records"),
                     {"windows": windows, "tokens": windows * ids_ST.shape[1], "choices": CHOICES,
                      "dense_nats": dense_nats, "dense_accuracy": dense_accuracy,
                      "accuracy_stderr": math.sqrt(dense_accuracy * (1 - dense_accuracy) / windows),
                      "layers": len(passes.layers), "seconds": time.perf_counter() - began})


def heldout(passes: Passes, chosen: Sequence[Layers], ids_ST: Tensor,
            batch_sequences: int) -> dict[Layers, tuple[float, float]]:
    """For the dense model and each set of removed layers: next-token loss in nats, and accuracy of the choice of ends.
    """
    every = sorted({frozenset(), *chosen}, key=sorted)
    sums = {removed: torch.zeros(2, dtype=torch.float64) for removed in every}
    for ids_CT in ids_ST.tensor_split(math.ceil(len(ids_ST) / AT_ONCE)):
        for place, goal in enumerate(("loss", "accuracy")):
            made = objective_of(goal, ids_CT, items_of_text(ids_CT, CHOICES) if goal == "accuracy" else None)
            one = Evaluator(passes, made, size=0, budget=UNLIMITED, batch_sequences=batch_sequences, trails=1)
            for removed in every:
                sums[removed][place] += len(ids_CT) * one.value(removed)
    # the objective `accuracy` is minimised, so its value is the negative share of right answers
    return {removed: (total[0].item() / len(ids_ST), -total[1].item() / len(ids_ST)) for removed, total in sums.items()}
