"""Functions that load the items of the task files in this folder.

This file is copied into every folder of tasks, so the folder may be moved.
"""
from pathlib import Path
from typing import Any

from kdp_core.score import tasks

HERE = Path(__file__).parent


def ppl(**metadata: Any) -> dict[str, Any]:
    """Windows of tokens. The metadata of lm-eval name the tokenizer: --metadata '{"tokenizer": "FOLDER"}'."""
    if "tokenizer" not in metadata:
        raise tasks.TaskError("heldout_ppl cuts windows of tokens: name the model's folder as `tokenizer` in lm-eval's "
                              "metadata")
    return tasks.read_windows(HERE / "heldout_ppl.jsonl", **metadata)


def lastword(**_: Any) -> dict[str, Any]:
    """Passages without their last word."""
    return tasks.read_items(HERE / "heldout_lastword.jsonl")


def continuation(**_: Any) -> dict[str, Any]:
    """Contexts with four continuations."""
    return tasks.read_items(HERE / "heldout_continuation.jsonl")
