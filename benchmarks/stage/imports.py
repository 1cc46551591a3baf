"""Compares the time to import the light parts of the library with the time to import torch.

Each timed run starts a new Python process. The light parts are the modules that a workflow imports before any job runs;
they should not need torch.
"""
import subprocess
import sys

from stage.setup import Setup
from stage.timing import Row, in_turns, judged

LIGHT = ("kdp_core.base.options", "kdp_core.model.families", "kdp_core.model.sizes")
LIMIT_S = 0.3
"""Largest allowed seconds for the import of the light parts, without the start of Python itself."""


def measure(setup: Setup) -> list[Row]:
    """Measure the seconds of both imports, without the start of Python itself."""
    codes = {"nothing": "pass", "light": f"import {', '.join(LIGHT)}", "torch": "import torch"}
    times = in_turns({name: lambda code=code: subprocess.run([sys.executable, "-c", code], check=True)
                      for name, code in codes.items()}, setup.repeats)
    took = times.seconds("light") - times.seconds("nothing")
    took = max(took, 1e-3)
    row = Row(f"import {', '.join(LIGHT)}", took, "s", "limit", LIMIT_S, took / LIMIT_S, None, "", None)
    torch_s = times.seconds("torch") - times.seconds("nothing")
    return [judged(row, 1.0, at_most=True),
            Row("the same beside torch", took, "s", "import torch", torch_s, torch_s / took, None, "", None)]
