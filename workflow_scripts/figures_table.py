"""Writes the table of figures into docs/figures.md, from the entries of kdp_core/figures.

Run `python workflow_scripts/figures_table.py` after you change an entry.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# the library is imported from the folder next to this one, whether it is installed or not
sys.path.append(str(ROOT))

from kdp_core.figures import Entry, find  # noqa: E402
from kdp_core.figures._entry import SCOPES  # noqa: E402

PAGE = ROOT / "docs" / "figures.md"
BEGIN, END = "<!-- begin: table of figures, made by workflow_scripts/figures_table.py -->", "<!-- end -->"
SECTIONS = {"theory": "theory", "views": "views", "spaces": "spaces", "generation": "generation",
            "viewed": "views", "agreement": "agreement", "choices": "choices"}
"""Value of `needs` in an entry -> section of the configuration. Without this section, the figure is not drawn."""


def row(entry: Entry) -> str:
    """A row of the table of figures."""
    file = SCOPES[entry.scope].path.replace("{figure}", entry.name)
    section = "ablations" if entry.scope == "ablation" else SECTIONS.get(entry.needs)
    wanted = f", with `{section}` in the configuration" if section else ""
    return f"| {entry.title}: `{file}`{wanted} | {entry.caption} | {entry.differs} |"


def table() -> str:
    """The Markdown table of all figures, in the order of the report."""
    return "\n".join(["| figure and file | what it shows, and of which paper | where it differs |", "|---|---|---|",
                      *map(row, find().values())])


def with_table(page: str) -> str:
    """A page with the table between its two markers."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
