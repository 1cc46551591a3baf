"""The numbers of the pico pipeline are those that were recorded before the last restructuring."""
import json
import math

import pytest

from tests.workflow.numbers import differences, numbers
from tests.workflow.project import ROOT

RECORDED = json.loads((ROOT / "tests/workflow/numbers.json").read_text(encoding="utf-8"))
RELATIVE = 1e-3
"""Of a number, or absolute where it is below 1. On the machine of the record all digits are equal; other processors
round sums otherwise, and the trainings of step 1 and 2 enlarge that."""


def test_the_pipeline_gives_the_recorded_numbers(built):
    found = numbers(built.folder / "results")
    assert differences(RECORDED, {name: found[name] for name in RECORDED if name in found}, RELATIVE) == []


@pytest.mark.parametrize("value", [1.01, math.nan, "1"])
def test_another_number_is_seen(value):
    assert differences({"a": 1.0}, {"a": 1.0}) == []
    assert differences({"a": 1.0}, {"a": value}, RELATIVE) != []
    assert differences({"a": 1.0}, {}) == ["only before: a"] and differences({}, {"a": 1.0}) == ["only after: a"]
