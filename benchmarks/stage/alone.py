"""Makes kdp_core importable in a checkout in which the package is not installed.

kdp_core takes the bounds of options from the package annotated-types. If this package is missing, simple objects with
the same numbers replace the bounds; kdp_core uses only these numbers.
"""
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout."""
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def bounds() -> types.ModuleType:
    """A module that replaces annotated-types and has the bounds that kdp_core uses."""
    made = types.ModuleType("annotated_types")
    for name in ("Ge", "Gt", "Le", "Lt"):
        setattr(made, name, NamedTuple(name, [(name.lower(), Any)]))
    made.MultipleOf = NamedTuple("MultipleOf", [("multiple_of", Any)])
    return made


try:
    import annotated_types  # noqa: F401 (only whether it is there)
except ImportError:
    sys.modules["annotated_types"] = bounds()
