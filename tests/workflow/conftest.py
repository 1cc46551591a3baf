"""The pico project run to the end, once for all tests, and copies of it to change."""
import shutil

import pytest

from tests.workflow.project import Project


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A project run to the end; tests must not change it."""
    project = Project(tmp_path_factory.mktemp("built")).make()
    project.run()
    return project


@pytest.fixture
def copied(built, tmp_path):
    """A built project to change: times of files kept."""
    shutil.copytree(built.folder, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")
