"""Rule `test`: runs tests/results with pytest; the log holds what pytest printed."""
import logging
import subprocess
import sys
from pathlib import Path

from job import job


class ResultsFailed(RuntimeError):
    """A test of the results failed, or was skipped."""


def run(folder: Path) -> str:
    """The last line that pytest prints about a folder of tests. Raises ResultsFailed."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)],
                          cwd=folder.parents[1], text=True, check=False, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    logging.info("pytest printed:\n%s", done.stdout)
    last = (done.stdout.strip().splitlines() or ["nothing"])[-1].strip("= ")
    # a test is skipped if its sources cannot be fetched; whoever asks for the tests asks for all of them
    if done.returncode or "skipped" in last:
        raise ResultsFailed(f"pytest ended with `{last}`; see in the log which test failed or was skipped, and why")
    return last


if __name__ == "__main__":
    with job(snakemake):
        print(run(Path(snakemake.input.tests)))
