"""The page on the configuration, made from its JSON schema and from config.yaml."""
import json
from typing import Any

import yaml
from planning import schema

HEAD = """# Configuration

`config.yaml` is the configuration of the demo. A file of your own overrides it key by key:
`snakemake --configfile mine.yaml`. A key that is not on this page is refused before any job starts, and so is a value
outside the range given here. The column *config.yaml* shows what the demo sets. The options of the methods stand on
[the page of each method](../methods.md).

This page is made from the schema of the configuration, which is made from the signatures of the library.
"""


def page() -> str:
    """The whole page, as Markdown."""
    made = schema.schema()
    given = yaml.safe_load((schema.ROOT / "config.yaml").read_text(encoding="utf-8"))
    required = made["required"]
    # on a phone, tables after this mark are shown as lists (site.css)
    parts = [HEAD, '<div class="options in-config"></div>\n']
    for name, entry in made["properties"].items():
        needed = "" if name in required else " It may be left out."
        parts.append(f"## {name}\n\n{escaped(entry.get('description', ''))}{needed}\n")
        parts.append(section(entry, given.get(name)))
    parts.append("## Fine-tuned variants\n\nA variant of the section `methods` that has the key `finetune` is the "
                 f"fine-tuned form of another. {escaped(made['finetune']['description'])}\n")
    parts.append(table(made["finetune"]["properties"], {}, made["finetune"].get("required", [])))
    return "\n".join(parts)


def section(entry: dict[str, Any], given: Any) -> str:
    """The keys of a section; if the user chooses the names in a section, the keys of one entry."""
    if patterns := entry.get("patternProperties"):
        inner = next(iter(patterns.values()))
        if "properties" not in inner:
            return ""
        example = next(iter(given.values())) if isinstance(given, dict) and given else {}
        return f"Each entry has a name of your own and these keys:\n\n{table(inner['properties'], example, inner)}"
    if "properties" not in entry:
        return f"Value: {kind(entry)}.{shown(given)}\n"
    return table(entry["properties"], given if isinstance(given, dict) else {}, entry)


def shown(given: Any) -> str:
    """What config.yaml sets, as a sentence; empty if config.yaml sets nothing."""
    return "" if given is None else f" `config.yaml` sets {value(given)}."


def table(properties: dict[str, Any], given: dict[str, Any], entry: Any, above: str = "") -> str:
    """One line for each key; the keys of a block inside a section follow the block, under their full names."""
    required = entry.get("required", []) if isinstance(entry, dict) else entry
    lines = [] if above else ["| key | value | meaning | config.yaml |", "|---|---|---|---|"]
    for name, one in properties.items():
        known, own = f"{above}{name}", given.get(name) if isinstance(given, dict) else None
        star = " (required)" if name in required else ""
        nested = one.get("properties")
        cell = "" if nested or own is None else value(own)
        lines.append(f"| `{known}`{star} | {'block' if nested else kind(one)} | {escaped(one.get('description', ''))} "
                     f"| {cell} |")
        if nested:
            lines += table(nested, own or {}, one, f"{known}.").splitlines()
    return "\n".join(lines) + "\n"


def kind(entry: dict[str, Any]) -> str:
    """Type and range of a value, in words."""
    if "anyOf" in entry:
        return ", or ".join(kind(one) for one in entry["anyOf"])
    if "enum" in entry:
        return " ".join(f"`{one}`" for one in entry["enum"])
    found = entry.get("type", "any")
    if isinstance(found, list):
        return ", or ".join(WORDS.get(one, one) for one in found)
    if found == "array":
        return f"list of: {kind(entry.get('items', {}))}"
    if "patternProperties" in entry:
        return f"names, each with {kind(next(iter(entry['patternProperties'].values())))}"
    limits = [f"{words} {entry[key]:g}" for key, words in LIMITS.items() if key in entry]
    return WORDS.get(found, found) + (f", {' and '.join(limits)}" if limits else "")


WORDS = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false",
         "null": "nothing", "object": "block", "any": "any value"}
LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def value(given: Any) -> str:
    """A value as YAML writes it on one line."""
    return "`" + json.dumps(given, ensure_ascii=False).replace("|", "\\|") + "`"


def escaped(words: str) -> str:
    """Words for a cell of a table: a vertical bar would end the cell, and angle brackets would be HTML."""
    return words.replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")
