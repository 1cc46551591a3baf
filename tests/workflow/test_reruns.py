"""Every row of the table "What reruns" of docs/pipeline.md is checked by a dry run, or by a test that is named here."""
import re

import pytest
from snakemake.utils import update_config

from tests.workflow.project import ROOT, Project

SUMMARY = {"tables": 1, "paper": 1, "figure_all": 4, "cards": 1, "report": 1, "check": 1, "all": 1}
"""What follows a change of anything in the summary."""
SCORES = {"evaluate": 3, "evaluate_dense": 1, "comparisons": 1, **SUMMARY}
PRUNED = {"fold": 3, "evaluate": 3, "efficiency": 3, "diagnose": 3, "comparisons": 1, "figure_ratio": 1,
          "figure_variant": 2, **SUMMARY}
"""The jobs after a new selection of blocks that are known before it. Steps are known only after it."""
SIMILARITY = {"similarity": 1, "figure_calibrated": 1, "blocks": 3, **PRUNED, "figure_all": 6}
CALIBRATION = {"tokens": 1, "hidden": 1, **SIMILARITY}

CASES = [
    ("nothing", {}, {}),
    ("a figure's style", {"figures": {"colormap": "cividis"}},
     {"figure_calibrated": 1, "figure_all": 1, "report": 1, "check": 1, "all": 1}),
    ("`evaluate` options", {"evaluate": {"batch_size": 4}}, SCORES),
    ("window or items of the held-out tasks", {"evaluate": {"window": 12}}, {"tasks": 1, **SCORES}),
    ("`efficiency` options", {"efficiency": {"repeats": 2}}, {"efficiency": 3, "efficiency_dense": 1, **SUMMARY}),
    ("`diagnose` options", {"diagnose": {"windows": 3}},
     {"diagnose": 3, "figure_ratio": 1, "report": 1, "check": 1, "all": 1}),
    ("`answers` options", {"answers": {"prompts": ["word"]}}, {"answers": 1, "report": 1, "all": 1}),
    ("epochs of step 1", {"methods": {"kdp": {"kernel": {"epochs": 3}}}},
     # one block, two steps; costs are measured for this variant only
     {**PRUNED, "step": 2, "fold": 1, "evaluate": 1, "efficiency": 1, "diagnose": 1}),
    ("similarity treatment", {"similarity": {"treatment": "raw"}}, SIMILARITY),
    ("a calibration's seed or mix", {"calibrations": {"few": {"seed": 1}}}, CALIBRATION),
    ("a calibration's seed or mix", {"calibrations": {"few": {"mix": {"made": 39}}}}, CALIBRATION),
    # nothing of the seed that is there runs
    ("a further seed of a calibration", {"calibrations": {"few": {"seeds": [0, 5]}}}, {**CALIBRATION, "seeds": 1}),
]
ELSEWHERE = {
    "a benchmark more": ["stages/test_benchmarks.py::test_a_task_more_is_scored_alone",
                         "stages/test_split.py::test_a_task_that_fails_costs_itself_alone"],
    "`evaluate.split`": [
        "stages/test_split.py::test_the_switch_gives_what_is_there_again_and_can_be_left_out_of_the_count"],
    "`hidden.shards`": [
        "stages/test_hidden.py::test_another_number_of_shards_reruns_what_reads_states_for_its_set_of_inputs_alone"],
    "width of the inverse network": ["test_workflow.py::test_the_width_of_the_inverse_reruns_step_2_and_what_follows"],
    "`search` options": [
        "stages/test_compose.py::test_options_of_the_search_rerun_it_and_all_that_follows",
        "stages/test_compose.py::test_a_variant_on_a_variant_shares_its_search_unless_it_searches_otherwise"],
    "`compose` options": [
        "stages/test_compose.py::test_the_learning_rate_reruns_compose_and_later_only",
        "stages/test_compose.py::test_the_entries_of_a_stand_in_choose_blocks_anew_from_the_same_search"],
    "code of a library module": ["planning/test_code.py::test_an_edit_reruns_the_jobs_that_import_the_module"],
    "a comment or a docstring": ["planning/test_code.py::test_an_edit_reruns_the_jobs_that_import_the_module"],
}
"""Rows whose tests need another project, a real run, or a library to edit."""


def table():
    """The first cells of the table's rows."""
    section = (ROOT / "docs/pipeline.md").read_text(encoding="utf-8").split("## What reruns\n")[1].split("\n## ")[0]
    return re.findall(r"^\| (.+?) \| .+ \|$", section, flags=re.MULTILINE)[1:]


def test_every_row_of_the_table_has_its_tests_and_no_other_row_has():
    rows = table()
    assert len(rows) > 10 and len(set(rows)) == len(rows)
    assert set(rows) == {row for row, *_ in CASES} | set(ELSEWHERE)
    for name in (name for names in ELSEWHERE.values() for name in names):
        file, test = name.split("::")
        assert f"def {test}(" in (ROOT / "tests/workflow" / file).read_text(encoding="utf-8"), name


@pytest.mark.parametrize("row, change, planned", CASES, ids=[f"{row}: {change}" for row, change, _ in CASES])
def test_what_a_dry_run_would_do(row, change, planned, built):
    project = Project(built.folder)
    update_config(project.config, change)
    assert project.planned() == planned
