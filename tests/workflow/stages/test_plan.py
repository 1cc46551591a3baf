"""A plan counts the jobs that the workflow runs; hidden states are deleted after the last job that reads them.

The run of this file has a variant in common with the built project, so it also shows that two runs give equal results.
"""
import pytest

from kdp_core.base import store
from tests.workflow.numbers import differences, numbers
from tests.workflow.project import Project

VARIANTS = ["linear", "kdp"]
POINT = "results/pico/few/kdp/r0.1-k3"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Two variants at two ratios, folded without keeping hidden states, and what snakemake printed; one is scored."""
    project = Project(tmp_path_factory.mktemp("plan"))
    project.config["hidden"] = {"keep": False}
    project.config["grid"] |= {"methods": VARIANTS, "ratios": [0.1, 0.3]}
    printed = project.make().run(f"{POINT}/scores.json", f"{POINT}/diagnosis.json",
                                 *(f"results/pico/few/{variant}/r{ratio}-k3/pruned.json"
                                   for variant in VARIANTS for ratio in (0.1, 0.3)))
    return project, printed


def test_states_are_deleted_once_all_that_read_them_are_through_and_not_before(ended):
    project, printed = ended
    assert not (project.folder / "results/pico/few/hidden.zarr").exists()
    # extracted once: the steps, which are known only after the choice of blocks, found them
    assert printed.count("Extracting hidden states") == 1
    assert printed.count("Removing temporary output results/pico/few/hidden.zarr") == 1
    assert printed.rindex("Fitting kdp") < printed.index("Removing temporary output")


def test_deleted_states_rerun_nothing_but_for_a_variant_added_later(ended):
    project, _ = ended
    assert project.planned("results/pico/few/kdp/r0.1-k3/pruned.json") == {}
    block = next((project.folder / "results/pico/few/linear/blocks").iterdir()).name
    later = project.planned(f"results/pico/few/linear_sequential/blocks/{block}/fit.safetensors",
                            "results/pico/few/kdp/r0.1-k3/pruned.json")
    # new states make the choice of kdp's blocks old, and what follows it
    assert later == {"hidden": 1, "step": 1, "similarity": 1, "blocks": 1, "fold": 1}


def test_two_runs_give_the_same_bits_of_all_that_is_not_measured(ended, built):
    one, other = (numbers(project.folder / "results") for project in (ended[0], built))
    both = set(one) & set(other)
    assert differences({name: one[name] for name in both}, {name: other[name] for name in both}) == []
    own, files = POINT.removeprefix("results/"), {name.split("#")[0] for name in both}
    assert {"pico/facts.json", "pico/few/tokens.safetensors", "pico/few/similarity.safetensors", f"{own}/plan.json",
            f"{own}/checkpoint/model.safetensors", f"{own}/scores.json", f"{own}/diagnosis.json",
            *(f"pico/few/kdp/blocks/{start}-{stop}/{step}.safetensors" for step in ("kernel", "inverse")
              for start, stop in store.read(built.folder / POINT / "plan.json").blocks),
            *(f"{own}/samples/{task}.jsonl" for task in built.config["evaluate"]["tasks"])} <= files
    # perplexities, accuracies and their errors are among the compared values
    scored = [score.value for score in store.read(ended[0].folder / POINT / "scores.json").scores]
    assert set(scored) <= {value for name, value in one.items() if name in both and f"{own}/scores.json" in name}


def test_the_plan_counts_the_jobs_that_ran(ended):
    project, _ = ended
    printed = project.run("plan")
    assert "accelerator hours" in printed and "| pico |" in printed
    counted = {cost["stage"]: cost["jobs"] for cost in store.read_json(project.folder / "results/plan.json")["costs"]}
    # a benchmark file a job
    ran = {path.name: len(list(path.glob("*.tsv"))) for path in (project.folder / "results/benchmarks").glob("*/")}
    stages = ("dense", "tokens", "hidden", "similarity", "blocks", "fold")
    assert {stage: counted[stage] for stage in stages} == {stage: ran[stage] for stage in stages}
    # the layers of a pico model are all of one size
    assert counted["step"] == ran["step"] > 3
    assert counted["evaluate"] == 5 and counted["diagnose"] == 4 and counted["search"] == counted["finetune"] == 0


def test_a_model_of_which_nothing_is_here_is_one_clear_line(ended):
    project = Project(ended[0].folder)
    project.config["models"]["other"] = {"source": "hf:some/model@main"}
    project.config["grid"]["models"] = ["other"]
    text = project.run("plan", check=False)
    assert "PlanError: hf:some/model@main: its configuration is not here; convert the model first" in text
    assert "Traceback" not in text
