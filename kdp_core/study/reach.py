"""Which grid points cannot be made with any data: the check of the configuration and of the facts of the model.

A method selects by a similarity or a search that is not known yet. Its own selection is therefore run on the most
favourable one that can be: blocks that lie as close as possible, and a search that orders as many layers as its options
allow. If this selection is refused, every real one would be refused, with the same sentence. Errors that depend on
data, such as a Gram matrix without an inverse, are not found here.
"""
from collections.abc import Mapping
from typing import Any

import torch

from kdp_core.base.records import ModelFacts, Search, Similarity
from kdp_core.methods import arguments, method_of, parts, settings
from kdp_core.methods._select import in_order, no_layer
from kdp_core.model.families import FAMILIES


def refusal(name: str, facts: ModelFacts, sequences: int, *, ratio: float, k_max: int,
            options: Mapping[str, Mapping[str, Any]], sized: str = "",
            sized_options: Mapping[str, Mapping[str, Any]] | None = None, treatment: str = "mask") -> str:
    """Why a method cannot make a point; empty if no reason is known.

    sequences: of the calibration set.
    options: of the method, by part.
    sized: the method whose stand-ins are counted, with its options; the method itself unless given.
    treatment: how the similarity treats massive tokens.
    """
    method, family = method_of(name), FAMILIES.get(facts.family)
    if family is not None and (why := method.refuses(family)):
        return f"method {name} cannot prune a {facts.family} model: {why}"
    for part, function in parts(method).items():
        if why := _too_few(part, settings(function, options.get(part, {})), sequences):
            return why
    counted = method_of(sized or name).module_params(facts, sized_options if sized else options)
    # layers of one size, the largest: so no choice of layers removes more
    even = facts._replace(params_per_layer=[max(facts.params_per_layer)] * facts.layers)
    own = {key: value for key, value in options.get("block", {}).items() if key in arguments(method.select)}
    try:
        if method.search is None:
            method.select(_similarity(facts.layers, treatment), even, ratio=ratio, k_max=k_max, module_params=counted,
                          **own)
        elif method.select is in_order:
            in_order(_search(name, facts, k_max, options), even, ratio=ratio, k_max=k_max, module_params=counted, **own)
        else:
            # what lies inside the layers is known only after the search
            no_layer(_similarity(facts.layers, treatment), facts, ratio=ratio, k_max=k_max, module_params=counted)
    except ValueError as error:
        return str(error)
    return ""


def _too_few(part: str, given: Mapping[str, Any], sequences: int) -> str:
    """Why a part cannot divide its sequences into those that it fits on and those that it judges on."""
    judged, heldout = given.get("judge_sequences"), given.get("heldout")
    if judged is not None and judged >= sequences:
        return (f"{part}.judge_sequences {judged} of {sequences} sequences leaves none to fit on; lower it or add "
                "calibration sequences")
    if isinstance(heldout, float) and not 0 < round(heldout * sequences) < sequences:
        return (f"{part}.heldout {heldout} of {sequences} sequences leaves none on one side; change it or add "
                "calibration sequences")
    return ""


def _similarity(layers: int, treatment: str) -> Similarity:
    """States that are all similar, the earlier pairs a little more, so that blocks are chosen one behind the other."""
    place_L = torch.arange(layers + 1, dtype=torch.float32)
    alike_LL = 1 - 1e-4 * torch.minimum(place_L[:, None], place_L)
    return Similarity(list(range(layers + 1)), alike_LL, 1 - alike_LL, 1 - alike_LL, alike_LL, alike_LL, alike_LL,
                      treatment, 1, 0)


def _search(name: str, facts: ModelFacts, k_max: int, options: Mapping[str, Mapping[str, Any]]) -> Search:
    """A search that orders as many layers as its options allow."""
    method = method_of(name)
    given = settings(method.search, options.get("search", {}))
    count = method.orders(facts, k_max, given) if method.orders else facts.layers
    return Search(list(range(count)), [0.0] * count, "", k_max, {}, 0, {})
