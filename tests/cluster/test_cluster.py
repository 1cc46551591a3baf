"""A sweep over three nodes equals the local run bit for bit, its jobs ask for what they need, and the cluster works."""
import os
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.command import load
from tests.cluster import cluster as module
from tests.cluster.cluster import NODES
from tests.cluster.sweep import Sweep


def test_a_sweep_on_three_nodes_equals_the_local_run(prepared, undisturbed):
    run = prepared.begin(*prepared.targets())
    prepared.end(run)
    assert prepared.bits() == undisturbed.bits()

    jobs = [fields for fields in prepared.cluster.jobs().values() if fields["WorkDir"] == str(prepared.folder)]
    assert {fields["JobState"] for fields in jobs} == {"COMPLETED"}
    # the machine decides how many jobs run at the same time
    assert len({fields["NodeList"] for fields in jobs}) > 1
    comments = [fields["Comment"] for fields in jobs]
    # the blocks of all points are selected in one job
    assert sum("blocks" in comment for comment in comments) == 1
    # jobs that train ask for a GPU, jobs that fold do not
    assert all(("gpu" in fields.get("TresPerJob", "")) == fields["Comment"].startswith("rule_step") for fields in jobs)


def test_the_benchmark_runs_a_sweep_here_and_on_the_cluster(cluster, tmp_path):
    start = Sweep(tmp_path / "start", None).make()
    start.config["grid"] |= {"methods": ["remove"], "ratios": [0.1]}
    found = load("cluster_sweep").compare(start, cluster, 2)
    assert found.different == [] and found.files > 20
    # states, similarity, blocks, fold, evaluation
    assert (found.points, found.jobs, found.slurm_jobs) == (1, 5, 5) and found.nodes > 0 and found.ratio > 0
    assert [path.name for path in tmp_path.iterdir()] == ["start"], "runs that are compared are deleted"


def test_every_job_has_a_gpu_of_its_own(cluster):
    seen = cluster.run("srun", "--gpus=1", "--mem=10", "printenv", "CUDA_VISIBLE_DEVICES", "SLURMD_NODENAME").split()
    assert seen[0] in ("0", "1") and seen[1] in NODES


def test_the_cluster_lives_in_its_folder_and_leaves_nothing(tmp_path):
    script = [sys.executable, module.__file__]
    said = subprocess.run([*script, "start"], capture_output=True, text=True, check=True).stdout
    folder = Path(said.split("SLURM_CONF=")[1].split("/slurm.conf")[0])
    other = module.Cluster(folder)
    pids = list(other.pids().values())
    assert len(pids) == 2 + len(NODES) and set(other.states().values()) == {"idle"}
    other.run("sbatch", "--mem=10", "--output=/dev/null", "--wrap=sleep 600")
    subprocess.run([*script, "stop", str(folder)], check=True)
    assert not folder.exists()
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}/exe")]
