"""Lets a command run from a bare checkout: kdp_core is found without being installed.

A machine may lack annotated-types, from which kdp_core reads the bounds of options. Then the bounds are replaced by
objects with their numbers, because nothing else is read.
"""
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
"""The checkout."""
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def bounds() -> types.ModuleType:
    """A module with the bounds of annotated-types that kdp_core names."""
    made = types.ModuleType("annotated_types")
    for name in ("Ge", "Gt", "Le", "Lt"):
        setattr(made, name, NamedTuple(name, [(name.lower(), Any)]))
    made.MultipleOf = NamedTuple("MultipleOf", [("multiple_of", Any)])
    return made


try:
    import annotated_types  # noqa: F401 (only whether it is there)
except ImportError:
    sys.modules["annotated_types"] = bounds()
