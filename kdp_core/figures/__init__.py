"""The figures. Every file of this folder that defines `FIGURES` contains figures of one kind; the module `style`
defines their common style.

This module contains no list of figures; it imports the files of its folder and collects their entries. A new figure is
a new entry in one of these files, or in a new file; see `kdp_core.figures._entry.Entry`.
"""
import importlib
import pkgutil
from typing import Any

from kdp_core.figures._entry import SCOPES, Entry, check
from kdp_core.figures.style import FigureError

__all__ = ["Entry", "FigureError", "described", "figure_of", "find"]


def find() -> dict[str, Entry]:
    """The figures of this package by name, in the order of the report.

    Raises FigureError for two figures of the same name, and for an entry that the workflow could not draw.
    """
    modules = [importlib.import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    entries = [entry for module in modules for entry in getattr(module, "FIGURES", ())]
    found: dict[str, Entry] = {}
    # the sort is stable: figures with an equal `place` keep the order of their file
    for entry in sorted(entries, key=lambda entry: entry.place):
        check(entry)
        if entry.name in found:
            raise FigureError(f"two figures are called {entry.name!r}; rename one of them")
        found[entry.name] = entry
    return found


def figure_of(name: str) -> Entry:
    """A figure by its name. Raises FigureError for an unknown name and lists the known names."""
    found = find()
    if name not in found:
        raise FigureError(f"figure {name!r} is unknown; choose one of {', '.join(found)}")
    return found[name]


def described() -> dict[str, Any]:
    """What the workflow needs to know about all figures before its first job, as values that JSON can store."""
    return {"scopes": {name: scope._asdict() for name, scope in SCOPES.items()},
            "figures": [{"name": name, "title": entry.title, "caption": entry.caption, "scope": entry.scope,
                         "needs": entry.needs, "reads": entry.reads, "settings": entry.settings,
                         "module": entry.draw.__module__} for name, entry in find().items()]}
