"""Draw docs/images/architecture.svg: which folder of kdp_core imports from which, read from the code.

    python docs/draw_architecture.py

The folders stand in the order of the flow, from the top left to the bottom right. A dot in the row of a folder means
that it imports from the folder of that column. Every dot lies below the diagonal as long as the imports go one way.
"""
import ast
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "kdp_core"
OUT = ROOT / "docs" / "images" / "architecture.svg"
BLUE, GREY, PALE = "#0072B2", "#666666", "#EAF2F8"
FIXED = {"svg.hashsalt": "kdp", "svg.fonttype": "none", "font.family": "sans-serif"}
"""Settings with which the same code gives the same file."""


def folders() -> dict[str, str]:
    """The folders of kdp_core in the order of the flow, each with its line in the package's docstring."""
    words = ast.get_docstring(ast.parse((CORE / "__init__.py").read_text(encoding="utf-8")), clean=False)
    return dict(re.findall(r"^ {4}(\w+) +(.+)$", words, re.MULTILINE))


def needs(folder: str) -> set[str]:
    """The other folders that the modules of a folder import from."""
    found = set()
    for path in (CORE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found |= {name.split(".")[1] for name in names if name.startswith("kdp_core.")}
    return found - {folder}


def draw(edges: dict[str, set[str]], words: dict[str, str]) -> Figure:
    """The folders on the diagonal, a dot for every folder that another imports from, and what each folder holds."""
    names = list(edges)
    figure = Figure(figsize=(9.6, 4.6))
    axis = figure.add_axes((0.01, 0.02, 0.98, 0.96))
    for place, name in enumerate(names):
        axis.add_patch(FancyBboxPatch((place - 0.46, place - 0.34), 0.92, 0.68, linewidth=1, edgecolor=BLUE,
                                      facecolor=PALE, boxstyle="round,pad=0.02"))
        axis.text(place, place, name, ha="center", va="center", fontsize=8)
        axis.text(len(names) - 0.3, place, words[name], ha="left", va="center", fontsize=7.5, color=GREY)
        axis.plot([-0.5, place - 0.5], [place, place], color="#DDDDDD", linewidth=0.6, zorder=0)
        for other in sorted(edges[name], key=names.index):
            axis.plot(names.index(other), place, marker="o", markersize=5, color=BLUE)
    axis.set(xlim=(-0.6, len(names) + 8.2), ylim=(len(names) - 0.5, -0.6))
    axis.set_axis_off()
    return figure


def main(out: Path = OUT) -> None:
    """Read the imports and write the picture."""
    words = folders()
    with matplotlib.rc_context(FIXED):
        draw({name: needs(name) for name in words}, words).savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
