"""Asks the library which points cannot be made; refusals.py runs this module in a process of its own.

`python -m planning.foreseen` reads a JSON list of questions from stdin, as `refusals.question` makes them, and prints
a JSON list of reasons. A reason is empty if none is known, or if the model is not known yet.
"""
import json
import sys
from pathlib import Path
from typing import Any

from kdp_core.base import store
from kdp_core.base.records import ModelFacts
from kdp_core.study import planner, reach


def facts_of(model: str, source: str) -> ModelFacts:
    """The facts of a model, from its converted checkpoint, or from the configuration of its local folder."""
    known = Path("results", model, "facts.json")
    return store.read(known) if known.is_file() else planner.facts_of(source, Path("results", model, "dense"))


def answers(questions: list[dict[str, Any]]) -> list[str]:
    """Why each point cannot be made."""
    facts = {one["model"]: facts_of(one["model"], one["source"]) for one in questions}
    return [reach.refusal(one["method"], facts[one["model"]], one["sequences"], **one["given"]) for one in questions]


if __name__ == "__main__":
    print(json.dumps(answers(json.load(sys.stdin))))
