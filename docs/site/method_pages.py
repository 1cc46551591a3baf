"""One page for each method, made from its record, the head of its module, and the signatures of its parts."""
import inspect
import itertools
import sys
from pathlib import Path
from typing import Any

from config_page import escaped, kind

from kdp_core.base import options
from kdp_core.methods import GROUPS, METHODS, method_schema, parts
from kdp_core.model.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
PART = {"block": "which layers go", "search": "the order of the layers", "compose": "the fit of a whole model"}
"""What a part does; any other part is a step, the fit of one block."""


def menu() -> dict[str, dict[str, str]]:
    """What a method does to the model -> method -> the path of its page."""
    found = {group: {name: f"methods/{name}.md" for name, method in METHODS.items() if method.group == group}
             for group in GROUPS}
    return {group: pages for group, pages in found.items() if pages}


def pages() -> dict[str, str]:
    """The path of each page -> the page, as Markdown."""
    return {f"methods/{name}.md": page(name) for name in METHODS}


def module_of(name: str) -> Any:
    """The module that holds the record of a method; a package collects the records of its modules."""
    holders = [module for path, module in sys.modules.items() if path.startswith("kdp_core.methods.")
               and any(one is METHODS[name] for one in getattr(module, "METHODS", ()))]
    return max(holders, key=lambda module: len(module.__name__))


def page(name: str) -> str:
    """The page of a method."""
    method, module = METHODS[name], module_of(name)
    file = Path(inspect.getfile(module)).relative_to(ROOT).as_posix()
    refused = {family: why for family, record in FAMILIES.items() if (why := method.refuses(record))}
    works = " ".join(f"`{family}`" for family in FAMILIES if family not in refused)
    lines = [f"# {name}\n", f"| what is done | {method.group} |\n|---|---|\n| source | {escaped(method.paper)} |",
             f"| code | `{file}` |\n| works on | {works} |"]
    lines += [f"| refuses `{family}` | {why} |" for family, why in refused.items()]
    lines += ["", f"    kdp prune default --method {name} --ratio 0.25 --out small\n",
              "In the workflow, name it in `grid: {methods: [" + name + "]}`. [The methods](../methods.md) says how it "
              "compares with the others.\n", "## How it works\n", *heads(name, module), "## Options\n",
              '<div class="options"></div>\n',
              *option_tables(name)]
    return "\n".join(lines) + "\n"


def heads(name: str, module: Any) -> list[str]:
    """The docstrings of the modules of a method: its own module, and the modules of its parts in the same folder."""
    folder = module.__name__ + "." if hasattr(module, "__path__") else module.__name__
    others = dict.fromkeys(function.__module__ for function in parts(METHODS[name]).values()
                           if function.__module__.startswith(folder) and function.__module__ != module.__name__)
    titled = [f"### The module {other.rpartition('.')[2]}\n\n{head(sys.modules[other])}\n" for other in others]
    return [f"{head(module)}\n", *titled]


def head(module: Any) -> str:
    """The docstring of a module as Markdown: equations become code, and indented sentences become a list."""
    made: list[str] = []
    for kind_of, group in itertools.groupby(inspect.cleandoc(module.__doc__ or "").splitlines(), _kind):
        lines = list(group)
        if kind_of == "indented":
            made += ["", *(_as_list(lines) if _sentences(lines) else lines), ""]
        elif kind_of == "listed":
            made += ["", *map(_literal, lines), ""]
        else:
            made += map(_literal, lines)
    return "\n".join(made)


def _kind(line: str) -> str:
    """The kind of a line of a docstring: indented by itself, part of a list, or prose."""
    if line.startswith("    "):
        return "indented"
    return "listed" if line.startswith(("- ", "  ")) else "prose"


def _sentences(lines: list[str]) -> bool:
    """Whether indented lines are sentences; otherwise they are equations or a table."""
    text = " ".join(lines)
    return lines[0].strip()[:1].isupper() and text.rstrip().endswith(".") and " = " not in text


def _as_list(lines: list[str]) -> list[str]:
    """Indented sentences as a list; a line that is indented further continues the sentence above."""
    return [_literal(f"  {line.strip()}" if line.startswith("     ") else f"- {line.strip()}") for line in lines]


def _literal(line: str) -> str:
    """A line of prose in which the characters with a meaning in Markdown are escaped."""
    if "`" in line:
        return line
    for sign in ("\\", "*", "<", "|", "#"):
        line = line.replace(sign, "\\" + sign)
    return line


def option_tables(name: str) -> list[str]:
    """A table of options for each part that has options."""
    made, lines = method_schema(name)["properties"], []
    for part, function in parts(METHODS[name]).items():
        defaults, entries = options.arguments(function), made[part]["properties"]
        own = {option: one for option, one in entries.items() if option != "sized_as"}
        if not own:
            continue
        lines += [f"### {part}\n", f"{PART.get(part, 'the fit of one block').capitalize()}: "
                  f"`{function.__module__}.{function.__name__}`.\n",
                  "| option | value | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{part}.{option}` | {kind(one)} | {default(defaults.get(option))} "
                  f"| {escaped(one.get('description', ''))} |" for option, one in own.items()]
        lines.append("")
    lines += ["On the command line an option is `--option part.option=value`. In the configuration it stands under "
              f"`methods: {{{name}: {{part: {{option: value}}}}}}`."] if lines else ["This method has no options."]
    return lines


def default(found: Any) -> str:
    """The default of an option."""
    if found is None or found.default is inspect.Parameter.empty:
        return "*required*"
    if found.default is None:
        return "nothing"
    return f"`{found.default}`".replace("|", "\\|")
