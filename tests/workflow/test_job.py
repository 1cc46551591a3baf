"""What a training's state is known by: a change of anything that the result depends on gives another key."""
import copy
import os
import sys
from types import SimpleNamespace

import pytest

from tests.workflow.project import ROOT

sys.path.insert(0, str(ROOT / "workflow_scripts"))
import job


@pytest.fixture
def made(tmp_path):
    """A job as scripts see it, with a small file, a large one and a folder as inputs."""
    (tmp_path / "small.json").write_text("{}")
    (tmp_path / "large").write_bytes(bytes(job.BY_CONTENT + 1))
    (tmp_path / "states.zarr/c/0").mkdir(parents=True)
    (tmp_path / "states.zarr/c/0/0").write_bytes(b"chunk")
    return SimpleNamespace(rule="step", threads=1, wildcards={"step": "kernel"}, log=["results/logs/step/a-r0.1.log"],
                           params={"options": {"lr": 0.1, "epochs": 2}, "code": "abc", "device": "cpu"}, config={},
                           input=[str(tmp_path / name) for name in ("small.json", "large", "states.zarr")])


def test_the_key_is_of_the_job_and_not_of_the_run(made, tmp_path):
    before = job._key(made)
    assert job._key(copy.deepcopy(made)) == before
    made.config["training"] = {"save_every_s": 1}
    made.params["options"] = {"epochs": 2, "lr": 0.1}
    # the same content, written anew
    (tmp_path / "small.json").write_text("{}")
    os.utime(tmp_path / "small.json", ns=(1, 1))
    assert job._key(made) == before


@pytest.mark.parametrize("change", [
    lambda made, folder: made.params["options"].update(lr=0.2), lambda made, folder: made.params.update(code="abd"),
    lambda made, folder: made.params.update(device="cuda"), lambda made, folder: made.wildcards.update(step="inverse"),
    lambda made, folder: setattr(made, "threads", 2),
    lambda made, folder: (folder / "small.json").write_text("[]"), lambda made, folder: os.utime(folder / "large"),
    lambda made, folder: (folder / "states.zarr/c/0/0").write_bytes(b"other"),
    lambda made, folder: (folder / "states.zarr/c/0/1").write_bytes(b"chunk")])
def test_whatever_the_result_depends_on_changes_the_key(made, tmp_path, change):
    os.utime(tmp_path / "large", ns=(1, 1))
    before = job._key(made)
    change(made, tmp_path)
    assert job._key(made) != before
