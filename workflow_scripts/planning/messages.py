"""ConfigError and its messages. Each message names the place in the configuration, the value, and the remedy."""
import difflib
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jsonschema


RENAMED = {"rows": "variants"}
"""Keys of earlier configurations and their present names."""


class ConfigError(ValueError):
    """A configuration that cannot be run; the message is one sentence with the value and the remedy."""


def refuse(rules: dict[str, Any], value: Any, place: list[str]) -> None:
    """Raise ConfigError if a part of the configuration breaks its JSON schema.

    `place` is the list of keys that lead to this part of the configuration.
    """
    # imported here, because jobs read the grid in environments that may lack jsonschema
    import jsonschema

    errors = list(jsonschema.Draft202012Validator(rules).iter_errors(value))
    if errors:
        raise ConfigError(_sentence(min(errors, key=lambda error: (len(error.path), str(error.path))), place))


def require(place: str, names: Iterable[Any], known: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError for the first unknown name. The message suggests the most similar known name, or the remedy."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            hint = f"did you mean {near[0]!r}?" if near else remedy
            raise ConfigError(f"config: {place} names {name!r}, which is not defined; {hint}")


def _sentence(error: "jsonschema.ValidationError", above: list[str]) -> str:
    place = ".".join(map(str, [*above, *error.path])) or "the top level"
    if error.validator == "additionalProperties":
        return _unknown_key(error, place)
    if error.validator == "required":
        missing = next(key for key in error.validator_value if key not in error.instance)
        return f"config: {place} lacks {missing!r}; {error.schema['properties'][missing].get('description', 'add it')}"
    words = error.schema.get("description", "").removesuffix(".")
    return f"config: {place} is {error.instance!r}, but {_demand(error)}" + (f": {words}" if words else "")


def _unknown_key(error: "jsonschema.ValidationError", place: str) -> str:
    known = list(error.schema.get("properties", {}))
    patterns = error.schema.get("patternProperties", {})
    unknown = next(key for key in error.instance
                   if key not in known and not any(re.search(pattern, str(key)) for pattern in patterns))
    near = [RENAMED[unknown]] if RENAMED.get(unknown) in known else difflib.get_close_matches(str(unknown), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}" if known else (
        "names consist of letters, digits, '_', '.' and '-'")
    return f"config: unknown key {unknown!r} at {place}; {hint}"


def _demand(error: "jsonschema.ValidationError") -> str:
    """The rule that a value breaks, as a text for the user."""
    limit = error.validator_value
    if error.validator == "anyOf":
        return " or ".join(dict.fromkeys(map(_demand, error.context)))
    return {"type": f"must be of type {limit}", "enum": f"must be one of {limit}",
            "minimum": f"must be at least {limit}", "maximum": f"must be at most {limit}",
            "exclusiveMinimum": f"must be above {limit}", "exclusiveMaximum": f"must be below {limit}",
            "multipleOf": f"must be a multiple of {limit}", "pattern": f"must match {limit}",
            "minItems": "must not be empty", "minProperties": "must not be empty",
            "uniqueItems": "must not contain a value twice"}.get(error.validator, error.message)
