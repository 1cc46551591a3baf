"""docs/tried.md: every line has a thread, a result and a test that exists."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [[cell.strip() for cell in line.strip("|").split("|")]
         for line in (ROOT / "docs/tried.md").read_text(encoding="utf-8").splitlines()
         if line.startswith("| ") and not line.startswith("| situation")]


def test_there_are_more_than_the_forty_five_that_were_asked_for():
    assert len(LINES) > 45 and len({line[0] for line in LINES}) == len(LINES)


@pytest.mark.parametrize("line", LINES, ids=[line[0] for line in LINES])
def test_a_line_has_situation_thread_result_and_test(line):
    situation, threads, result, test = line
    assert situation and result
    for thread in threads.split(", "):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+#\d+", thread), thread
    file, name = test.split("::")
    path = ROOT / (file if "/" in file else f"tests/kdp_core/model/{file}")
    assert f"\ndef {name}(" in path.read_text(encoding="utf-8"), test
