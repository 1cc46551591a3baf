"""One grid point that cannot be made does not stop the others, and the report names it."""
import json

from tests.workflow.project import Project


def test_what_config_and_facts_refuse_is_left_out_before_any_job(tmp_path):
    project = Project(tmp_path).make()
    project.config["grid"] |= {"methods": ["remove", "kdp_residual"], "ratios": [0.25]}
    project.config["methods"]["remove"] = {}
    project.config["methods"]["kdp_residual"] = {"search": {"largest": 0.26, "judge_sequences": 4}}
    text = project.run("--dry-run")
    said, = (line for line in text.splitlines() if line.startswith("left out: "))
    assert "kdp_residual on pico, few, ratio 0.25, K max 3" in said and "search.largest" in said
    planned = project.planned()
    assert "search" not in planned and "compose" not in planned and planned["fold"] == 1


def test_a_point_that_a_job_refuses_stops_no_other_and_is_named_in_the_report(copied):
    copied.config["methods"]["kdp"]["kernel"]["bandwidth_scale"] = 1e6
    copied.config["methods"]["linear"] = {"fit": {"ridge": 0.01}}
    text = copied.run(check=False)
    # the other variant went on to its scores, though the first one failed
    assert "KernelCollapsed" in text and " scores of results/pico/few/linear/r0.1-k3/checkpoint" in text
    found = json.loads((copied.folder / "results/pico/few/kdp/r0.1-k3/refused.json").read_text())
    assert found["reason"].startswith("KernelCollapsed: ")
    text = copied.run()
    assert "left out: kdp on pico, few, ratio 0.1, K max 3: KernelCollapsed" in text
    report = (copied.folder / "results/report.html").read_text(encoding="utf-8")
    assert "1 grid point could not be made" in report and "KernelCollapsed" in report
    rows = (copied.folder / "results/summary.csv").read_text(encoding="utf-8").splitlines()
    assert "kdp" not in {row.split(",")[2] for row in rows}
    # the same configuration has nothing left to do
    assert copied.planned() == {}
