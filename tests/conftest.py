"""Fixtures shared by all tests: one thread (same bits everywhere) and pico checkpoints."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests import pico

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Runs of the workflow, the long ones, come first; those on the built project one after the other."""
    items.sort(key=lambda item: ("workflow" not in item.path.parts, "built" not in item.fixturenames, str(item.path)))


@pytest.fixture(scope="session", params=pico.FAMILIES)
def pico_folder(request, tmp_path_factory):
    """A pico checkpoint of each family in turn."""
    return pico.save(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """One pico Llama checkpoint."""
    return pico.save(tmp_path_factory.mktemp("llama") / "model", "llama")
