"""`make demo`: runs the workflow, goes on after a killed run, and ends by naming the report and the summary table.

Arguments go to snakemake as they are. A killed snakemake leaves its own lock behind; here the system's lock on a file
says whether a run is alive (it ends with the process that holds it), so a dead run's lock is cleared and a live one's
respected.
"""
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / ".snakemake" / "launch.lock"
LOCKS = ROOT / ".snakemake" / "locks"
PATIENCE = 10  # seconds: a killed snakemake holds its files until the system has taken its memory apart


def main(arguments: list[str]) -> int:
    """Take the lock, clear what a killed run left, run snakemake, say where the results are."""
    LOCK.parent.mkdir(exist_ok=True)
    with LOCK.open("w") as lock:
        if not _taken(lock):
            print("another run is working in this folder; wait for it, or stop it first", file=sys.stderr)
            return 1
        # snakemake itself must hold the lock too, in case only this process is killed
        os.set_inheritable(lock.fileno(), True)
        snakemake = [sys.executable, "-m", "snakemake"]
        if LOCKS.is_dir() and any(LOCKS.iterdir()):
            subprocess.run([*snakemake, "--unlock", "--quiet", "all"], cwd=ROOT, check=False, close_fds=False)
        done = subprocess.run([*snakemake, *arguments], cwd=ROOT, check=False, close_fds=False)
    if done.returncode == 0:
        print("\nReport:        results/report.html\nSummary table: results/summary.csv")
    return done.returncode


def _taken(lock: TextIO) -> bool:
    """Whether the lock could be had, a killed run given time to go."""
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
