"""The set of layers that a search finds best by a calibration objective; the layers are removed, or replaced.

"Rethinking Layer Redundancy in Large Language Models" (arXiv 2604.24938) finds that the objective decides which layers
appear redundant, and that searches under one objective agree. Only its abstract could be read. It compares two
objectives and seven searches, which it does not name there. This row has the grid of five objectives and eight searches
of kdp_core.methods._search, all under one budget; docs/objectives.md says what we measured.

With `stand_in: affine` every set is judged with a stand-in in the place of each removed layer, and the pruned model has
them too: h_l+1 ~ W h_l + b by ridge regression on the dense model's states, without massive tokens, which bypass it
(the `linear` of KDP's Table 3, a layer at a time). kdp_residual has a search of its own, with its own stand-ins.

The number of layers follows from the ratio. The result keeps the value of every single removal that was judged and the
curve of the best set against layer passes.
"""
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge
from torch import Tensor

from kdp_core.base import options
from kdp_core.base.options import Count, Natural, Share
from kdp_core.base.records import Composed, ModelFacts, Module, Plan, Selection, Similarity, Tokens
from kdp_core.methods._affine import regress
from kdp_core.methods._affine import stand_in as affine
from kdp_core.methods._judge import RankError
from kdp_core.methods._method import Sizes
from kdp_core.methods._search.evaluator import DENSE, Evaluator
from kdp_core.methods._search.objectives import (
    Goal,
    Items,
    drawn,
    entries_of,
    items_of_file,
    items_of_text,
    objective_of,
)
from kdp_core.methods._search.strategies import Space, Strategy, search, smallest_budget
from kdp_core.methods._select import Match, as_many
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.model.passes import Passes, built
from kdp_core.states.block import load, relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
Choices = Annotated[int, Ge(2)]
"""Choices of an item."""
StandIn = Literal["none", "affine"]
RIDGE, HELDOUT = 1e-4, 0.1
"""Ridge of the stand-ins, relative to the mean diagonal of the Gram matrix, and the share of sequences that judge them:
the defaults of `linear`."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", objective: Goal = "kl", strategy: Strategy = "greedy", budget: Count = 3000,
            sequences: Count = 16, positions: Count | None = 16, draw: Natural = 0, items: str | None = None,
            choices: Choices = 4, keep_first: Natural = 1, keep_last: Natural = 1, width: Count = 3,
            offspring: Count = 8, batch_sequences: Count = 8, stand_in: StandIn = "none",
            seed: Natural = 0) -> Composed:
    """Search for the `selection.layers` layers whose removal raises the objective least.

    objective: `loss`, `kl` (from the dense model), `margin` or `accuracy` (of calibration items), or `last_state`.
    strategy: `random`, `one_shot`, `greedy`, `swaps`, `beam`, `annealing`, `evolution` or `tpe`.
    budget: layer passes that the search may take, each one layer over all sequences; the head is not counted.
    sequences: sequences, or items, that a set is judged on.
    positions: tokens of each sequence whose outputs are compared, evenly spaced; null means all but the last one. The
        output head of a small model costs as much as several layers. Items are not thinned out.
    draw: which of the disjoint draws of so many sequences or items.
    items: JSON lines of calibration items (context, choices, answer); null makes items of the calibration sequences.
    choices: choices of an item that is made of calibration sequences.
    keep_first: layers at the start that are kept.
    keep_last: layers at the end that are kept.
    width: partial sets that `beam` keeps.
    offspring: mutants of one generation of `evolution`.
    batch_sequences: sequences of a forward pass.
    stand_in: what takes the place of a removed layer while sets are judged and in the pruned model: `none`, or an
        `affine` map for each layer, fitted in closed form before the search.
    seed: seed of `random`, `annealing`, `evolution` and `tpe`.
    Raises RankError for options that do not fit the model, the sequences or the items.
    """
    options.check(compose, locals())
    began = time.perf_counter()
    layers = checkpoints.config_of(dense).num_hidden_layers
    eligible = _eligible(layers, keep_first, keep_last, selection.layers, budget)
    ids_ST = drawn(tokens, sequences, draw)
    multiple = _items(dense, ids_ST, items, choices, sequences, draw) if objective in ("margin", "accuracy") else None
    goal = objective_of(objective, ids_ST, multiple, positions)
    modules, fits = _fitted(hidden, eligible, seed) if stand_in == "affine" else ({}, {})
    passes = Passes(checkpoints.load_model(dense, device=device, dtype=dtype), goal.ids_ST.shape[1])
    evaluator = Evaluator(passes, goal, size=selection.layers, budget=budget, batch_sequences=batch_sequences,
                          stand_ins={layer: built(one).to(passes.device) for layer, one in modules.items()})
    search(strategy, evaluator, Space(eligible, selection.layers, seed, width, offspring))
    logger.info("%s by %s: layers %s, %.4f after %d layer passes", objective, strategy, sorted(evaluator.best),
                evaluator.values[evaluator.best], evaluator.spent)
    removed = sorted(evaluator.best)
    replaced = [modules[layer] for layer in removed] if modules else []
    plan = Plan("layer_search", [(layer, "whole") for layer in removed], replaced, {})
    return Composed(plan, [], [fits[layer] for layer in removed] if fits else [], {
        **_told(evaluator), "objective": objective, "strategy": strategy, "stand_in": stand_in, "seed": seed,
        "draw": draw, "sequences": sequences, "positions": positions, "tokens": goal.ids_ST.numel(),
        "eligible": eligible, "seconds": time.perf_counter() - began})


def _fitted(hidden: HiddenStates, eligible: list[int],
            seed: int) -> tuple[dict[int, Module], dict[int, dict[str, Any]]]:
    """An affine stand-in for each layer that may be removed, and how far it errs on held-out sequences."""
    modules, fits = {}, {}
    for layer in eligible:
        states = load(hidden, (layer, layer + 1), massive="bypass", heldout=HELDOUT, seed=seed)
        fitted = regress(*states.tokens(states.train), RIDGE, residual=True, token_weight="inverse_norm")
        x_ND, y_ND = states.tokens(states.heldout).double()
        modules[layer] = affine((layer, layer + 1), fitted, states.bypass_above)
        fits[layer] = {"block": (layer, layer + 1), "params": fitted.w_DD.numel() + len(fitted.b_D),
                       "heldout_error": relative_error(x_ND @ fitted.w_DD.T + fitted.b_D, y_ND)}
    return modules, fits


def as_many_replaced(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
                     match: Match = "nearest") -> Selection:
    """Select no layers but only their number; each removed layer has a stand-in of its own, if there are stand-ins.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read.
    module_params: parameters put back for each layer.
    match: `nearest` share to the ratio, or `reach` it at least.
    """
    smaller = facts._replace(params_per_layer=[size - module_params for size in facts.params_per_layer])
    return as_many(similarity, smaller, ratio=ratio, k_max=k_max, module_params=0, match=match)


def module_params(facts: ModelFacts, options: Mapping[str, Mapping[str, Any]]) -> int:
    """Parameters of the stand-in of one layer."""
    replaced = options.get("compose", {}).get("stand_in", "none") == "affine"
    return facts.width * (facts.width + 1) if replaced else 0


def _eligible(layers: int, keep_first: int, keep_last: int, size: int, budget: int) -> list[int]:
    """Layers that may be removed. Raises RankError if they are too few, or if the budget is too small."""
    found = list(range(keep_first, layers - keep_last))
    if size > len(found):
        raise RankError(f"{size} of {layers} layers must go, but compose.keep_first {keep_first} and keep_last "
                        f"{keep_last} leave {max(0, len(found))} that may; lower them or the ratio")
    if budget < (least := smallest_budget(layers, found)):
        raise RankError(f"compose.budget is {budget} layer passes, and judging every single removal takes {least}; "
                        "raise it")
    return found


def _items(dense: Path, ids_ST: Tensor, path: str | None, choices: int, count: int, draw: int) -> Items:
    if path is None:
        return items_of_text(ids_ST, choices)
    # a file that cannot be used is refused before the tokenizer is loaded
    entries_of(path, count, draw)
    return items_of_file(path, checkpoints.load_tokenizer(dense), first_token(checkpoints.config_of(dense)), count,
                         draw)


def _told(evaluator: Evaluator) -> dict[str, Any]:
    """What a search says of itself."""
    values = evaluator.values
    return {"removed": sorted(evaluator.best), "value": values[evaluator.best], "dense_value": values[DENSE],
            "single": {str(layer): value - values[DENSE] for removed, value in values.items() if len(removed) == 1
                       for layer in removed},
            "budget": evaluator.budget, "passes": evaluator.spent, "passes_without_trails": evaluator.without_trails,
            "evaluations": len(values), "best_so_far": evaluator.curve}


def flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    """Floating-point operations: the layer passes of the budget, and a pass of the head for each evaluation."""
    # an evaluation runs about half of the layers
    evaluations = given["budget"] / (sizes.layers / 2)
    predicted = min(given["positions"] or sizes.length, sizes.length)
    return 2 * given["sequences"] * (sizes.length * given["budget"] * sizes.layer_macs
                                     + predicted * evaluations * sizes.head_macs)
