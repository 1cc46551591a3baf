"""The profile of Slurm clusters, as far as it goes without a Slurm: where it is found, and what jobs ask for."""
import json
import os
import subprocess
import sys

import pytest
import yaml
from snakemake.api import SnakemakeApi
from snakemake.resources import Resources
from snakemake.settings.enums import Quietness
from snakemake.settings.types import DAGSettings, OutputSettings, ResourceSettings

from tests.workflow.project import ROOT, Project

HOME = "profiles/slurm/config.yaml"


@pytest.fixture
def project(tmp_path):
    """A project of which nothing is built."""
    return Project(tmp_path).make()


def asked(project: Project, rule: str, target: str, **site: str) -> dict:
    """What the first job of a rule asks for, and its group, by the profile with these values of a site."""
    given = yaml.safe_load((ROOT / HOME).read_text(encoding="utf-8"))["default-resources"] | site
    default = Resources.parse([f"{name}={value}" for name, value in given.items()], allow_expressions=True)
    project.command()
    with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
        workflow_api = api.workflow(ResourceSettings(cores=1, default_resources=default), snakefile=ROOT / "Snakefile",
                                    workdir=project.folder)
        workflow_api.dag(DAGSettings(targets={target})).execute_workflow(executor="dryrun")
        job = next(job for job in workflow_api._workflow.dag.jobs if job.rule.name == rule)
        return {"group": job.group, **job.resources}


def test_the_bare_name_finds_the_profile_from_the_folder_of_the_project(project):
    assert os.path.samefile(ROOT / "slurm" / "config.yaml", ROOT / HOME)
    project.command()
    done = subprocess.run([sys.executable, "-m", "snakemake", "--profile", "slurm", "--dry-run", "--configfile",
                           str(project.folder / "config.yaml"), "--directory", str(project.folder),
                           "results/pico/dense"],
                          cwd=ROOT, env=project.environment(), text=True, capture_output=True, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert "Using profiles slurm and workflow specific profile profiles/default" in said


def test_only_jobs_on_a_gpu_get_the_type_and_the_partition_of_gpus(project):
    site = {"slurm_partition": "cpu", "gpu_type": "a100", "gpu_partition": "gpu"}
    target = "results/pico/few/similarity.safetensors"
    project.config["models"]["pico"]["device"] = "cuda"
    hidden = asked(project, "hidden", target, **site)
    assert (hidden["gpu"], hidden["gpu_model"], hidden["slurm_partition"]) == (1, "a100", "gpu")
    similarity = asked(project, "similarity", target, **site)
    assert (similarity["gpu"], similarity["gpu_model"], similarity["slurm_partition"]) == (1, "a100", "gpu")
    tokens = asked(project, "tokens", target, **site)
    assert tokens["slurm_partition"] == "cpu" and not {"gpu", "gpu_model"} & set(tokens)
    project.config["models"]["pico"]["device"] = "cpu"
    hidden = asked(project, "hidden", target, **site)
    assert (hidden["gpu"], hidden["slurm_partition"]) == (0, "cpu") and "gpu_model" not in hidden


def test_a_task_that_is_a_job_has_its_gpu_and_what_puts_tasks_together_has_none(project):
    site = {"slurm_partition": "cpu", "gpu_partition": "gpu"}
    target = "results/pico/scores.json"
    project.config["models"]["pico"]["device"] = "cuda"
    whole = asked(project, "evaluate_dense", target, **site)
    assert (whole["gpu"], whole["slurm_partition"], whole["group"]) == (1, "gpu", None)
    project.config["evaluate"]["split"] = True
    task = asked(project, "score_dense", target, **site)
    assert {name: task[name] for name in whole} == whole
    split = asked(project, "evaluate_dense", target, **site)
    # many of them go together, and the profile says how many
    profile = yaml.safe_load((ROOT / HOME).read_text(encoding="utf-8"))
    assert split["slurm_partition"] == "cpu" and split["group"] in profile["group-components"]
    assert "gpu" not in split and split["mem_mb"] < task["mem_mb"] and split["runtime"] < task["runtime"]


def test_without_a_site_nothing_is_asked_of_partitions(project):
    project.config["models"]["pico"]["device"] = "auto"
    hidden = asked(project, "hidden", "results/pico/few/hidden.zarr")
    assert hidden["gpu"] == 1 and not {"gpu_model", "slurm_partition", "slurm_account"} & set(hidden)


def test_shards_take_a_gpu_each_and_their_share_of_the_time_and_joining_takes_none(project):
    target = "results/pico/few/hidden.zarr"
    project.config["models"]["pico"] = {"source": "hf:org/model-7b@main", "device": "cuda"}
    project.config["hidden"] = {"shards": 5}
    shard, joining = (asked(project, rule, target) for rule in ("hidden_shard", "hidden_join"))
    assert (shard["gpu"], shard["runtime"]) == (1, 30 + 15 * 7 // 5)
    assert "gpu" not in joining and joining["mem_mb"] < shard["mem_mb"]


def test_jobs_of_a_spread_model_take_all_its_gpus_and_fits_on_states_one(project):
    project.config["models"]["pico"] |= {"device": "balanced", "gpus": 4}
    project.config["theory"] = {"method": "kdp", "run": [2, 5]}
    target = "results/pico/few/theory.json"
    assert (asked(project, "hidden", target)["gpu"], asked(project, "theory", target)["gpu"]) == (4, 1)
    assert asked(project, "similarity", "results/pico/few/similarity.safetensors")["gpu"] == 1
    scored = asked(project, "evaluate_dense", "results/pico/scores.json")
    # one process sees them all
    assert (scored["gpu"], scored["nodes"]) == (4, 1)
    project.config["models"]["pico"] = {"source": "model", "device": "cuda"}
    assert "nodes" not in asked(project, "hidden", target)


def test_memory_and_time_grow_with_the_model(project):
    target = "results/pico/few/hidden.zarr"
    small = asked(project, "hidden", target)
    assert (small["mem_mb"], small["runtime"]) == (3001, 30)
    # a Llama of 7 billion parameters, by its configuration: 26 GB of float32, half as much more to be safe
    described = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False}
    path = project.folder / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"head_dim": 128} | described),
                    encoding="utf-8")
    large = asked(project, "hidden", target)
    assert large["mem_mb"] == pytest.approx(3000 + 1.5 * 4 * 6738, rel=0.01)
    assert large["runtime"] == 30 + int(15 * 6.738)
