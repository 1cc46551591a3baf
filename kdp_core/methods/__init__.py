"""The pruning methods. Every file of this folder without a leading underscore in its name defines one or more methods.

This module contains no list of methods. It imports the files and packages of its folder and collects their `METHODS` in
one dictionary, sorted by group and then by file name. To add a method, add a file; see
`kdp_core.methods._method.Method`.
"""
import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdp_core.base.options import meant
from kdp_core.base.records import Block, Composed, ModelFacts, Plan, Selection, Similarity, Tokens
from kdp_core.methods._method import (
    GRID_ARGUMENTS,
    GROUPS,
    Method,
    MethodError,
    arguments,
    one_device,
    option_schema,
    parts,
    settings,
)
from kdp_core.states.hidden import HiddenStates

__all__ = ["GRID_ARGUMENTS", "GROUPS", "METHODS", "Keep", "Method", "MethodError", "arguments", "check_options", "find",
           "fit_step", "made", "method_of", "method_schema", "one_device", "option_schema", "parts", "plan", "run",
           "settings", "whole"]


def find() -> dict[str, Method]:
    """The methods of this package by name. Raises MethodError if two methods have the same name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    records: list[Method] = []
    for module in (importlib.import_module(f"{__name__}.{name}") for name in names):
        if not hasattr(module, "METHODS"):
            raise MethodError(f"{module.__name__} has no METHODS; end it with its records, or let its name begin with "
                              "an underscore")
        records += module.METHODS
    groups = list(GROUPS)
    found: dict[str, Method] = {}
    # the sort is stable: within a group, methods are sorted by file name and keep the order of their file
    for method in sorted(records, key=lambda method: groups.index(method.group)):
        if method.name in found:
            raise MethodError(f"two methods are called {method.name!r}; rename one of them")
        found[method.name] = method
    return found


METHODS: dict[str, Method] = find()


def method_of(name: str) -> Method:
    """A method by its name. Raises MethodError for an unknown name; the error lists the known names."""
    if name not in METHODS:
        raise MethodError(f"method {name!r} is unknown; choose one of {', '.join(METHODS)}"
                          f"{meant(name, METHODS)}")
    return METHODS[name]


def check_options(name: str, given: dict[str, dict[str, Any]]) -> None:
    """Raise MethodError for a part or an option that the method does not have."""
    known = parts(method_of(name))
    if unknown := sorted(set(given) - set(known)):
        raise MethodError(f"method {name} has no part {unknown[0]!r}; it has {', '.join(known)}")
    for part, own in given.items():
        settings(known[part], own)


def method_schema(name: str) -> dict[str, Any]:
    """JSON schema of a method's block in the configuration, with one key for each part. The key `block` contains the
    options of the selection."""
    method = method_of(name)
    made = {key: option_schema(part) for key, part in parts(method).items()}
    made["block"]["properties"]["sized_as"] = {
        "type": "string", "description": "Count the stand-ins of this variant when choosing how many blocks are "
                                         "removed, so that both variants replace the same blocks."}
    return {"type": "object", "additionalProperties": False, "x-size": list(method.size_options),
            "x-steps": list(method.steps), "x-group": GROUPS[method.group], "x-own": method.own,
            "x-one-device": one_device(method), "x-similar": dict(method.similar), "properties": made}


def fit_step(name: str, step: str, hidden: HiddenStates, block: Block, before: list[Any], **own: Any) -> Any:
    """Run one step of a method on one block, and return the record of the step. `before` contains the records of the
    earlier steps on this block."""
    fit = method_of(name).steps[step]
    return fit(hidden, before[-1] if before else block, **own)


def plan(name: str, selection: Selection, fitted: dict[Block, list[Any]]) -> Plan:
    """The plan of a method, from the selected blocks and from the records of all steps of each block."""
    method = method_of(name)
    drop = [(layer, "whole") for start, stop in selection.blocks for layer in range(start, stop)]
    modules = [method.module(*fitted[block]) for block in selection.blocks] if method.module else []
    return Plan(name, drop, modules, {})


def whole(name: str, selection: Selection, composed: Composed) -> Plan:
    """The plan of a method whose `compose` fits a whole grid point in one call."""
    blocks = [(layer, "whole") for start, stop in selection.blocks for layer in range(start, stop)]
    # if a fit chooses its layers itself, or keeps some layers of a block, its plan names the removed layers
    return composed.plan._replace(method=name, drop=composed.plan.drop or blocks)


Keep = Callable[[str, Callable[[], Any]], Any]
"""A function that receives the name of a record and a call that makes the record, and that returns the record."""


def made(name: str, make: Callable[[], Any]) -> Any:
    """Make a record without storing it."""
    return make()


def run(name: str, dense: Path, hidden: HiddenStates, tokens: Tokens, similarity: Similarity | None, facts: ModelFacts,
        *, ratio: float, k_max: int, options: dict[str, dict[str, Any]], keep: Keep = made, **filled: Any) -> Plan:
    """Run a whole method: search, select, fit every block, plan. A search may read the similarity if it is given.

    keep: function with two arguments: the name of a record (`search`, `plan`, `composed` or `start-stop-step`), and a
        function that makes the record. `keep` may read the record from disk instead of making the record.
    filled: values of the arguments that GRID_ARGUMENTS names, such as `device`. A part receives a value only if its
        function has an argument of this name.
    """
    method = method_of(name)
    check_options(name, options)

    def own(part: str) -> dict[str, Any]:
        known = arguments(parts(method)[part], filled=())
        return {key: value for key, value in filled.items() if key in known} | options.get(part, {})

    filled["similarity"] = similarity
    base = keep("search", lambda: method.search(dense, hidden, tokens, facts, k_max=k_max,
                                                **own("search"))) if method.search else similarity
    selection = keep("plan", lambda: method.select(base, facts, ratio=ratio, k_max=k_max, **own("block"),
                                                   module_params=method.module_params(facts, options)))
    if method.compose:
        return whole(name, selection, keep("composed", lambda: method.compose(dense, hidden, tokens, selection,
                                                                              **own("compose"))))
    fitted: dict[Block, list[Any]] = {}
    for block in selection.blocks:
        fitted[block] = []
        for step in method.steps:
            fitted[block].append(keep(f"{block[0]}-{block[1]}-{step}", lambda block=block, step=step: fit_step(
                name, step, hidden, block, fitted[block], **own(step))))
    return plan(name, selection, fitted)
