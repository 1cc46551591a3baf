"""One Slurm for all tests of this folder, an undisturbed local run, and copies of it to finish on the cluster.

The tests take minutes, so they run only where they are named: `pytest tests/cluster`.
"""
import shutil
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, missing
from tests.cluster.sweep import Sweep

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config, items):
    named = any("cluster" in Path(argument.split("::")[0]).parts for argument in config.args)
    reason = missing() or (None if named else "minutes on a Slurm of their own: run them by pytest tests/cluster")
    for item in items:
        if reason and HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster():
    """Three nodes with two fake GPUs each."""
    made = Cluster.start()
    yield made
    made.stop()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The sweep run to the end on this machine, without Slurm."""
    made = Sweep(tmp_path_factory.mktemp("undisturbed"), None).make()
    made.run(*made.targets())
    return made


@pytest.fixture
def prepared(undisturbed, cluster, tmp_path):
    """The same run up to the similarity of layers; the rest runs on the cluster and ends with the test."""
    shutil.copytree(undisturbed.folder, tmp_path / "sweep", symlinks=True)
    for method in undisturbed.config["grid"]["methods"]:
        shutil.rmtree(tmp_path / "sweep/results/pico/few" / method, ignore_errors=True)
    # a test waits for what a log says
    shutil.rmtree(tmp_path / "sweep/results/logs")
    made = Sweep(tmp_path / "sweep", cluster)
    yield made
    made.leave()
