"""Runs one sweep on this machine and on a Slurm cluster of three nodes, and compares results and run times.

Both runs start from copies of one folder with the dense model, the calibration tokens and the evaluation tasks. Both
runs end with the scores of every grid point. The cluster (tests/cluster/cluster.py) consists of three nodes of one CPU
each on this machine. Therefore every job has one thread, and all processes of both runs are restricted to the same
cores. The difference of the two run times is therefore the cost of the cluster. Three things cause this cost: the
processes that Slurm and Snakemake start around each job, the submission of each job, and the delay until Snakemake
notices that a job has ended.

<out>/cluster_sweep.json has the size of the sweep and
    seconds_local, seconds_cluster    wall time from the start of snakemake to its end
    ratio                             seconds_cluster / seconds_local
    files, different                  number of results compared; names of those that differ in more than seconds
Each run needs 9 GB of disk. The results of a run are deleted after the run, unless --keep is given.
Run: python benchmarks/cluster_sweep.py [--cores 2] [--out FOLDER]. The command needs the packages slurm-wlm and munge.
The estimated time is 25 minutes on two free cores.
"""
import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from snakemake.utils import update_config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kdp_core.base import store
from kdp_core.results import tables
from tests.cluster.cluster import Cluster, missing
from tests.cluster.sweep import Sweep
from tests.workflow.project import ROOT

sys.path.insert(0, str(ROOT / "workflow_scripts"))
from planning import grid


class Compared(NamedTuple):
    """Two runs of one sweep."""
    points: int
    """Number of points of the grid."""
    cores: int
    """Number of cores to which each run was restricted."""
    jobs: int
    """Number of Snakemake jobs in each run."""
    slurm_jobs: int
    """Number of Slurm jobs. This number is lower than `jobs`, because several small jobs are submitted as one Slurm
    job."""
    nodes: int
    """Number of nodes of the cluster on which at least one job ran."""
    seconds_local: float
    seconds_cluster: float
    files: int
    """Number of results compared."""
    different: list[str]
    """Names of the results that differ between the runs, apart from measured seconds."""

    @property
    def ratio(self) -> float:
        """Wall time of the run on the cluster, divided by the wall time of the run on this machine."""
        return self.seconds_cluster / self.seconds_local


def sweep_config() -> dict[str, Any]:
    """The default config with configs/cluster_sweep.yaml merged over it, as snakemake merges configs.

    Both runs share one download cache.
    """
    config, own = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
                   for name in ("config.yaml", "configs/cluster_sweep.yaml"))
    update_config(config, own)
    return config | {"cache": str(ROOT / config["cache"])}


def compare(start: Sweep, cluster: Cluster, cores: int, keep: bool = False) -> Compared:
    """Run the sweep of `start` on this machine and on the cluster, in two new folders next to the folder of `start`."""
    start.run(*_given(start.config), "--cores", str(cores))
    here, there = (_run(start, name, on, cores, keep) for name, on in (("local", None), ("cluster", cluster)))
    # read now, because the controller remembers jobs for only ten minutes
    nodes = {fields["NodeList"] for fields in cluster.jobs().values() if fields["WorkDir"] == str(there.folder)}
    return Compared(len(grid.points(start.config)), cores, here.jobs, there.said.count("SLURM jobid"), len(nodes),
                    here.seconds, there.seconds, len(here.bits | there.bits), different(here.bits, there.bits))


def different(here: dict[str, list], there: dict[str, list]) -> list[str]:
    """Names of the results that differ between the runs or exist in only one run."""
    return sorted(name for name in here | there if here.get(name) != there.get(name))


def _given(config: dict[str, Any]) -> list[str]:
    """The results that are made before the two runs, so that both runs start from the same files."""
    calibrated = grid.calibrated(config)
    return [*(f"results/{model}/dense" for model, _ in calibrated),
            *(f"results/{model}/{calib}/tokens.safetensors" for model, calib in calibrated), "results/tasks"]


class _Run(NamedTuple):
    folder: Path
    seconds: float
    jobs: int
    said: str
    """The output of snakemake."""
    bits: dict[str, list]


def _run(start: Sweep, name: str, cluster: Cluster | None, cores: int, keep: bool) -> _Run:
    """Run a copy of `start` to its end."""
    folder = start.folder.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start.folder, folder, symlinks=True)
    made = Sweep(folder, cluster)
    made.config = start.config
    targets = [f"{grid.folder(point)}/scores.json" for point in grid.points(start.config)]
    began = time.perf_counter()
    # on the cluster, the nodes set the number of cores
    said = made.run(*targets, *([] if cluster else ["--cores", str(cores)]))
    seconds = time.perf_counter() - began
    jobs = int(re.findall(r"^(\d+) of \1 steps \(100%\) done", said, flags=re.MULTILINE)[-1])
    bits = {key: value for model, calib in grid.calibrated(start.config)
            for key, value in made.bits(f"results/{model}/{calib}").items()}
    if not keep:
        shutil.rmtree(folder)
    return _Run(folder, seconds, jobs, said, bits)


@contextmanager
def held_to(cores: int) -> Iterator[None]:
    """Within the `with` block, restrict this process and all processes that it starts to this number of cores."""
    before = os.sched_getaffinity(0)
    if len(before) < cores:
        raise SystemExit(f"--cores {cores}: this process may use {len(before)} cores; give {len(before)} at most")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table(found: Compared) -> str:
    """The comparison as a Markdown table."""
    cells = {"grid points": found.points, "jobs": found.jobs, "Slurm jobs": found.slurm_jobs, "nodes": found.nodes,
             "cores": found.cores, "local, s": f"{found.seconds_local:.0f}",
             "cluster, s": f"{found.seconds_cluster:.0f}", "ratio": f"{found.ratio:.2f}", "results": found.files,
             "different": len(found.different)}
    return tables.grid(list(cells), [(None, [str(value) for value in cells.values()])], "md", keys=0)


def main(given: Sequence[str] | None = None) -> Compared:
    """Run both sweeps, write the record, print the table and the results that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2, help="cores of each run (2)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks",
                        help="folder of the record and the runs (results/benchmarks)")
    parser.add_argument("--keep", action="store_true", help="keep the results of both runs")
    options = parser.parse_args(given)
    if reason := missing():
        raise SystemExit(reason)
    start = Sweep(options.out.resolve() / "cluster_sweep" / "start", None)
    start.config = sweep_config()
    start.folder.mkdir(parents=True, exist_ok=True)
    with held_to(options.cores):
        cluster = Cluster.start(cpus=1)
        try:
            found = compare(start, cluster, options.cores, options.keep)
        finally:
            cluster.stop()
    store.write_json(options.out / "cluster_sweep.json", found._asdict() | {"ratio": found.ratio})
    print(table(found), end="")
    for name in found.different:
        print(f"differs: {name}")
    return found


if __name__ == "__main__":
    sys.exit(bool(main().different))
