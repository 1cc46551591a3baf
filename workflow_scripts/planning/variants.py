"""Finds the method and the options of each variant. A variant is an entry under `methods:` in the configuration.

A variant may be based on another variant (`base`), whose options it inherits key by key. A variant and its base share
one search if both have the same options of `search`. A fine-tuned variant starts from the checkpoint of the variant on
which it is based.
"""
from typing import Any

from planning.messages import ConfigError
from planning.schema import schema


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with an empty variant for every named method that has no variant."""
    given = config["methods"]
    named = [*config["grid"]["methods"], *config.get("views", {}).get("variants", [])]
    named += [name for own in config.get("ablations", {}).values() for name in own["variants"]]
    named += [config["theory"]["method"]] if "theory" in config else []
    for variant in filter(None, given.values()):
        # the base of a fine-tuned variant must also be a variant; any other base may be a method
        named += [variant.get("base")] if "finetune" in variant else []
        named += [(variant.get("block") or {}).get("sized_as")]
    more = {name: {} for name in named if name in schema()["methods"] and name not in given}
    return config | {"methods": given | more}


def with_draws(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with a separate variant for every draw of `agreement.draws`.

    The variant of draw k of a variant `name` is `name-dk`. Its draw and its seed are those of `name` plus k.
    """
    own = config.get("agreement", {})
    if "draws" not in own:
        return config
    named = own.get("variants") or [name for name in config["grid"]["methods"] if searches(config, name)]
    made: dict[str, Any] = {}
    for name in named:
        known = options(config, name).get("compose", {})
        for draw in range(1, own["draws"]):
            if (new := f"{name}-d{draw}") in config["methods"]:
                raise ConfigError(f"config: agreement.draws makes a variant {new!r}, which already exists; rename the "
                                  "existing variant")
            made[new] = {"base": name, "compose": {key: known.get(key, 0) + draw for key in ("draw", "seed")}}
    every = [one for name in named for one in (name, *(f"{name}-d{draw}" for draw in range(1, own["draws"])))]
    left = {key: value for key, value in own.items() if key != "draws"}
    return config | {"methods": config["methods"] | made, "agreement": left | {"variants": every}}


def base_of(config: dict[str, Any], name: str) -> str:
    """The method of a variant, found by following `base` from variant to variant."""
    seen, variant = [name], name
    while "base" in (config["methods"].get(variant) or {}):
        variant = config["methods"][variant]["base"]
        if variant in seen:
            raise ConfigError(f"config: methods.{name} is based on itself ({' -> '.join([*seen, variant])}); change "
                              "its `base`")
        if variant not in config["methods"] and variant not in schema()["methods"]:
            raise ConfigError(f"config: methods.{seen[-1]}.base is {variant!r}, which is neither a variant nor a "
                              f"method; methods are {', '.join(schema()['methods'])}")
        seen.append(variant)
        if variant not in config["methods"]:
            break
    if variant not in schema()["methods"]:
        raise ConfigError(f"config: methods.{variant} is not a method; give it a `base` from "
                          f"{', '.join(schema()['methods'])}")
    return variant


def source_of(config: dict[str, Any], name: str) -> str:
    """The variant whose pruned checkpoint a variant uses.

    A fine-tuned variant uses the checkpoint of the first variant without `finetune` on the path along `base`. Any other
    variant uses its own checkpoint.
    """
    while "finetune" in (config["methods"].get(name) or {}):
        name = config["methods"][name]["base"]
    return name


def finetuned(config: dict[str, Any]) -> list[str]:
    """The fine-tuned variants of the configuration."""
    return [name for name in config["methods"] if source_of(config, name) != name]


def options(config: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """A variant's options by part (`block`, `search`, its steps, `compose`, `finetune`).

    The variant's own options override the options that it inherits through `base`.
    """
    variant = config["methods"].get(name) or {}
    below = options(config, variant["base"]) if "base" in variant else {}
    own = {part: given for part, given in variant.items() if part != "base"}
    return {part: below.get(part, {}) | own.get(part, {}) for part in [*below, *(p for p in own if p not in below)]}


def method_schema(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The part of the schema that describes the method of a variant."""
    return schema()["methods"][base_of(config, name)]


def steps(config: dict[str, Any], name: str) -> list[str]:
    """The steps that a variant fits for each block, in order."""
    return method_schema(config, name)["x-steps"]


def has(config: dict[str, Any], name: str, part: str) -> bool:
    """Whether a variant's method has a part: a step, `search` or `compose`."""
    return part in method_schema(config, name)["properties"]


def having(config: dict[str, Any], part: str) -> list[str]:
    """The variants of the configuration whose method has a part."""
    return [name for name in config["methods"] if has(config, name, part)]


def fits(config: dict[str, Any], name: str) -> list[str]:
    """The names of a variant's fits: only `compose` if the method has this part, otherwise the steps of the method."""
    return ["compose"] if has(config, name, "compose") else steps(config, name)


def search_of(config: dict[str, Any], name: str) -> str | None:
    """The variant under whose name the search of this variant is stored; None if the method has no search.

    The function follows `base` from variant to variant as long as the options of `search` stay the same, and returns
    the last variant of this path.
    """
    if not has(config, name, "search"):
        return None
    base = (config["methods"].get(name) or {}).get("base")
    mine = options(config, name).get("search", {})
    same = base in config["methods"] and options(config, base).get("search", {}) == mine
    return search_of(config, base) if same else name


def reads_similarity(config: dict[str, Any], name: str) -> bool:
    """Whether a variant's search reads the record of the similarity, which depends on its options."""
    similar, given = method_schema(config, name)["x-similar"], options(config, name).get("search", {})
    return bool(similar) and all(given.get(option) == value for option, value in similar.items())


def selection(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The method that selects a variant's blocks, and the options of the selection."""
    given = options(config, name).get("block", {})
    return {"method": base_of(config, name), "options": {key: one for key, one in given.items() if key != "sized_as"}}


def sized_as(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The method and the options whose stand-ins are counted when the blocks of a variant are selected."""
    variant = options(config, name).get("block", {}).get("sized_as", name)
    return {"method": base_of(config, variant), "options": size_options(config, variant)}


def size_options(config: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The options of a variant that decide how many parameters its stand-ins have."""
    sizing = method_schema(config, name)["x-size"]
    return {part: {option: value for option, value in given.items() if f"{part}.{option}" in sizing}
            for part, given in options(config, name).items() if part not in ("block", "search", "finetune")}


def learned(config: dict[str, Any]) -> list[str]:
    """The grid's variants that train a kernel and its inverse.

    Variants that train a kernel for 0 epochs are left out, because they have no training curves.
    """
    return [name for name in config["grid"]["methods"] if steps(config, name) == ["kernel", "inverse"]
            and options(config, name).get("kernel", {}).get("epochs") != 0 and source_of(config, name) == name]


def jointly(config: dict[str, Any]) -> list[str]:
    """The grid's variants whose stand-ins are trained together for at least one epoch."""
    trains = {name for name, method in schema()["methods"].items()
              if "kl_weight" in method["properties"].get("compose", {}).get("properties", {})}
    return [name for name in config["grid"]["methods"] if base_of(config, name) in trains
            and options(config, name).get("compose", {}).get("epochs") != 0 and source_of(config, name) == name]


def searches(config: dict[str, Any], name: str) -> bool:
    """Whether a variant searches for layers with the options `objective`, `strategy` and `draw`, as `agreement`
    requires."""
    known = method_schema(config, name)["properties"].get("compose", {}).get("properties", {})
    return {"objective", "strategy", "draw"} <= set(known)


def theory_kernel(config: dict[str, Any]) -> dict[str, Any]:
    """The options of step 1 for the section `theory`.

    The options come from the variant that `theory.method` names. The options in `theory.kernel` override these options.
    """
    theory = config.get("theory", {})
    return (options(config, theory["method"]).get("kernel", {}) if theory else {}) | theory.get("kernel", {})


def theory_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of the measurement of the theorems: the section `theory` without `method`, `kernel` and `run`."""
    return {key: value for key, value in config.get("theory", {}).items() if key not in ("method", "kernel", "run")}
