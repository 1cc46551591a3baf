"""Benchmarks in the workflow: local data, and a task more that costs itself alone."""
import json

import pytest

from kdp_core.base import store
from tests import pico
from tests.workflow.project import Project

SCORES = "results/pico/scores.json"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The dense model's scores on one benchmark beside the held-out text."""
    project = Project(tmp_path_factory.mktemp("benchmarks")).make()
    words = pico.documents(6, seed=4, words=24)
    rows = {"piqa_val": [{"goal": text[:40], "sol1": text[40:70], "sol2": text[70:95], "label": i % 2}
                         for i, text in enumerate(words)],
            "wikitext2_test": [{"page": text} for text in words]}
    (project.folder / "data" / "eval").mkdir(parents=True)
    for name, lines in rows.items():
        (project.folder / "data" / "eval" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    project.config["evaluate"] |= {"tasks": ["heldout_ppl"],
                                   "benchmarks": {"tasks": ["piqa"], "data": "data", "limit": 4}}
    project.run(SCORES)
    return project


def test_a_task_more_is_scored_alone(built):
    records = built.folder / "results/pico/scored"
    before = {path: path.stat().st_mtime_ns for path in records.iterdir()}
    assert len(before) == 2 and built.planned(SCORES) == {}

    built.config["evaluate"]["benchmarks"] |= {"tasks": ["piqa", "wikitext"], "limits": {"wikitext": 2}}
    # snakemake names what it deletes and makes again: the scores of this one model
    assert built.planned(SCORES) == {"evaluate_dense": 1}
    text = built.run(SCORES)
    assert "piqa, task 2 of 3: kept from an earlier run" in text and "wikitext, task 3 of 3: 2 items" in text
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(list(records.iterdir())) == 3
    items = {score.task: score.items for score in store.read(built.folder / SCORES).scores if score.unit != "ppl"}
    assert items == {"heldout_ppl": items["heldout_ppl"], "piqa": 4, "wikitext": 2}
    assert {path.stem for path in (built.folder / "results/pico/samples").glob("*.jsonl")} == {
        "heldout_ppl", "piqa", "wikitext"}

    file = built.folder / "data/eval/wikitext2_test.jsonl"
    file.write_text("".join(reversed(file.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    text = built.run(SCORES)
    assert text.count("kept from an earlier run") == 2 and "wikitext, task 3 of 3: 2 items" in text
