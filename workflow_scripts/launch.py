"""The program behind `make demo`: it runs the workflow, continues a killed run, and prints the paths of the report and
the summary table.

Arguments are passed to snakemake unchanged. A killed snakemake leaves its own lock behind. The launcher therefore locks
another file, `launch.lock`. The operating system removes the lock of this file when the locking process ends. If
`launch.lock` is not locked, no other run is active, and the launcher clears snakemake's lock. If `launch.lock` is
locked, the launcher refuses to start a second run.

The jobs of a run on this machine are forked from one process that has already imported torch (forks.py). The command
`snakemake` without this launcher gives the same results, but each job then imports its packages itself.
"""
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

import forks

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".snakemake" / "launch.lock"
LOCKS = ROOT / ".snakemake" / "locks"
FORKED = """
import sys
sys.executable = sys.argv.pop(1)
from snakemake.settings.types import MaxJobsPerTimespan as Limit
given = Limit.parse_choice
Limit.parse_choice = lambda text: None if text == "100/1s" else given(text)
from snakemake.cli import main
sys.exit(main())
"""
"""Code that runs Snakemake and starts its jobs with the Python of the first argument.

Snakemake limits the jobs of a second by default. With a limit, every job that ends adds a timer that looks at all ready
jobs again once a second until the end of the run. After 120 jobs, Snakemake needs 16 % of a core for these timers. On
one machine the cores limit the jobs, so the default limit is left out.
"""
ELSEWHERE = ("--profile", "--workflow-profile", "--executor", "-e")
"""Arguments of snakemake that can send jobs to other machines. The environment variable SNAKEMAKE_PROFILE can also send
jobs to other machines."""
PATIENCE = 10  # in seconds: a killed snakemake holds the lock until the system has freed its memory


def main(arguments: list[str]) -> int:
    """Lock `launch.lock`, clear the lock of a killed snakemake, run snakemake, and print the paths of the results."""
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        if not _taken(lock):
            print("another run is working in this folder; wait for it, or stop it first", file=sys.stderr)
            return 1
        # snakemake inherits the lock, so that the lock remains if only this process is killed
        os.set_inheritable(lock.fileno(), True)
        snakemake = [sys.executable, "-m", "snakemake"]
        if LOCKS.is_dir() and any(LOCKS.iterdir()):
            subprocess.run([*snakemake, "--unlock", "--quiet", "all"], cwd=ROOT, check=False, close_fds=False)
        started = time.time()
        with forks.python(shared=True) as python:
            elsewhere = any(argument.split("=")[0] in ELSEWHERE for argument in arguments)
            if not elsewhere and not os.environ.get("SNAKEMAKE_PROFILE"):
                snakemake = [sys.executable, "-c", FORKED, python]
            done = subprocess.run([*snakemake, *arguments], cwd=ROOT, check=False, close_fds=False)
            if done.returncode and refused_since(started):
                print("\nSome grid points cannot be made; the run continues without them.", file=sys.stderr)
                done = subprocess.run([*snakemake, *arguments], cwd=ROOT, check=False, close_fds=False)
    if done.returncode == 0:
        print("\nReport:        results/report.html\nSummary table: results/summary.csv")
    return done.returncode


def refused_since(started: float) -> bool:
    """Whether a job has recorded since `started` that its grid point cannot be made (planning/refusals.py)."""
    return any(file.stat().st_mtime >= started for file in (ROOT / "results").glob("*/*/*/r*/refused.json"))


def _taken(lock: TextIO) -> bool:
    """Try to lock the file, and return whether the lock succeeded.

    The function waits up to PATIENCE seconds for a killed run to end.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
