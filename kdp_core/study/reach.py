"""Which grid points cannot be made, whatever the data are: a check of the configuration and of the facts of the model.

Selection. A method selects layers by a similarity or by a search, and this check knows the results of neither.
Therefore the method selects from an invented similarity or search instead. With the invented similarity, the selected
blocks are neighbours. The invented search orders as many layers as the options of the method allow. If a selection from
the invented data is refused, every real selection would be refused with the same message.

Other parts. Searches, steps and `compose` check their options, the model and the calibration set before they read a
weight or a state. So the search of a method, and its `compose` or its first step, are run until they read a weight or
a state. `checkpoints.rehearsal` stops a part at the first weight, and `Blank` stops a part at the first state. Errors
that depend on data are not found here, such as a Gram matrix without an inverse.
"""
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdp_core.base.records import ModelFacts, Search, Selection, Similarity, Tokens
from kdp_core.methods import Method, arguments, method_of, settings
from kdp_core.methods._select import in_order, no_layer
from kdp_core.model import checkpoints
from kdp_core.model.families import FAMILIES
from kdp_core.prune import finetune as tuning
from kdp_core.states.hidden import HiddenError, HiddenStates, numbers


class Case(NamedTuple):
    """The facts of a model and of a calibration set that are known before any data are read."""
    facts: ModelFacts
    dense: Path
    """A folder that contains the model's config.json."""
    sequences: int
    """Number of sequences of the calibration set."""
    length: int
    """Tokens of a sequence."""
    states: list[int] | None = None
    """Numbers of the states that will be stored; None means all."""
    treatment: str = "mask"
    """Treatment of massive tokens in the similarity."""


class Blank(HiddenStates):
    """Hidden states that have sizes but no values. Reading a state raises Unread."""

    def state(self, layer: int, which: Tensor | None = None) -> Tensor:
        """End the rehearsal by raising Unread. Raises HiddenError for a state that will not be stored."""
        self.index(layer)
        raise checkpoints.Unread

    def reader(self, layer: int) -> Callable[[Tensor], Tensor]:
        """End the rehearsal by raising Unread. Raises HiddenError for a state that will not be stored."""
        self.index(layer)
        raise checkpoints.Unread

    def massive(self, layers: list[int]) -> Tensor:
        """End the rehearsal by raising Unread. Raises HiddenError for a state that will not be stored."""
        return self.state(layers[0])

    def sublayers(self) -> Tensor:
        """End the rehearsal."""
        raise checkpoints.Unread


def refusal(name: str, case: Case, *, ratio: float, k_max: int, options: Mapping[str, Mapping[str, Any]],
            sized: str = "", sized_options: Mapping[str, Mapping[str, Any]] | None = None,
            finetune: Mapping[str, Any] | None = None) -> str:
    """The reason why a method cannot make a grid point; empty if no reason is known.

    options: options of the method, by part.
    sized, sized_options: the method whose stand-ins are counted, and its options; by default `name` and `options`.
    finetune: options of the fine-tuning; None if the point is not fine-tuned.
    """
    method, family, facts = method_of(name), FAMILIES.get(case.facts.family), case.facts
    if family is None:
        return ""
    if why := method.refuses(family):
        return f"method {name} cannot prune a {facts.family} model: {why}"
    counted = method_of(sized or name).module_params(facts, (sized_options or {}) if sized else options)
    found = []
    # all layers count as large as the largest, or as small as the smallest: no choice removes more, and none less
    for size in dict.fromkeys((max(facts.params_per_layer), min(facts.params_per_layer))):
        even = case._replace(facts=facts._replace(params_per_layer=[size] * facts.layers))
        found.append(_why(method, even, ratio, k_max, options, counted, finetune))
    return found[0] if all(found) else ""


def _why(method: Method, case: Case, ratio: float, k_max: int, options: Mapping[str, Mapping[str, Any]],
         counted: int, finetune: Mapping[str, Any] | None) -> str:
    try:
        hidden, tokens = _blank(case), _tokens(case)
        if method.search is not None:
            _rehearse(method.search, case.dense, hidden, tokens, case.facts, k_max=k_max, **options.get("search", {}))
        selection = _selection(method, case, ratio, k_max, options, counted)
        if method.compose is not None:
            _rehearse(method.compose, case.dense, hidden, tokens, selection, **options.get("compose", {}))
        # the states that a step reads depend on the blocks
        elif method.steps and case.states is None:
            first = next(iter(method.steps))
            _rehearse(method.steps[first], hidden, selection.blocks[0], **options.get(first, {}))
        if finetune is not None:
            tuned = settings(tuning.finetune, finetune)
            tuning.check_sizes(case.sequences, case.length, case.facts.width, tuned["rank"])
            tuning.check_zeros(method.group == "weights set to zero", tuned["targets"])
    except (ValueError, HiddenError) as error:
        return str(error)
    return ""


def _rehearse(part: Callable[..., Any], *records: Any, **own: Any) -> None:
    """Run a part of a method until it reads its first weight or state."""
    with checkpoints.rehearsal(), contextlib.suppress(checkpoints.Unread):
        part(*records, **own)


def _selection(method: Method, case: Case, ratio: float, k_max: int, options: Mapping[str, Mapping[str, Any]],
               counted: int) -> Selection:
    """The selection that the method makes from the invented similarity or search."""
    given = {key: value for key, value in options.get("block", {}).items() if key in arguments(method.select)}
    point = {"ratio": ratio, "k_max": k_max, "module_params": counted}
    if method.search is None:
        return method.select(_similarity(case), case.facts, **point, **given)
    if method.select is in_order:
        return in_order(_search(method, case.facts, k_max, options), case.facts, **point, **given)
    # what is removed inside the layers is known only after the search
    return no_layer(_similarity(case), case.facts, **point)


def _blank(case: Case) -> Blank:
    stored = numbers(case.states, case.facts.layers)
    return Blank(Path("hidden.zarr"), stored, torch.zeros(0, dtype=torch.bool), 8.0, case.sequences, case.length,
                 case.facts.width, {})


def _tokens(case: Case) -> Tokens:
    ids_ST = torch.arange(case.sequences * case.length).view(case.sequences, -1) % case.facts.vocabulary
    return Tokens(ids_ST, [""] * case.sequences, {})


def _similarity(case: Case) -> Similarity:
    """An invented similarity, in which all states are almost equal.

    The earlier the layers of two states are, the more similar the states are, so the selected blocks are neighbours.
    """
    stored = numbers(case.states, case.facts.layers)
    place_L = torch.tensor(stored, dtype=torch.float32)
    alike_LL = 1 - 1e-4 * torch.minimum(place_L[:, None], place_L)
    return Similarity(stored, alike_LL, 1 - alike_LL, 1 - alike_LL, alike_LL, alike_LL, alike_LL, case.treatment, 1, 0)


def _search(method: Method, facts: ModelFacts, k_max: int, options: Mapping[str, Mapping[str, Any]]) -> Search:
    """An invented search that orders as many layers as the options of the method allow."""
    given = settings(method.search, options.get("search", {})) if method.search else {}
    count = method.orders(facts, k_max, given) if method.orders else facts.layers
    return Search(list(range(count)), [0.0] * count, "", k_max, {}, 0, {})
