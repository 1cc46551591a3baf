"""Fixtures shared by all tests: one thread (same bits everywhere) and pico checkpoints."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import pico

torch.set_num_threads(1)


# before xdist reads the groups
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """A worker runs whole files, one of them all that share the built project; runs of the workflow, the long ones,
    come first."""
    items.sort(key=lambda item: ("built" not in item.fixturenames, "workflow" not in item.path.parts))
    for item in items:
        item.add_marker(pytest.mark.xdist_group("built" if "built" in item.fixturenames else str(item.path)))


@pytest.fixture(scope="session", params=pico.FAMILIES)
def pico_folder(request, tmp_path_factory):
    """A pico checkpoint of each family in turn."""
    return pico.save(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """One pico Llama checkpoint."""
    return pico.save(tmp_path_factory.mktemp("llama") / "model", "llama")
