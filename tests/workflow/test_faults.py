"""Kill -9 in the middle of step 1 and of extraction: the next run goes on, and the results have the same bits."""
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from kdp_core import store
from tests.workflow.project import Project

KERNEL = "results/pico/few/kdp/blocks/4-6/kernel.safetensors"
HIDDEN = "results/pico/few/hidden.zarr"


def project_of(folder: Path) -> Project:
    """A project whose extraction and step 1 last long enough to be caught in the middle."""
    made = Project(folder).make()
    made.config["hidden"] = {"batch_sequences": 1}
    made.config["methods"]["kdp"]["kernel"] |= {"epochs": 60, "batch_sequences": 4}
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same project, never disturbed."""
    made = project_of(tmp_path_factory.mktemp("undisturbed"))
    made.run(KERNEL)
    return made


def bits(folder: Path) -> dict[str, bytes]:
    """Every file of a Zarr group but snakemake's time stamp."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != ".snakemake_timestamp"}


def kill_when(project: Project, target: str, log: str, word: str) -> None:
    """Start snakemake, wait until the rule's log says `word`, kill the whole process group at once."""
    process = subprocess.Popen(project.command(target), cwd=project.folder, env=project.environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    path, deadline = project.folder / log, time.monotonic() + 180
    while not (path.exists() and word in path.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < deadline, f"{target} was done before it could be killed"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_in_extraction_and_in_step_1(undisturbed, tmp_path):
    project = project_of(tmp_path)
    kill_when(project, HIDDEN, "results/logs/hidden/pico-few.log", "3 of 40 sequences")
    assert not (project.folder / HIDDEN).exists()
    project.run("--unlock")
    project.run(HIDDEN)
    assert bits(project.folder / HIDDEN) == bits(undisturbed.folder / HIDDEN)

    kill_when(project, KERNEL, "results/logs/step/pico-few-kdp-4-6-kernel.log", "epoch 3 of 60")
    assert not (project.folder / KERNEL).exists()
    project.run("--unlock")
    project.run(KERNEL)
    one, other = (store.read(made.folder / KERNEL) for made in (project, undisturbed))
    assert all((getattr(one, name) == getattr(other, name)).all() for name in ("omega_DM", "operators_KFF", "gamma_K"))
    assert [row["loss"] for row in one.curve] == [row["loss"] for row in other.curve]
