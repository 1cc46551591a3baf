"""Measures the time and memory that Snakemake needs to plan grids of 100, 1,000 and 10,000 jobs, by dry runs.

The model of a grid is never loaded. The numbers of variants, ratios and K_max are chosen so that they give the number
of jobs. A dry run makes no results. Jobs that depend on the chosen blocks (steps, diagnoses, figures) are therefore not
planned.
Run: python benchmarks/grid_scale.py [--jobs 100 1000 10000] [--out FILE]
"""
import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from kdp_core.results import tables

ROOT = Path(__file__).resolve().parents[1]
POINTS_A_VARIANT = 20
"""Number of points of one variant: five ratios times four K_max."""
JOBS_A_POINT = 4
"""Number of jobs of one point: one job for each of the rules blocks, fold, evaluate and efficiency."""


class Planned(NamedTuple):
    """The jobs, time and memory of one dry run."""
    points: int
    jobs: int
    seconds: float
    """Wall time."""
    cpu_seconds: float
    """Processor time. On a machine without other work, wall time and processor time are about the same."""
    peak_mib: float
    """Peak resident memory over all dry runs so far, because the system gives one peak for all child processes
    together."""


def config_of(jobs: int) -> dict[str, Any]:
    """A configuration with about `jobs` jobs.

    Each variant has a new name and is based on a method of the embedded config.
    """
    points = max(1, jobs // JOBS_A_POINT)
    variants = max(1, round(points / POINTS_A_VARIANT))
    bases = ("kdp", "linear", "remove", "linear_sequential")
    methods = {f"variant{number}": {"base": bases[number % len(bases)]} for number in range(variants)}
    return {"models": {"grid": {"source": "model"}}, "methods": methods,
            "grid": {"models": ["grid"], "methods": list(methods), "ratios": [0.1, 0.15, 0.2, 0.25, 0.3],
                     "k_max": [3, 4, 5, 6]}}


def plan(config: dict[str, Any], folder: Path) -> Planned:
    """Plan the whole workflow on this config by a dry run in an empty folder."""
    (folder / "grid.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "config.yaml").write_text((ROOT / "config.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "model").mkdir(exist_ok=True)
    began, cpu = time.perf_counter(), _cpu_seconds()
    done = subprocess.run([sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory",
                           str(folder), "--workflow-profile", str(ROOT / "profiles" / "default"), "--dry-run",
                           "--quiet", "rules", "--configfile", "grid.yaml"], cwd=folder, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    seconds = time.perf_counter() - began
    total = re.search(r"^total +(\d+)$", done.stdout, flags=re.MULTILINE)
    if done.returncode or not total:
        raise SystemExit(f"the dry run failed:\n{done.stdout[-4000:]}")
    grid = config["grid"]
    return Planned(len(grid["methods"]) * len(grid["ratios"]) * len(grid["k_max"]), int(total.group(1)), seconds,
                   _cpu_seconds() - cpu, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(rows: Sequence[Planned]) -> str:
    """The dry runs as a Markdown table, with one row for each run."""
    head = ["grid points", "jobs", "dry run, s", "its CPU time, s", "ms CPU a job", "peak memory, MiB"]
    body = [(None, [f"{row.points:,}", f"{row.jobs:,}", f"{row.seconds:.1f}", f"{row.cpu_seconds:.1f}",
                    f"{1000 * row.cpu_seconds / row.jobs:.1f}", f"{row.peak_mib:,.0f}"]) for row in rows]
    return tables.grid(head, body, "md", keys=0)


def main(given: Sequence[str] | None = None) -> None:
    """Plan each grid, and print the table of the dry runs. With --out, also write the table to this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 1_000, 10_000],
                        help="sizes of the grids (100 1000 10000)")
    parser.add_argument("--out", type=Path, help="file that receives the table too (none)")
    options = parser.parse_args(given)
    rows = []
    for jobs in sorted(options.jobs):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(plan(config_of(jobs), Path(folder)))
        print(rows[-1], file=sys.stderr)
    print(table(rows), end="")
    if options.out:
        options.out.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
