"""Rules `check` and `test` run a file of tests/results with pytest; the log contains the output of pytest.

Rule `check` tests the results of this run. Rule `test` tests the results of the embedded default.
"""
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from job import job


class ResultsFailed(RuntimeError):
    """A test of the results failed, or was skipped."""


def passed(file: Path, run: str = "") -> list[str]:
    """The names of the tests of a file, all of which passed. `run` is the JSON file of the run that the tests check.

    Raises ResultsFailed with the first failure.
    """
    # without the options of pyproject.toml, because some of them need pytest-xdist
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-rA", str(file)]
    done = subprocess.run(command, cwd=file.parents[2], env={**os.environ, "KDP_RUN": run}, text=True, check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    logging.info("pytest printed:\n%s", done.stdout)
    lines = done.stdout.strip().splitlines() or ["nothing"]
    wrong = [line for line in lines if re.match(r"(FAILED|ERROR|SKIPPED) ", line)]
    # a test is skipped if its sources cannot be fetched; here a skipped test counts as a failure
    if done.returncode or wrong:
        raise ResultsFailed(f"pytest ended with `{lines[-1].strip('= ')}`; see in the log which test failed or was "
                            f"skipped, and why. The first one: {wrong[0] if wrong else 'none'}")
    return [line.removeprefix("PASSED ") for line in lines if line.startswith("PASSED ")]


def check(file: Path, run: dict, out: str) -> None:
    """Test the results in this folder, and write the names of the tests."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as named:
        json.dump({"folder": str(Path.cwd()), **run}, named)
        named.flush()
        names = passed(file, named.name)
    Path(out).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


if __name__ == "__main__":
    with job(snakemake):
        tests = Path(snakemake.input.tests)
        if snakemake.rule == "check":
            check(tests, snakemake.params.run, snakemake.output[0])
        else:
            print("\n".join(passed(tests)))
