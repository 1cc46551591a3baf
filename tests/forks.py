"""Processes of the workflow under test are forked from one that has imported what they need: workflow_scripts/forks.py.

A job of the workflow is a process that imports torch and transformers, which takes longer than the work of a pico job.
Snakemake, which tests start often, is imported there too.
"""
import atexit
import contextlib
import functools
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "workflow_scripts"))

import forks

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@functools.cache
def python() -> str:
    """The path of `python`. The first call of a process starts its server; it takes some seconds."""
    stack = contextlib.ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(forks.python(("snakemake.cli",), ENVIRONMENT))
