"""Makes kdp_core importable in a checkout in which the package is not installed.

kdp_core writes the bounds of options with types of the package annotated-types, such as Ge and Lt. If this package is
missing, simple named tuples replace these types, because kdp_core reads only their numbers.
"""
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
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
