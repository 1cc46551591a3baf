"""The plan of a grid beside what the workflow really ran; hidden states that go when their last user is through."""
import pytest

from kdp_core import store
from tests.workflow.project import Project

ROWS = ["linear", "kdp"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Two rows at two ratios, checkpoints folded, hidden states not kept."""
    project = Project(tmp_path_factory.mktemp("plan"))
    project.config["hidden"] = {"keep": False}
    project.config["grid"] |= {"methods": ROWS, "ratios": [0.1, 0.2]}
    project.make().run(*(f"results/pico/few/{row}/r{ratio}-k3/pruned.json" for row in ROWS for ratio in (0.1, 0.2)))
    return project


def test_states_are_deleted_once_all_that_read_them_are_through_and_not_before(ended):
    assert not (ended.folder / "results/pico/few/hidden.zarr").exists()
    # extracted once: the steps, which are known only after the choice of blocks, found them
    log = (ended.folder / "results/logs/hidden/pico-few.log").stat()
    assert log.st_mtime_ns < (ended.folder / "results/logs/similarity/pico-few.log").stat().st_mtime_ns
    assert len(list((ended.folder / "results/pico/few/kdp/blocks").rglob("*.safetensors"))) >= 4


def test_states_that_are_gone_rerun_nothing(ended):
    assert ended.planned("results/pico/few/kdp/r0.1-k3/pruned.json") == {}


def test_the_plan_counts_the_jobs_that_ran(ended):
    printed = ended.run("plan")
    assert "accelerator hours" in printed and "| pico |" in printed
    counted = {cost["stage"]: cost["jobs"] for cost in store.read_json(ended.folder / "results/plan.json")["costs"]}
    # a benchmark file a job
    ran = {folder.name: len(list(folder.glob("*.tsv"))) for folder in (ended.folder / "results/benchmarks").glob("*/")}
    stages = ("dense", "tokens", "hidden", "similarity", "blocks", "fold")
    assert {stage: counted[stage] for stage in stages} == {stage: ran[stage] for stage in stages}
    assert counted["step"] >= ran["step"] and counted["step"] - ran["step"] <= 3, "an upper bound, and a close one"
    assert counted["evaluate"] == 5 and counted["diagnose"] == 4 and counted["search"] == counted["finetune"] == 0


def test_a_model_of_which_nothing_is_here_is_one_clear_line(ended):
    ended.config["models"]["other"] = {"source": "hf:some/model@main"}
    ended.config["grid"]["models"] = ["other"]
    text = ended.run("plan", check=False)
    assert "PlanError: hf:some/model@main: its configuration is not here; convert the model first" in text
    assert "Traceback" not in text
