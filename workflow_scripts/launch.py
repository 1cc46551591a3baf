"""`make demo` runs the workflow, continues a killed run, and names the report and the summary table at the end.

Arguments are passed to snakemake unchanged. A killed snakemake leaves its own lock behind. The launcher therefore takes
a lock of the operating system on a file; this lock ends with the process that holds it. If this lock is free, no run is
alive, and snakemake's lock is cleared. If it is taken, the second run is refused.

The jobs of a run on this machine are forked from one process that has imported torch once (forks.py). A plain
`snakemake` command gives the same results; then each job imports the packages that it needs.
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
FORKED = "import sys; sys.executable = sys.argv.pop(1); from snakemake.cli import main; sys.exit(main())"
"""Snakemake whose jobs are started by another Python."""
ELSEWHERE = ("--profile", "--workflow-profile", "--executor", "-e")
"""Arguments by which jobs may run on other machines, as they may with the variable SNAKEMAKE_PROFILE."""
PATIENCE = 10  # in seconds: a killed snakemake holds the lock until the system has freed its memory


def main(arguments: list[str]) -> int:
    """Take the lock, clear the lock of a killed run, run snakemake, and print where the results are."""
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
                print("\nSome grid points cannot be made; the run goes on without them.", file=sys.stderr)
                done = subprocess.run([*snakemake, *arguments], cwd=ROOT, check=False, close_fds=False)
    if done.returncode == 0:
        print("\nReport:        results/report.html\nSummary table: results/summary.csv")
    return done.returncode


def refused_since(started: float) -> bool:
    """Whether, since this time, a job has found that its point cannot be made (planning/refusals.py)."""
    return any(file.stat().st_mtime >= started for file in (ROOT / "results").glob("*/*/*/r*/refused.json"))


def _taken(lock: TextIO) -> bool:
    """Whether the lock could be taken. The function waits some time for a killed run to end."""
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
