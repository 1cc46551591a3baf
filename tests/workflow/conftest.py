"""The pico project run to the end, once for all tests, and copies of it to change."""
import os
import shutil

import pytest
from filelock import FileLock

from tests.workflow.project import Project


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A project run to the end, by one of the processes that share the tests; tests must not change it."""
    run = tmp_path_factory.getbasetemp()
    shared = run.parent if "PYTEST_XDIST_WORKER" in os.environ else run
    kept = shared / "kept"
    with FileLock(shared / "kept.lock"):
        if not kept.exists():
            project = Project(shared / "unfinished").make()
            project.run()
            project.folder.rename(kept)
    # runs of snakemake lock their folder
    shutil.copytree(kept, run / "built", symlinks=True)
    return Project(run / "built")


@pytest.fixture
def copied(built, tmp_path):
    """A built project to change: times of files kept."""
    shutil.copytree(built.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")
