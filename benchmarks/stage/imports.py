"""The start of a process: importing the light parts of the library, beside importing torch.

Each turn starts a new Python process. The light parts are the parts that a workflow reads before any job runs; they
should not need torch.
"""
import subprocess
import sys

from stage.setup import Setup
from stage.timing import Row, in_turns, judged

LIGHT = ("kdp_core.base.options", "kdp_core.model.families", "kdp_core.model.sizes")
LIMIT_S = 0.3
"""Most seconds of their import, above those of an empty Python."""


def measure(setup: Setup) -> list[Row]:
    """Seconds in addition to the start of an empty Python."""
    codes = {"nothing": "pass", "light": f"import {', '.join(LIGHT)}", "torch": "import torch"}
    times = in_turns({name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
                      for name, code in codes.items()}, setup.repeats)
    took = times.seconds("light") - times.seconds("nothing")
    took = max(took, 1e-3)
    row = Row(f"import {', '.join(LIGHT)}", took, "s", "limit", LIMIT_S, took / LIMIT_S, None, "", None)
    torch_s = times.seconds("torch") - times.seconds("nothing")
    return [judged(row, 1.0, at_most=True),
            Row("the same beside torch", took, "s", "import torch", torch_s, torch_s / took, None, "", None)]
