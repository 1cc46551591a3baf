"""Writes the tables of methods in README.md and docs/methods.md: `python workflow_scripts/methods_table.py`.

The tables are made from the records of the methods and of the families. Each table is between two lines with its name,
such as `<!-- methods -->` and `<!-- end of methods -->`.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the library is imported from the folder next to this one, whether it is installed or not
sys.path.append(str(ROOT))

from kdp_core.methods import GROUPS, METHODS  # noqa: E402
from kdp_core.model.families import FAMILIES  # noqa: E402


def methods() -> str:
    """The methods, grouped by their change to a model, as a Markdown table."""
    lines = ["| what is done | methods |", "|---|---|"]
    for group in GROUPS:
        names = [f"`{name}`" for name, method in METHODS.items() if method.group == group]
        lines += [f"| {group} | {' '.join(names)} |"] if names else []
    return "\n".join(lines) + "\n"


def file_of(name: str) -> str:
    """The library's file with a method's record, relative to the checkout's root."""
    record = METHODS[name]
    # packages also list the records of their modules; the module that defines the record has the longest name
    module = max((module for module, loaded in sys.modules.items() if module.startswith("kdp_core.methods.")
                  and any(one is record for one in getattr(loaded, "METHODS", ()))), key=len)
    return Path(str(sys.modules[module].__file__)).relative_to(ROOT).as_posix()


def files() -> str:
    """Every method with its paper and its file, as a Markdown table."""
    lines = ["| method | paper | file |", "|---|---|---|"]
    # a vertical bar in a cell would end the cell
    lines += [f"| `{name}` | {method.paper.replace('|', '&#124;')} | `{file_of(name)}` |"
              for name, method in METHODS.items()]
    return "\n".join(lines) + "\n"


def families() -> str:
    """A Markdown table that shows for each method the families on which it works.

    In the table, a letter stands for the reason of a refusal; the reasons are listed below the table.
    """
    refused = {(name, family): method.refuses(record)
               for name, method in METHODS.items() for family, record in FAMILIES.items()}
    reasons = list(dict.fromkeys(filter(None, refused.values())))
    letter = {reason: "abcdefghijklmnopqrstuvwxyz"[number] for number, reason in enumerate(reasons)}
    head = " | ".join(["method", *(f"`{family}`" for family in FAMILIES)])
    lines = [f"| {head} |", "|---" * (len(FAMILIES) + 1) + "|"]
    for name in METHODS:
        why = [refused[name, family] for family in FAMILIES]
        cells = " | ".join([f"`{name}`", *(f"refused ({letter[one]})" if one else "works" for one in why)])
        lines.append(f"| {cells} |")
    lines += ["", "Refused because", "", *(f"- ({letter[reason]}) {reason}" for reason in reasons)]
    return "\n".join(lines) + "\n"


PLACES = {"README.md": {"methods": methods},
          "docs/methods.md": {"methods": methods, "files": files, "families": families}}
"""Page -> name of a table in it -> the function that makes the table."""


def written(page: str, text: str) -> str:
    """The text of a page with its current tables. A page without the two marker lines of a table raises ValueError."""
    for name, made in PLACES[page].items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not marked.search(text):
            raise ValueError(f"{page} has no lines '<!-- {name} -->' and '<!-- end of {name} -->'; put them around the "
                             "table")
        table = made()
        text = marked.sub(lambda found, table=table: found[1] + table + found[2], text)
    return text


if __name__ == "__main__":
    for page in PLACES:
        (ROOT / page).write_text(written(page, (ROOT / page).read_text(encoding="utf-8")), encoding="utf-8")
