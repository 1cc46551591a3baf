"""Pico checkpoints of every form that a pruned model takes, and an environment in which kdp cannot be imported."""
import os
from pathlib import Path

import pytest

import kdp_core
from kdp_core.methods import METHODS
from tests import pico

FORMS = {"removed": ("llama", "remove"), "merged": ("llama", "laco"), "folded": ("llama", "kdp"),
         "residual": ("qwen3", "kdp_residual"), "narrow": ("llama", "flap"), "rare": ("llama", "kdp_narrow"),
         "parts": ("llama", "joint_drop"), "sliced": ("llama", "slicegpt")}
"""Form -> family and method."""
MORE = {"rare": {"search": {"rare_rank": 0.25}, "block": {"rare_price": 0.01}}}
"""Form -> options beside those of the method's example."""
STOCK = ("removed", "merged")
"""Forms that the family's own class holds."""
BLOCKER = """\
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("kdp", "kdp_core"):
            raise ImportError(f"{name} is not here")


sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture(scope="session")
def forms(tmp_path_factory):
    """Form -> folder of the checkpoint."""
    root = tmp_path_factory.mktemp("forms")
    made = {}
    for form, (family, method) in FORMS.items():
        made[form], example, more = root / form, METHODS[method].example, MORE.get(form, {})
        options = {part: {**example.get(part, {}), **more.get(part, {})} for part in {**example, **more}}
        kdp_core.prune_model(pico.lively(pico.model(family)), pico.tokenizer(), pico.documents(60), method=method,
                             ratio=0.2, sequences=40, length=24, options=options, out=made[form])
    return made


@pytest.fixture(scope="session")
def without_kdp(tmp_path_factory) -> dict[str, str]:
    """The environment of a process that cannot import kdp, and has a hub cache of its own."""
    folder: Path = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1"}
