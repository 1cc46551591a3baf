"""Searches for the set of layers that is best by a calibration objective. These layers are removed, or replaced by
stand-ins.

"Rethinking Layer Redundancy in Large Language Models" (arXiv 2604.24938) finds that the objective determines which
layers appear redundant. According to the paper, different searches with the same objective agree. We could read only
the abstract of this paper. The paper compares two objectives and seven searches, but the abstract does not name them.
This method offers the five objectives and eight searches of kdp_core.methods._search, all with the same budget.
docs/objectives.md reports our measurements.

A stand-in may replace each removed layer, both when a set is judged and in the pruned model. All stand-ins are fitted
in closed form on the dense model's states without massive tokens, which bypass the stand-in.
    affine     h_l+1 ~ W h_l + b; for a single layer, this stand-in equals `linear` of KDP's Table 3
    residual   the stand-in of kdp_residual: a skip path, a linear part and 96 neurons of the removed layer
kdp_residual itself has only a greedy search under one objective. It fits its stand-ins again on the pruned prefix, and
trains them.

The ratio determines the number of layers. The result contains the value of every single removal that was judged. For
each number of layer passes, the result also contains the value of the best set found up to then.
"""
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

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
from kdp_core.methods.kdp_residual.closed_form import fit_alone
from kdp_core.methods.kdp_residual.compose import module_params as residual_params
from kdp_core.methods.kdp_residual.dictionaries import closed_form_options
from kdp_core.model import checkpoints
from kdp_core.model.families import first_token
from kdp_core.model.passes import Passes, built
from kdp_core.states.block import check_heldout, load, relative_error
from kdp_core.states.hidden import HiddenStates

logger = logging.getLogger(__name__)
Choices = Annotated[int, Ge(2)]
"""Number of choices of an item."""
StandIn = Literal["none", "affine", "residual"]
RIDGE, HELDOUT = 1e-4, 0.1
"""Two defaults of `linear`: the ridge of the stand-ins, as a multiple of the mean diagonal of the Gram matrix, and the
share of sequences on which the stand-ins are judged."""
ENTRIES = 96
"""Number of neurons of a stand-in of kdp_residual, the default of kdp_residual."""


def compose(dense: Path, hidden: HiddenStates, tokens: Tokens, selection: Selection, *, device: str = "cpu",
            dtype: str = "float32", objective: Goal = "kl", strategy: Strategy = "greedy", budget: Count = 3000,
            sequences: Count = 16, positions: Count | None = 16, draw: Natural = 0, items: str | None = None,
            choices: Choices = 4, keep_first: Natural = 1, keep_last: Natural = 1, width: Count = 3,
            offspring: Count = 8, batch_sequences: Count = 8, stand_in: StandIn = "none",
            seed: Natural = 0) -> Composed:
    """Search for the `selection.layers` layers whose removal raises the objective least.

    objective: `loss`, `kl` (divergence from the dense model), `margin` or `accuracy` (on calibration items), or
        `last_state`.
    strategy: `random`, `one_shot`, `greedy`, `swaps`, `beam`, `annealing`, `evolution` or `tpe`.
    budget: number of layer passes that the search may run. A layer pass is one layer over all sequences. The head is
        not counted.
    sequences: number of sequences, or of items, on which a set is judged.
    positions: number of tokens of each sequence whose outputs are compared, evenly spaced; null means all except the
        last token. The output head of a small model costs as much as several layers. The option does not apply to
        items.
    draw: number of a random sample, from 0. Two samples with different numbers have no sequence or item in common.
    items: path of a file with calibration items as JSON lines (context, choices, answer). With null, items are made
        from the calibration sequences.
    choices: number of choices of an item that is made from calibration sequences.
    keep_first: number of layers at the start of the model that cannot be removed.
    keep_last: number of layers at the end of the model that cannot be removed.
    width: number of partial sets that `beam` keeps.
    offspring: number of mutants in one generation of `evolution`.
    batch_sequences: number of sequences in one forward pass.
    stand_in: what replaces a removed layer, in the search and in the pruned model. `none` removes the layer without a
        replacement. `affine` (an affine map) and `residual` (the stand-in of kdp_residual) are fitted in closed form
        before the search.
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
    if stand_in != "none":
        # known before any weight or state is read
        check_heldout(hidden, HELDOUT)
        for layer in eligible:
            hidden.index(layer)
            hidden.index(layer + 1)
    model = checkpoints.load_model(dense, device=device, dtype=dtype)
    modules, fits = _fitted(model, hidden, eligible, stand_in, seed)
    passes = Passes(model, goal.ids_ST.shape[1])
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


def _fitted(model: nn.Module, hidden: HiddenStates, eligible: list[int], kind: StandIn,
            seed: int) -> tuple[dict[int, Module], dict[int, dict[str, Any]]]:
    """A stand-in for each layer that may be removed, and the error of each stand-in on held-out sequences.

    Without stand-ins, both mappings are empty.
    """
    modules, fits = {}, {}
    for layer in eligible if kind != "none" else []:
        block = layer, layer + 1
        states = load(hidden, block, massive="bypass", heldout=HELDOUT, seed=seed)
        x_ND, y_ND = states.tokens(states.heldout)
        if kind == "affine":
            fitted = regress(*states.tokens(states.train), RIDGE, residual=True, token_weight="inverse_norm")
            modules[layer] = affine(block, fitted, states.bypass_above)
        else:
            given = closed_form_options(model, hidden, dictionary="neurons", entries=ENTRIES, seed=seed)
            modules[layer] = fit_alone(model, hidden, block, states.train, given)
        with torch.no_grad():
            error = relative_error(built(modules[layer])(x_ND), y_ND)
        fits[layer] = {"block": block, "params": sum(one.numel() for one in modules[layer].tensors.values()),
                       "heldout_error": error}
        logger.info("stand-in of layer %d of %d: held-out error %.4f", layer, eligible[-1], error)
    return modules, fits


def as_many_replaced(similarity: Similarity, facts: ModelFacts, *, ratio: Share, k_max: Count, module_params: int,
                     match: Match = "nearest") -> Selection:
    """Select how many layers are removed, but not which layers. If there are stand-ins, each removed layer has its own
    stand-in.

    ratio: share of all parameters to remove, 0 to 1.
    k_max: not read.
    module_params: number of parameters of the stand-in that replaces a layer.
    match: with `nearest` the removed share is nearest to the ratio, with `reach` at least the ratio.
    """
    smaller = facts._replace(params_per_layer=[size - module_params for size in facts.params_per_layer])
    return as_many(similarity, smaller, ratio=ratio, k_max=k_max, module_params=0, match=match)


def module_params(facts: ModelFacts, options: Mapping[str, Mapping[str, Any]]) -> int:
    """Number of parameters of one layer's stand-in."""
    kind = options.get("compose", {}).get("stand_in", "none")
    if kind == "residual":
        return residual_params(facts, {"compose": {"dictionary": "neurons", "entries": ENTRIES}})
    return facts.width * (facts.width + 1) if kind == "affine" else 0


def _eligible(layers: int, keep_first: int, keep_last: int, size: int, budget: int) -> list[int]:
    """Layers that may be removed. Raises RankError if too few layers may be removed, or if the budget is too small."""
    found = list(range(keep_first, layers - keep_last))
    if size > len(found):
        raise RankError(f"{size} of {layers} layers must be removed, but compose.keep_first {keep_first} and keep_last "
                        f"{keep_last} allow only {max(0, len(found))}; lower these options or the ratio")
    if budget < (least := smallest_budget(layers, found)):
        raise RankError(f"compose.budget is {budget} layer passes, and judging every single removal takes {least}; "
                        "raise the budget")
    return found


def _items(dense: Path, ids_ST: Tensor, path: str | None, choices: int, count: int, draw: int) -> Items:
    if path is None:
        return items_of_text(ids_ST, choices)
    # a file that cannot be used is refused before the tokenizer is loaded
    entries_of(path, count, draw)
    return items_of_file(path, checkpoints.load_tokenizer(dense), first_token(checkpoints.config_of(dense)), count,
                         draw)


def _told(evaluator: Evaluator) -> dict[str, Any]:
    """The results and the costs of a search, as entries of the method's statistics."""
    values = evaluator.values
    return {"removed": sorted(evaluator.best), "value": values[evaluator.best], "dense_value": values[DENSE],
            "single": {str(layer): value - values[DENSE] for removed, value in values.items() if len(removed) == 1
                       for layer in removed},
            "budget": evaluator.budget, "passes": evaluator.spent, "passes_without_trails": evaluator.without_trails,
            "evaluations": len(values), "best_so_far": evaluator.curve}


def flops(sizes: Sizes, given: Mapping[str, Any]) -> float:
    """Number of floating-point operations: the layer passes of the whole budget, and one pass of the head for each
    evaluation."""
    # an evaluation runs about half of the layers
    evaluations = given["budget"] / (sizes.layers / 2)
    predicted = min(given["positions"] or sizes.length, sizes.length)
    return 2 * given["sequences"] * (sizes.length * given["budget"] * sizes.layer_macs
                                     + predicted * evaluations * sizes.head_macs)
