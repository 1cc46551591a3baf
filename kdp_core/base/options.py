"""Options of a function: its keyword-only parameters, their JSON schema, and the check of their values.

Only the signature says which values an option may have. `Literal` lists the allowed values. `Annotated` states the
range in the terms of the library annotated-types. The docstring describes the meaning of the option:
    def fit(hidden, *, loss: Literal["chain", "local"] = "chain", epochs: Annotated[int, Ge(0)] = 2): ...
From the signature, `schema` makes the schema of the configuration, and `check` makes messages about wrong values.
"""
import difflib
import inspect
import operator
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt, MultipleOf

Count = Annotated[int, Ge(1)]
"""A whole number of at least 1."""
Natural = Annotated[int, Ge(0)]
"""A whole number of at least 0."""
Positive = Annotated[float, Gt(0)]
"""A number above 0."""
NotNegative = Annotated[float, Ge(0)]
"""A number of at least 0."""
Share = Annotated[float, Gt(0), Lt(1)]
"""A share between 0 and 1, both excluded."""
Chance = Annotated[float, Ge(0), Le(1)]
"""A share from 0 to 1, both included."""
Edge = Annotated[float, Ge(0), Lt(0.5)]
"""A share of the layers at each end, at least 0 and below one half."""

JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
LIMITS: Mapping[type, tuple[str, str, str]] = {
    Ge: ("ge", "minimum", "at least"), Gt: ("gt", "exclusiveMinimum", "above"),
    Le: ("le", "maximum", "at most"), Lt: ("lt", "exclusiveMaximum", "below"),
    MultipleOf: ("multiple_of", "multipleOf", "that is a multiple of")}
"""For each kind of limit: the attribute with the bound, the keyword in JSON schema, and the words in a message."""
MET: Mapping[type, Callable[[Any, Any], bool]] = {
    Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt,
    MultipleOf: lambda value, bound: value % bound == 0}
"""For each kind of limit: the function that tells whether a value is within a bound."""


UNIONS = (types.UnionType, typing.Union)
"""The results of typing.get_origin for a union `A | B`: first for plain types, then for annotated types."""


class OptionError(ValueError):
    """The function has no option of this name, or the option does not accept this value."""


def arguments(function: Callable[..., Any], filled: tuple[str, ...] = ()) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function in the order of its signature, except the parameters in `filled`."""
    return {name: parameter for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in filled}


def settings(function: Callable[..., Any], given: Mapping[str, Any], filled: tuple[str, ...] = ()) -> dict[str, Any]:
    """All options of a function with their values: the values in `given`, otherwise the defaults. An unknown name in
    `given` raises OptionError."""
    known = arguments(function, filled)
    if unknown := sorted(set(given) - set(known)):
        raise OptionError(f"option {unknown[0]!r} is unknown to {function.__module__}.{function.__name__}; "
                          f"it knows {', '.join(known)}{meant(unknown[0], known)}")
    return {name: given.get(name, parameter.default) for name, parameter in known.items()}


def meant(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: "did you mean" and the most similar known name; empty if none is
    similar."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Raise OptionError for the first option of a function that does not accept its value in `values`.

    A function calls `check` as its first statement, with its own `locals()`. Entries of `values` whose name is not an
    option are ignored.
    """
    hints = _hints(function)
    for name in arguments(function):
        if name in values and (demand := unmet(hints[name], values[name])):
            raise OptionError(f"{name} is {values[name]!r}; {demand}")


def unmet(hint: Any, value: Any) -> str:
    """What an annotation requires of a value, in words; empty if the value meets the annotation."""
    if typing.get_origin(hint) is Annotated:
        kind, *limits = typing.get_args(hint)
        return unmet(kind, value) or next(filter(None, (_beyond(limit, value) for limit in limits)), "")
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        return "" if value in known else f"choose one of {', '.join(map(str, known))}"
    if typing.get_origin(hint) is list:
        kind, = typing.get_args(hint)
        return next(filter(None, (unmet(kind, entry) for entry in value)), "") if isinstance(value, list) \
            else "give a list"
    if typing.get_origin(hint) in UNIONS:
        demands = [unmet(part, value) for part in typing.get_args(hint)]
        return "" if "" in demands else demands[0]
    if hint is type(None):
        return "" if value is None else "give null"
    return ""


def _beyond(limit: Any, value: Any) -> str:
    attribute, _, words = LIMITS[type(limit)]
    bound = getattr(limit, attribute)
    met = isinstance(value, int | float) and MET[type(limit)](value, bound)
    return "" if met else f"give a number {words} {bound}"


def schema(function: Callable[..., Any], filled: tuple[str, ...] = ()) -> dict[str, Any]:
    """JSON schema of a function's options: types and ranges come from annotations, descriptions from the docstring.

    Unknown keys are refused. `filled` names the options that a configuration cannot set.
    """
    hints, words = _hints(function), described(function)
    return {"type": "object", "additionalProperties": False, "x-module": function.__module__,
            "properties": {name: {**json_type(hints[name]), "description": words[name]}
                           for name in arguments(function, filled)}}


def json_type(hint: Any) -> dict[str, Any]:
    """JSON schema of an annotation."""
    if typing.get_origin(hint) is Annotated:
        kind, *limits = typing.get_args(hint)
        return json_type(kind) | {LIMITS[type(limit)][1]: getattr(limit, LIMITS[type(limit)][0]) for limit in limits}
    if typing.get_origin(hint) is Literal:
        known = typing.get_args(hint)
        return {"type": JSON_TYPES[type(known[0])], "enum": list(known)}
    if typing.get_origin(hint) in UNIONS:
        return {"anyOf": [json_type(part) for part in typing.get_args(hint)]}
    if typing.get_origin(hint) is list:
        return {"type": "array", "items": json_type(typing.get_args(hint)[0])}
    return {"type": JSON_TYPES[hint]}


def described(function: Callable[..., Any]) -> dict[str, str]:
    """The `name: description` entries of a docstring. Continuation lines are joined to the description."""
    found: dict[str, str] = {}
    current, names = "", set(inspect.signature(function).parameters)
    for line in inspect.getdoc(function).splitlines():
        head, colon, rest = line.partition(": ")
        if colon and head in names:
            current, found[head] = head, rest.strip()
        elif current and line.startswith("    "):
            found[current] += " " + line.strip()
    return found


@cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)
