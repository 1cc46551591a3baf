"""Fixtures shared by all tests: one thread (same bits everywhere) and pico checkpoints."""
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from kdp_core.base import products
from tests import pico

torch.set_num_threads(1)
# as in jobs and commands, so that their results and those of the library have the same bits
products.choose()
PRECISION = torch.get_float32_matmul_precision()


LONG = ("workflow/stages/test_compose.py", "kdp_core/methods/test_battery.py")
"""The longest files. The first of two workers builds the pico project, for which the second would wait; it runs the
longest file instead."""
HERE = Path(__file__).parent


def place(item):
    """The files of LONG come first, then the other runs of the workflow, then the tests of the whole project, which
    start processes. Short files come last, so that the workers end at almost the same time."""
    name = item.path.relative_to(HERE).as_posix()
    return (LONG.index(name) if name in LONG else len(LONG), not name.startswith("workflow/"),
            "built" not in item.fixturenames, "/" in name, name)


def pytest_collection_modifyitems(items):
    """Sort the tests. Tests that use the built project are next to each other."""
    items.sort(key=place)


@pytest.fixture(autouse=True)
def same_products():
    """A test may choose another library of matrix products."""
    yield
    torch.set_float32_matmul_precision(PRECISION)


@pytest.fixture(scope="session", params=pico.FAMILIES)
def pico_folder(request, tmp_path_factory):
    """A pico checkpoint of each family in turn."""
    return pico.save(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """One pico Llama checkpoint."""
    return pico.save(tmp_path_factory.mktemp("llama") / "model", "llama")
