"""Extraction split over jobs: the bytes of one job, a shard extracted alone, and what a change of their number does."""
import re
import shutil
from pathlib import Path

import pytest

from tests.workflow.test_faults import bits

HIDDEN = "results/pico/few/hidden.zarr"
SHARDS = Path("results/pico/few/hidden-shards")


@pytest.fixture
def apart(copied):
    """A built project, its states to be extracted in three shards: 40 sequences in batches of 8."""
    copied.config["hidden"] = {"shards": 3}
    return copied


def test_shards_end_in_the_bytes_of_one_job_and_one_that_is_missing_is_extracted_alone(built, apart):
    shutil.rmtree(apart.folder / HIDDEN)
    # a model partly on disk gives the same states
    apart.config["models"]["pico"] |= {"device": "balanced", "max_memory": {"cpu": "300KiB"}}
    assert apart.planned(HIDDEN) == {"hidden_shard": 3, "hidden_join": 1}
    apart.run(HIDDEN, "--notemp")
    assert bits(apart.folder / HIDDEN) == bits(built.folder / HIDDEN)
    assert sorted(path.name for path in (apart.folder / SHARDS).iterdir()) == ["0-8", "24-40", "8-24"]
    log = (apart.folder / "results/logs/hidden/pico-few-8-24.log").read_text(encoding="utf-8")
    assert re.search(r"is spread over cpu \(\d+\), disk \(\d+\)", log) and "16 of 16 sequences" in log

    for path in (HIDDEN, SHARDS / "8-24"):
        shutil.rmtree(apart.folder / path)
    assert apart.planned(HIDDEN, "--notemp") == {"hidden_shard": 1, "hidden_join": 1}
    apart.run(HIDDEN)
    assert bits(apart.folder / HIDDEN) == bits(built.folder / HIDDEN)
    assert not (apart.folder / SHARDS).exists() and apart.planned(HIDDEN) == {}
    # an option of the extraction is seen though the shards are gone
    apart.config["hidden"]["massive_factor"] = 6.0
    assert apart.planned(HIDDEN) == {"hidden_shard": 3, "hidden_join": 1}


def test_another_number_of_shards_reruns_what_reads_states_for_its_set_of_inputs_alone(apart):
    planned = apart.planned()
    assert (planned["hidden_shard"], planned["hidden_join"], planned["similarity"]) == (3, 1, 1)
    assert not {"dense", "tokens", "evaluate_dense"} & set(planned)
    # the cards and the report quote the config
    assert apart.planned("--rerun-triggers", "mtime", "params", "code", "software-env") == {
        "all": 1, "cards": 1, "report": 1}
