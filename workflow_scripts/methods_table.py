"""Writes the lists of methods in README.md and docs/methods.md: `python workflow_scripts/methods_table.py`.

A list is made from the records of the methods. It stands between the lines `<!-- methods -->` and
`<!-- end of methods -->`.
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the library is found beside this folder, whether it is installed or not
sys.path.append(str(ROOT))

from kdp_core.methods import GROUPS, METHODS  # noqa: E402

PLACES = ("README.md", "docs/methods.md")
MARKED = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)


def table() -> str:
    """The methods by what they do to a model, as Markdown."""
    lines = ["| what is done | methods |", "|---|---|"]
    for group in GROUPS:
        names = [f"`{name}`" for name, method in METHODS.items() if method.group == group]
        lines += [f"| {group} | {' '.join(names)} |"] if names else []
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """The page with the current list of methods. A page without the two marker lines raises ValueError."""
    if not MARKED.search(text):
        raise ValueError("the page has no lines '<!-- methods -->' and '<!-- end of methods -->'; put them around the "
                         "list of methods")
    return MARKED.sub(lambda found: found[1] + table() + found[2], text)


if __name__ == "__main__":
    for name in PLACES:
        (ROOT / name).write_text(written((ROOT / name).read_text(encoding="utf-8")), encoding="utf-8")
