"""What the tests of the benchmarks share: a benchmark as a module, and a pico project for it to run on."""
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests import pico

FOLDER = Path(__file__).parents[2] / "benchmarks"
PROMISED = {"method", "ratio", "seed", "ppl", "ppl_ratio", "acc", "acc_stderr", "rp", "params_removed", "fit_seconds"}
"""Columns of every table that compares methods."""


def load(name: str) -> ModuleType:
    """benchmarks/<name>.py as a module of its own; its imports from that folder are found as when it is run."""
    path = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name.replace('/', '_')}_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        spec.loader.exec_module(module)
    return module


def write_project(root: Path) -> Path:
    """The parts of the project's root that a benchmark reads: a pico model, two texts and a config."""
    pico.save(root / "model")
    for name, seed in (("news", 0), ("lee", 1)):
        (root / f"{name}.txt").write_text("\n".join(pico.documents(60, seed=seed)), encoding="utf-8")
    entry = "{{source: '{}', sha256: null, format: lines, encoding: utf-8}}"
    (root / "config.yaml").write_text(f"""
models: {{pico: {{source: '{root}/model', sha256: null}}}}
texts:
  news: {entry.format(root / "news.txt")}
  lee: {entry.format(root / "lee.txt")}
calibrations: {{few: {{length: 24, seed: 0, mix: {{news: 12}}}}}}
cache: cache
""", encoding="utf-8")
    return root
