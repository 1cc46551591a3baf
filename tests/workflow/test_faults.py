"""Kill -9 and SIGTERM in the middle of step 1, and kill -9 of extraction: the next run goes on, to the same bits."""
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from kdp_core.base import store
from tests.workflow.project import Project

KERNEL = "results/pico/few/kdp/blocks/4-6/kernel.safetensors"
LOG = "results/logs/step/pico-few-kdp-4-6-kernel.log"
STATES = "results/resume"
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


def start_until(project: Project, target: str, log: str, word: str) -> subprocess.Popen:
    """Start snakemake and wait until the rule's log says `word`."""
    process = subprocess.Popen(project.command(target), cwd=project.folder, env=project.environment(),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    path, deadline = project.folder / log, time.monotonic() + 180
    while not (path.exists() and word in path.read_text(encoding="utf-8")):
        assert process.poll() is None and time.monotonic() < deadline, f"{target} was done before it could be killed"
        time.sleep(0.01)
    return process


def kill_when(project: Project, target: str, log: str, word: str) -> None:
    """Kill the whole process group at once when the rule's log says `word`."""
    process = start_until(project, target, log, word)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def same_kernel(project: Project, undisturbed: Project) -> bool:
    one, other = (store.read(made.folder / KERNEL) for made in (project, undisturbed))
    return all((getattr(one, name) == getattr(other, name)).all() for name in ("omega_DM", "operators_KFF", "gamma_K")
               ) and [row["loss"] for row in one.curve] == [row["loss"] for row in other.curve]


def test_killed_in_extraction_and_in_step_1(undisturbed, tmp_path):
    project = project_of(tmp_path)
    kill_when(project, HIDDEN, "results/logs/hidden/pico-few.log", "3 of 40 sequences")
    assert not (project.folder / HIDDEN).exists()
    project.run("--unlock")
    project.run(HIDDEN)
    assert bits(project.folder / HIDDEN) == bits(undisturbed.folder / HIDDEN)

    project.config["training"] = {"save_every_s": 0}
    kill_when(project, KERNEL, LOG, "epoch 3 of 60")
    assert not (project.folder / KERNEL).exists()
    project.run("--unlock")
    project.run(KERNEL)
    epoch = int(re.search(r"resumed at epoch (\d+)", (project.folder / LOG).read_text(encoding="utf-8")).group(1))
    assert epoch >= 3 and same_kernel(project, undisturbed) and not list((project.folder / STATES).iterdir())


def test_sigterm_in_step_1_saves_and_the_next_run_goes_on(undisturbed, tmp_path):
    project = project_of(tmp_path)
    snakemake = start_until(project, KERNEL, LOG, "epoch 3 of 60")
    job = next(process for process in psutil.Process(snakemake.pid).children(recursive=True)
               if "python" in process.name() and any("step.py" in word for word in process.cmdline()))
    job.send_signal(signal.SIGTERM)
    assert snakemake.wait(timeout=180) == 1, "the job counts as failed"
    log = (project.folder / LOG).read_text(encoding="utf-8")
    stopped = re.search(r"stopped at epoch (\d+), update (\d+); the next run continues there", log)
    assert stopped and "Traceback" not in log and not (project.folder / KERNEL).exists()
    project.run(KERNEL)
    log = (project.folder / LOG).read_text(encoding="utf-8")
    assert f"resumed at epoch {stopped.group(1)}, update {stopped.group(2)}" in log
    assert "epoch 60 of 60" in log and "epoch 2 of 60" not in log
    assert same_kernel(project, undisturbed) and not list((project.folder / STATES).iterdir())
