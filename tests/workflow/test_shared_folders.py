"""What shared file systems do to a run: linked results, clocks that differ, read-only inputs, files that come late."""
import os
import subprocess
import sys
import time

import pytest
import yaml

from tests.workflow.project import ROOT, Project

TARGETS = ("results/pico/few/tokens.safetensors", "results/pico/few/hidden.zarr")


def content(folder):
    """Bytes, times and modes of all files."""
    return {path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_mode)
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run to the hidden states: results on another disk, inputs dated to tomorrow that nobody may write to."""
    project = Project(tmp_path_factory.mktemp("home")).make()
    scratch = tmp_path_factory.mktemp("scratch")
    (project.folder / "results").symlink_to(scratch)
    tomorrow = time.time() + 86400
    inputs = [project.folder / "made.txt", project.folder / "heldout.txt", *(project.folder / "model").iterdir()]
    for path in inputs:
        os.utime(path, (tomorrow, tomorrow))
        path.chmod(0o444)
    (project.folder / "model").chmod(0o555)
    # of a writer on another machine that was killed
    (scratch / "pico").mkdir()
    left = scratch / "pico/.dense.elsewhere-1-0a1b2c3d.tmp"
    left.mkdir()
    before = content(project.folder / "model")
    project.run(*TARGETS)
    return project, scratch, before, left


def test_results_may_be_a_link_to_another_disk(run):
    project, scratch, _, _ = run
    assert (project.folder / "results").is_symlink()
    assert all((scratch / target.removeprefix("results/")).exists() for target in TARGETS)
    assert not [path for path in scratch.rglob("*.tmp") if "elsewhere" not in path.name]


def test_inputs_from_the_future_are_neither_refused_nor_read_again(run):
    """Their content is compared, by the hash in the record; snakemake/snakemake#3254."""
    project = run[0]
    assert project.planned(*TARGETS) == {}


def test_inputs_are_only_read(run):
    project, _, before, _ = run
    assert content(project.folder / "model") == before


def test_files_of_other_machines_are_left_alone(run):
    assert run[3].is_dir()


LATE = """
rule late:
    output: "late.txt"
    shell: "(sleep 4; touch {output}) > /dev/null 2>&1 &"
"""


@pytest.mark.parametrize("seconds, found", [(None, True), (0, False)])
def test_an_output_that_appears_late_is_waited_for(tmp_path, seconds, found):
    """NFS shows files late. None is the waiting time of the Slurm profile."""
    (tmp_path / "Snakefile").write_text(LATE)
    waits = yaml.safe_load((ROOT / "profiles/slurm/config.yaml").read_text(encoding="utf-8"))["latency-wait"] \
        if seconds is None else seconds
    done = subprocess.run([sys.executable, "-m", "snakemake", "--cores", "1", "--latency-wait", str(waits)],
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == found, done.stderr
