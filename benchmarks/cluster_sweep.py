"""A sweep on a Slurm of three nodes beside the same sweep on this machine: whether the bits are equal, and wall times.

Both runs start from copies of one folder with the dense model, calibration tokens and evaluation tasks, and end with
the scores of every grid point. Every job has one thread, and all processes of both runs are held to the same cores: the
cluster (tests/cluster/cluster.py) is three nodes of one CPU each on this machine. So what it takes longer is what a
cluster adds: processes of Slurm and Snakemake around each job, submission, and the wait for news of its end.

<out>/cluster_sweep.json has, beside the size of the sweep,
    seconds_local, seconds_cluster    by the clock, from the start of snakemake to its end
    ratio                             of the second to the first
    files, different                  results compared, and the names of those that differ in more than seconds
The runs are deleted once they are compared, 9 GB each, unless --keep is given.
Run: python benchmarks/cluster_sweep.py [--cores 2] [--out FOLDER]; it needs slurm-wlm and munge. By estimate 25 minutes
on two free cores.
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
from tests.cluster.cluster import Cluster, missing
from tests.cluster.sweep import Sweep
from tests.workflow.project import ROOT

sys.path.insert(0, str(ROOT / "workflow_scripts"))
from planning import grid


class Compared(NamedTuple):
    """Two runs of one sweep."""
    points: int
    """Of the grid."""
    cores: int
    """To which both runs were held."""
    jobs: int
    """Of snakemake, in each run."""
    slurm_jobs: int
    """Fewer than `jobs`, as small ones go together."""
    nodes: int
    """That ran some."""
    seconds_local: float
    seconds_cluster: float
    files: int
    """Results compared."""
    different: list[str]
    """Names of results that differ in more than seconds."""

    @property
    def ratio(self) -> float:
        """Wall time of the cluster's run beside the local one's."""
        return self.seconds_cluster / self.seconds_local


def sweep_config() -> dict[str, Any]:
    """configs/cluster_sweep.yaml over the default, as snakemake reads them; downloads stay where they are."""
    config, own = (yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
                   for name in ("config.yaml", "configs/cluster_sweep.yaml"))
    update_config(config, own)
    return config | {"cache": str(ROOT / config["cache"])}


def compare(start: Sweep, cluster: Cluster, cores: int, keep: bool = False) -> Compared:
    """Run the sweep of `start` here and on the cluster, beside its folder."""
    start.run(*_given(start.config), "--cores", str(cores))
    here, there = (_run(start, name, on, cores, keep) for name, on in (("local", None), ("cluster", cluster)))
    # the controller remembers jobs for ten minutes
    nodes = {fields["NodeList"] for fields in cluster.jobs().values() if fields["WorkDir"] == str(there.folder)}
    return Compared(len(grid.points(start.config)), cores, here.jobs, there.said.count("SLURM jobid"), len(nodes),
                    here.seconds, there.seconds, len(here.bits | there.bits), different(here.bits, there.bits))


def different(here: dict[str, list], there: dict[str, list]) -> list[str]:
    """Names of results that are not the same in both, or in one alone."""
    return sorted(name for name in here | there if here.get(name) != there.get(name))


def _given(config: dict[str, Any]) -> list[str]:
    """What both runs start from."""
    calibrated = grid.calibrated(config)
    return [*(f"results/{model}/dense" for model, _ in calibrated),
            *(f"results/{model}/{calib}/tokens.safetensors" for model, calib in calibrated), "results/tasks"]


class _Run(NamedTuple):
    folder: Path
    seconds: float
    jobs: int
    said: str
    """What snakemake printed."""
    bits: dict[str, list]


def _run(start: Sweep, name: str, cluster: Cluster | None, cores: int, keep: bool) -> _Run:
    """A copy of `start` run to the end."""
    folder = start.folder.with_name(name)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(start.folder, folder, symlinks=True)
    made = Sweep(folder, cluster)
    made.config = start.config
    targets = [f"{grid.folder(point)}/scores.json" for point in grid.points(start.config)]
    began = time.perf_counter()
    # the cluster's cores are those of its nodes
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
    """This process, and all that it starts meanwhile, on so many cores."""
    before = os.sched_getaffinity(0)
    if len(before) < cores:
        raise SystemExit(f"--cores {cores}: this process may use {len(before)}; ask for that many at most")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def table(found: Compared) -> str:
    """Markdown."""
    cells = {"grid points": found.points, "jobs": found.jobs, "Slurm jobs": found.slurm_jobs, "nodes": found.nodes,
             "cores": found.cores, "local, s": f"{found.seconds_local:.0f}",
             "cluster, s": f"{found.seconds_cluster:.0f}", "ratio": f"{found.ratio:.2f}", "results": found.files,
             "different": len(found.different)}
    rows = (cells, ["---:"] * len(cells), map(str, cells.values()))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def main(given: Sequence[str] | None = None) -> Compared:
    """Run both, write the record, print the table and what differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=2, help="for each run (2)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks")
    parser.add_argument("--keep", action="store_true", help="leave the results of both runs")
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
