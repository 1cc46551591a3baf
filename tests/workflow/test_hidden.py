"""Extraction split over jobs: the bytes of one job, shards that fail alone, and what a change of their number does."""
import re
import shutil
from pathlib import Path

import pytest

from tests.workflow.project import Project
from tests.workflow.test_faults import bits

HIDDEN = "results/pico/few/hidden.zarr"
SHARDS = Path("results/pico/few/hidden-shards")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A project whose states one job has extracted: 40 sequences in 7 batches."""
    project = Project(tmp_path_factory.mktemp("whole")).make()
    project.config["hidden"] = {"batch_sequences": 6}
    project.run(HIDDEN)
    return project


@pytest.fixture
def apart(whole, tmp_path):
    """The same project before its extraction, to be done in three shards."""
    shutil.copytree(whole.folder, tmp_path / "project", symlinks=True)
    shutil.rmtree(tmp_path / "project" / HIDDEN)
    project = Project(tmp_path / "project")
    project.config["hidden"] = {"batch_sequences": 6, "shards": 3}
    return project


def test_shards_of_a_model_partly_on_disk_end_in_the_bytes_of_one_job_and_are_gone(whole, apart):
    apart.config["models"]["pico"] |= {"device": "balanced", "max_memory": {"cpu": "300KiB"}}
    assert apart.planned(HIDDEN) == {"hidden_shard": 3, "hidden_join": 1}
    apart.run(HIDDEN)
    assert bits(apart.folder / HIDDEN) == bits(whole.folder / HIDDEN)
    log = (apart.folder / "results/logs/hidden/pico-few-0-12.log").read_text(encoding="utf-8")
    assert re.search(r"is spread over cpu \(\d+\), disk \(\d+\)", log)
    assert not (apart.folder / SHARDS).exists()
    assert apart.planned(HIDDEN) == {}
    benchmarks = {path.stem for path in (apart.folder / "results/benchmarks/hidden").iterdir()}
    assert benchmarks == {"pico-few", "pico-few-0-12", "pico-few-12-24", "pico-few-24-40"}
    # an option of the extraction is seen though the shards are gone
    apart.config["hidden"]["layers"] = [0, 1]
    assert apart.planned(HIDDEN) == {"hidden_shard": 3, "hidden_join": 1}


def test_a_shard_that_is_missing_is_extracted_alone(whole, apart):
    apart.run(HIDDEN, "--notemp")
    assert sorted(path.name for path in (apart.folder / SHARDS).iterdir()) == ["0-12", "12-24", "24-40"]
    for path in (HIDDEN, SHARDS / "12-24"):
        shutil.rmtree(apart.folder / path)
    assert apart.planned(HIDDEN, "--notemp") == {"hidden_shard": 1, "hidden_join": 1}
    apart.run(HIDDEN)
    assert bits(apart.folder / HIDDEN) == bits(whole.folder / HIDDEN)


def test_another_number_of_shards_extracts_again_for_its_set_of_inputs_alone(whole, apart):
    project = Project(whole.folder)
    project.config["hidden"] = apart.config["hidden"]
    assert project.planned(HIDDEN) == {"hidden_shard": 3, "hidden_join": 1}
    assert project.planned(HIDDEN, "--rerun-triggers", "mtime", "params", "code", "software-env") == {}
