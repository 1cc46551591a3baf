"""Asks the library which points cannot be made. refusals.py runs this module in a process of its own.

`python -m planning.foreseen` reads a JSON list of questions from stdin, as `refusals.question` makes them, and prints
a JSON list of reasons. An empty text means that no reason is known, for example because the model itself is not known
yet.
"""
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from kdp_core.base import provenance, store
from kdp_core.base.records import ModelFacts
from kdp_core.study import planner, reach


class Known(NamedTuple):
    """The facts about a model that are known without its weights."""
    facts: ModelFacts
    folder: Path
    """This folder contains only the model's config.json."""


def known(model: str, source: str, folder: Path) -> Known | None:
    """The facts about a model, from its converted checkpoint. Without this checkpoint, the facts come from the
    configuration that the planner finds. None if neither exists.

    A folder of results is not used if it belongs to an earlier model with the same name. If the library cannot describe
    the model, the function returns None, and the job that converts the model gives a better message.
    """
    place = Path("results", model)
    try:
        facts = store.read(place / "facts.json") if (place / "facts.json").is_file() else None
        if facts is not None and facts.source.strip() != provenance.without_place(source):
            place, facts = Path("results", model, "none"), None
        found = planner.described(source, place / "dense", folder)
    except (OSError, ValueError, KeyError):
        return None
    return Known(facts or found, folder)


def answers(questions: list[dict[str, Any]]) -> list[str]:
    """For each question, the reason why the point cannot be made, or an empty text."""
    with tempfile.TemporaryDirectory(prefix="kdp-") as place:
        models = {one["model"]: known(one["model"], one["source"], Path(place, one["model"])) for one in questions}
        return [_answer(one, found) if (found := models[one["model"]]) else "" for one in questions]


def _answer(question: dict[str, Any], model: Known) -> str:
    return reach.refusal(question["method"], reach.Case(*model, **question["calibration"]), **question["given"])


if __name__ == "__main__":
    print(json.dumps(answers(json.load(sys.stdin))))
